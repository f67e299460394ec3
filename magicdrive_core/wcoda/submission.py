"""The layout of a W-CODA submission: names of its videos, and how many there must be.

Round 1, the standard set: ``{team}_standard/{token}_gen{0..3}/{token}_{VIEW}.mp4``. Round 2, the long set, whose folder
name the track has not published: ``{team}_long/{token}_{sunny|rainy|night}/{token}_{VIEW}.mp4``. The token
is that of the scene's first sample.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH, VIEWS

WEATHERS = ("sunny", "rainy", "night")
_NAME = re.compile(
    r"(?P<team>[A-Za-z0-9_-]+)_(?:standard/(?P<token>[^/_]+)_gen(?P<generation>\d{1,3})"
    r"|long/(?P<long>[^/_]+)_(?P<weather>sunny|rainy|night))/(?P<file>[^/]+)"
)


@dataclass(frozen=True)
class Expected:
    """Properties of a valid submission; counts that are None are taken from the zip itself."""

    scenes: int | None = None
    generations: int | None = None
    long_scenes: int | None = None  # in each weather
    frames: int = 16
    fps: int = 12
    height: int = PICTURE_HEIGHT
    width: int = PICTURE_WIDTH
    max_mbit_s: float | None = 4.0


OFFICIAL = Expected()


@dataclass(frozen=True)
class VideoName:
    """The parts of a video's name in the zip."""

    path: str  # in the zip
    team: str
    token: str  # of the scene's first sample
    variant: str  # "gen0" and so on, or a weather
    file: str

    @property
    def long(self) -> bool:
        """Whether the video belongs to the long set."""
        return self.variant in WEATHERS

    @classmethod
    def parse(cls, path: str) -> VideoName | None:
        """Parse the name of a video in the zip.

        Args:
            path: Path in the zip.

        Returns:
            The parts of the name; None if it has the form of neither set. ``variant`` has no leading zeros.
        """
        match = _NAME.fullmatch(path)
        if match is None:
            return None
        variant = match["weather"] or f"gen{int(match['generation'])}"
        return cls(path, match["team"], match["long"] or match["token"], variant, match["file"])

    @classmethod
    def of(cls, team: str, token: str, variant: str, file: str) -> VideoName:
        """Build the name of a video.

        Args:
            team: Name of the team, which starts the name of the top folder.
            token: Token of the scene's first sample.
            variant: "gen0", "gen1", ... for the standard set; a weather for the long set.
            file: Name of the file, ``{token}_{VIEW}.mp4``.

        Returns:
            The name, with its path in the zip.
        """
        kind = "long" if variant in WEATHERS else "standard"
        return cls(f"{team}_{kind}/{token}_{variant}/{file}", team, token, variant, file)

    def round_one(self) -> str:
        """Return the path in the zip of the same view's standard video (gen0), with which the sunny long one starts."""
        return f"{self.team}_standard/{self.token}_gen0/{self.file}"


def count_faults(names: Sequence[VideoName], expected: Expected) -> Iterator[str]:
    """Find videos that are missing or too many, by their names alone.

    The standard set has scenes x generations x six views, the long set scenes x three weathers x six views. A zip
    without a long set is complete.

    Args:
        names: The names of all videos in the zip.
        expected: The counts; None is not checked, but without ``generations`` the highest number in the zip counts.

    Yields:
        One line for each fault.
    """
    if not any(not name.long for name in names):
        yield "no video in the zip" if not names else "no video of the standard set in the zip"
        return
    teams = sorted({name.team for name in names})
    if len(teams) > 1:
        yield f"folders of {len(teams)} teams: {', '.join(teams)}"
    standard, long = _folders(names, long=False), _folders(names, long=True)
    numbers = [int(variant.removeprefix("gen")) for variants in standard.values() for variant in variants]
    generations = max(numbers) + 1 if expected.generations is None else expected.generations
    yield from _set_faults(standard, [f"gen{n}" for n in range(generations)], expected.scenes, "scenes")
    if long:
        yield from _set_faults(long, WEATHERS, expected.long_scenes, "long scenes")
        yield from (
            f"{token}_sunny: the standard set has no such scene, with whose frames it must start"
            for token in long
            if token not in standard
        )


Folders = dict[str, dict[str, set[str]]]  # files by variant by token


def _folders(names: Sequence[VideoName], *, long: bool) -> Folders:
    folders: Folders = defaultdict(lambda: defaultdict(set))
    for name in names:
        if name.long == long:
            folders[name.token][name.variant].add(name.file)
    return folders


def _set_faults(folders: Folders, wanted: Sequence[str], scenes: int | None, what: str) -> Iterator[str]:
    if scenes is not None and len(folders) != scenes:
        yield f"{len(folders)} {what}, {scenes} expected"
    for token, variants in sorted(folders.items()):
        yield from (f"{token}_{variant}: missing" for variant in wanted if variant not in variants)
        yield from (f"{token}_{variant}: one generation too many" for variant in sorted(set(variants) - set(wanted)))
        right = {f"{token}_{view}.mp4": view for view in VIEWS}
        for variant, files in sorted(variants.items()):
            yield from (f"{token}_{variant}: {right[file]} is missing" for file in sorted(set(right) - files))
            yield from (f"{token}_{variant}/{file}: not one of the six views" for file in sorted(files - set(right)))
