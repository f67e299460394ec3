"""Control fidelity: whether generated videos show roads, marks and vehicles where their conditions put them.

Only a generated city can be measured, because its regions and its geometry are known exactly. A small classifier finds
the regions of rendered and of generated pictures by their colours, and these are compared with the exact ones. A figure
means nothing alone. Its upper bounds are rendered videos (the classifier's limit) and videos that passed through the
VAE (the limit of any network on its latents); its lower bounds are an untrained network and the regions of another clip
of the same light. Condition swaps show which condition the network takes a region from: the clips are generated again
with the map, the boxes or the text of another clip. The same videos are compared with themselves, in time and between
cameras, by the exact correspondence of their pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from magicdrive_core.config.schema import Config, parse_size
from magicdrive_core.data.edits import Edits
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.data.map_cache import BevMaps
from magicdrive_core.data.pictures import read_clip, read_picture
from magicdrive_core.data.records import Clip, Scene
from magicdrive_core.data.scene_store import Scenes
from magicdrive_core.encoders.vae import Vae, to_video
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.evaluation.condition_swap import Video
from magicdrive_core.evaluation.consistency import Agreement, AgreementTally
from magicdrive_core.evaluation.edit_response import EditPlanner, Response, ResponseTally
from magicdrive_core.evaluation.region_classifier import Frame, RegionClassifier
from magicdrive_core.evaluation.region_fidelity import Fidelity, FidelityTally
from magicdrive_core.geometry.cameras import VIEWS, Framing, ring_neighbours
from magicdrive_core.inference.items import Item, list_items
from magicdrive_core.synthetic.light import light_of
from magicdrive_core.synthetic.regions import RegionPainter, regions_of
from magicdrive_core.synthetic.surfaces import Correspondence, Surfaces, correspond
from magicdrive_core.utils.files import atomic_file, read_json
from magicdrive_core.utils.progress import track
from magicdrive_core.video.colour import Picture
from magicdrive_core.video.frames import read_view
from magicdrive_core.video.item_record import ItemRecord
from magicdrive_core.video.scene_views import SceneViews
from magicdrive_core.video.sheets import contact_sheet, resize, six_views

CLASSIFIER_CLIPS, CLASSIFIER_FRAMES = 24, 9  # training clips from which the colours of regions are learned
GOLDEN = 0.618  # spreads their starts over the scenes
EVERY = 3  # a frame is measured in so many; an odd number, as four frames share a latent one
SHEET_SCENES, SHEET_FRAMES, SHEET_VIEW = 3, 3, 200  # of the contact sheet: scenes, frames, and pixels of a view
EDITED_VIEW = 400  # pixels of a view in the sheet of edits
RENDERED, RECONSTRUCTED, GENERATED, UNTRAINED = "rendered", "through the VAE", "generated", "untrained"

Draw = Callable[[Scene], Video]  # the written frames of a scene's clip


@dataclass(frozen=True)
class Comparison:
    """Figures of videos by the label of their row.

    Attributes:
        regions: Agreement with the exact regions.
        time: Agreement of each frame with the one before, along the exact flow.
        views: Agreement of each view with its right neighbour at the same time.
    """

    regions: dict[str, Fidelity]
    time: dict[str, Agreement]
    views: dict[str, Agreement]

    def consistency(self, label: str) -> dict[str, float]:
        """Collect the consistency of a row by name.

        Args:
            label: The row.

        Returns:
            For "time" and "views": "_error" in grey levels, "_ratio" of it to that of the rendered videos, and
            "_structure".
        """
        out = {}
        for name, rows in (("time", self.time), ("views", self.views)):
            agreement, real = rows[label], rows[RENDERED].error
            out[f"{name}_error"] = agreement.error
            out[f"{name}_ratio"] = agreement.error / real if real else float("nan")
            out[f"{name}_structure"] = agreement.structure
        return out


@dataclass(frozen=True)
class _Moment:
    """The exact truth of one frame: regions of its views, and where their pixels are in other pictures."""

    frame: int  # of the scene
    truth: list[Frame]  # by view
    before: list[Correspondence]  # by view, in the frame before; empty for the first frame of the clip
    beside: list[Correspondence]  # by view, in its right neighbour


@dataclass(frozen=True)
class ControlFidelity:
    """Measures control fidelity on the validation scenes of a generated city.

    Attributes:
        config: All settings.
        project: The project's folder.
        every: One frame in so many is measured, from the first one on.
        clips: Number of validation scenes that are measured, of all lights in turn; None: all.

    Raises:
        MagicDriveError: Infos, pictures or tables are missing or do not fit together.
    """

    config: Config
    project: Path = Path()
    every: int = EVERY
    clips: int | None = None

    @property
    def framing(self) -> Framing:
        """Size and crop of the compared frames: those of the network's frames."""
        return Framing(*parse_size(self.config.generate.resolution))

    @cached_property
    def scenes(self) -> list[Scene]:
        """The measured validation scenes (split "val" or "both"): all, or the first ``clips`` with lights in turn."""
        chosen = [scene for scene in self._all if scene.split in ("val", "both")]
        if self.clips is None:
            return chosen
        by_light: dict[Hashable, list[Scene]] = {}
        for scene in chosen:
            by_light.setdefault(light_of(scene.description), []).append(scene)
        in_turn = (scene for scenes in zip_longest(*by_light.values()) for scene in scenes if scene is not None)
        return list(islice(in_turn, self.clips))

    @cached_property
    def items(self) -> dict[str, Item]:
        """The first generation of each measured scene's clip, by the scene's token."""
        listed = list_items(self.config, self.scenes, self.project)
        return {item.clip.scene: item for item in listed if item.generation == 0}

    @cached_property
    def classifier(self) -> RegionClassifier:
        """The classifier, trained on frames of training scenes, as rendered and as reconstructed by the VAE."""
        train = [scene for scene in self._all if scene.split in ("train", "both")]
        chosen: dict[tuple[int, int, int, range], None] = {}  # scene, first frame and frames of a clip, views
        for number, index in enumerate(np.linspace(0, len(train) - 1, CLASSIFIER_CLIPS).round().astype(int)):
            frames = min(CLASSIFIER_FRAMES, (len(train[index]) - 1) // 8 * 8 + 1)
            start = int(number * GOLDEN % 1 * (len(train[index]) - frames + 1))
            views = range(len(VIEWS)) if frames == 1 else range(number % 2, len(VIEWS), 2)  # six pictures a clip
            chosen[int(index), start, frames, views] = None
        learned: list[Frame] = []
        for index, start, frames, views in track(chosen, "colours of regions"):
            scene, clip = train[index], self._clip(train[index], start, frames, views)
            softened = self.reconstructed(clip)
            for at in sorted({0, frames - 1}):
                surfaces = [self.painter.surfaces(scene.pictures[start + at][view]) for view in views]
                for pictures in (clip, softened):
                    learned += self._truth(scene, pictures[:, at], surfaces)
        return RegionClassifier.learn(learned)

    @cached_property
    def others(self) -> dict[str, Scene]:
        """For each measured scene, by its token, the one that serves as "another clip".

        It is the next validation scene of the same light whose clip is as long (``next_alike``).

        Raises:
            MagicDriveError: Only one validation scene has a certain light.
        """
        scenes = [scene for scene in self._all if scene.split in ("val", "both")]
        frames = {item.clip.scene: item.clip.frames for item in list_items(self.config, scenes, self.project)}
        try:
            following = next_alike([(light_of(scene.description), frames[scene.token]) for scene in scenes])
        except ValueError:
            raise MagicDriveError(
                "each light needs two validation scenes of one length, so that their conditions can be swapped",
                "add scenes to data.val_scenes, or run: magicdrive use learn",
            ) from None
        return {scene.token: scenes[other] for scene, other in zip(scenes, following, strict=True)}

    def compare(self, drawn: Mapping[str, Draw]) -> Comparison:
        """Measure videos, and their upper and lower bounds.

        Args:
            drawn: By the label of the row, what makes the video of a scene; ``GENERATED`` is one of them.

        Returns:
            The figures of "rendered", "through the VAE", the drawn ones in their order, and of the generated and
            rendered ones with the regions of another clip.

        Raises:
            MagicDriveError: An item is missing, or only one validation scene has a certain light.
        """
        labels = [RENDERED, RECONSTRUCTED, *drawn]
        regions = {label: FidelityTally(self.classifier) for label in labels}
        elsewhere = {label: FidelityTally(self.classifier) for label in (GENERATED, RENDERED)}
        time, views = ({label: AgreementTally() for label in labels} for _ in range(2))
        for scene in track(self.scenes, "control fidelity"):
            real = self.rendered(scene)
            videos = {RENDERED: real, RECONSTRUCTED: self.reconstructed(real)}
            videos |= {label: draw(scene) for label, draw in drawn.items()}
            other = self.others[scene.token]
            for moment in self._moments(scene, real):
                now, neighbours = moment.frame, ring_neighbours(len(VIEWS))
                for view, truth in enumerate(moment.truth):
                    for label, video in videos.items():
                        regions[label].add(video[view, now], truth)
                        views[label].add(video[view, now], video[neighbours[view][1], now], moment.beside[view])
                        if moment.before:
                            time[label].add(video[view, now], video[view, now - 1], moment.before[view])
                theirs = self._truth(other, self._clip(other, now, 1)[:, 0], self._surfaces(other, now))
                for view, truth in enumerate(theirs):
                    for label, tally in elsewhere.items():
                        tally.add(videos[label][view, now], truth)
        figures = {label: tally.figures() for label, tally in regions.items()}
        figures |= {f"{label}, compared with another clip": tally.figures() for label, tally in elsewhere.items()}
        return Comparison(
            figures,
            {label: tally.figures() for label, tally in time.items()},
            {label: tally.figures() for label, tally in views.items()},
        )

    def respond(
        self, generated: Draw, edited: Callable[[Scene, Edits], Video], sheet: Path | None = None
    ) -> dict[str, Response]:
        """Measure what edits of the scenes change.

        Args:
            generated: Makes the video of a scene without edits.
            edited: Makes the video of a scene with edits from the same noise.
            sheet: A PNG to write, with the first edits of each kind where they are seen best; None: no picture.

        Returns:
            The response by kind of edit; a kind that no scene allows is missing.

        Raises:
            MagicDriveError: An item is missing.
        """
        planner, tally = EditPlanner(self.painter, self.framing), ResponseTally(self.classifier)
        rows: dict[str, list[list[Picture]]] = {}
        for scene in track(self.scenes, "response to edits"):
            frames = list(self.measured_frames(scene))
            before = generated(scene)[:, frames]
            for case in planner.cases(scene, frames):
                after = edited(scene, case.edits)[:, frames]
                tally.add(case, light_of(scene.description), before, after)
                at = case.best_seen
                pictures = [resize(video[at], EDITED_VIEW) for video in (*case.rendered, before, after)]
                rows.setdefault(case.kind, []).append(pictures)
        if sheet is not None and rows:
            shown = [(kind, row) for kind in rows for row in rows[kind][:SHEET_SCENES]]
            titles = [f"{label}, {state}" for label in (RENDERED, GENERATED) for state in ("before", "after")]
            picture = contact_sheet([row for _, row in shown], [kind for kind, _ in shown], titles)
            with atomic_file(sheet) as partial:
                Image.fromarray(picture).save(partial, format="PNG")
        return tally.figures()

    def measured_frames(self, scene: Scene) -> range:
        """List the measured frames of a scene.

        Args:
            scene: A measured scene.

        Returns:
            Indices of frames of the scene's clip.
        """
        return range(0, self.items[scene.token].kept, self.every)

    def rendered(self, scene: Scene) -> Video:
        """Read the rendered pictures of a scene's clip, with the frames that are generated and not written.

        Args:
            scene: A measured scene.

        Returns:
            The frames (V, F, H, W, 3) at the network's size.
        """
        clip = self.items[scene.token].clip
        return self._clip(scene, clip.start, clip.frames)

    def reconstructed(self, video: Video) -> Video:
        """Pass a video through the VAE: no network on its latents can do better.

        Args:
            video: Frames (V, F, H, W, 3), uint8; F is 8n+1.

        Returns:
            The decoded frames (V, F, H, W, 3).

        Raises:
            MagicDriveError: ``artifacts/encoders`` is missing.
        """
        out = []
        for view in video:
            latents = self._vae.latents(self._vae.moments(to_video(view[None])))
            out.append(np.concatenate([group[0] for group in self._vae.decode(latents)]))
        return np.stack(out)

    def read_item(self, folder: Path, scene: Scene) -> Video:
        """Read the first generation of a scene's clip.

        Args:
            folder: Folder of items.
            scene: A measured scene.

        Returns:
            The written frames (V, F, H, W, 3) at the network's size.

        Raises:
            MagicDriveError: The item or one of its files is missing, or has other frames.
        """
        item = self.items[scene.token]
        if not (folder / item.name / "item.json").is_file():
            raise MagicDriveError(f"{folder}: {scene.name} is missing", "python -m flows.generate")
        record = ItemRecord.read(folder / item.name)
        if record.frames != item.kept:
            raise MagicDriveError(
                f"{folder / item.name} has {record.frames} frames, not {item.kept}", "python -m flows.generate"
            )
        return np.stack([list(self._frames(folder / item.name / record.views[view].file)) for view in VIEWS])

    def sheet_scenes(self, chosen: Sequence[int] | None = None) -> list[Scene]:
        """Choose the scenes of the contact sheet.

        Args:
            chosen: Indices in ``scenes``; None: the first scene of each light, ``SHEET_SCENES`` at most.

        Returns:
            The scenes in the order of the sheet.
        """
        if chosen is None:
            lights = [light_of(scene.description) for scene in self.scenes]
            chosen = sorted({light: lights.index(light) for light in lights}.values())[:SHEET_SCENES]
        return [self.scenes[index] for index in chosen]

    def write_sheet(self, scenes: Sequence[Scene], drawn: Mapping[str, Draw], path: Path) -> None:
        """Write a contact sheet: rows of scenes over time; rendered, conditions, and what was drawn.

        Args:
            scenes: The scenes, see ``sheet_scenes``.
            drawn: By the label of the column, what makes the video of a scene.
            path: The PNG to write.

        Raises:
            MagicDriveError: An item is missing, or the cached map of a scene is missing or broken.
        """
        rows, labels = [], []
        for scene in scenes:
            bits = BevMaps(self.config, self.project).of_scene(scene, self.config.generate.resolution, draw=False)
            scene_views = SceneViews(scene, bits, self.project / self.config.data.root, SHEET_VIEW)
            real, videos = self.rendered(scene), [draw(scene) for draw in drawn.values()]
            frames = self.measured_frames(scene)
            for at in sorted({int(at) for at in np.linspace(0, len(frames) - 1, SHEET_FRAMES).round()}):
                frame = frames[at]
                conditions = scene_views.conditions(frame)[:, scene_views.framing.crop :]
                columns = [real[:, frame], conditions, *(video[:, frame] for video in videos)]
                rows.append([six_views(column, SHEET_VIEW, captions=False) for column in columns])
                seconds = (scene.timestamps[frame] - scene.timestamps[0]) / 1e6
                labels.append(f"{scene.name}, {seconds:.1f} s")
        sheet = contact_sheet(rows, labels, [RENDERED, "conditions", *drawn])
        with atomic_file(path) as partial:
            Image.fromarray(sheet).save(partial, format="PNG")

    @cached_property
    def painter(self) -> RegionPainter:
        """Draws the exact truth of the data root's pictures."""
        return RegionPainter(self.project / self.config.data.root, self.config.data.version)

    @cached_property
    def _all(self) -> Scenes:
        return read_scenes(self.project / "artifacts/infos")

    @cached_property
    def _vae(self) -> Vae:
        facts = read_json(self.project / "artifacts/encoders/encoders.json")["vae"]
        return Vae.load(
            self.project / facts["path"],
            scaling_factor=facts["scaling_factor"],
            chunk_frames=self.config.vae.chunk_frames,
        )

    def _clip(self, scene: Scene, start: int, frames: int, views: Sequence[int] = range(len(VIEWS))) -> Video:
        clip, size = Clip(scene.token, start, frames), self.config.generate.resolution
        scaled = self.config.latents.scaled_decoding  # as the network saw them in training
        return read_clip(self.project / self.config.data.root, scene, clip, size, scaled=scaled, views=views)

    def _surfaces(self, scene: Scene, frame: int) -> list[Surfaces]:
        return [self.painter.surfaces(path) for path in scene.pictures[frame]]

    def _truth(self, scene: Scene, pictures: NDArray[np.uint8], surfaces: Sequence[Surfaces]) -> list[Frame]:
        """Return pictures (V, H, W, 3) of a frame with their exact regions."""
        light = light_of(scene.description)
        return [
            Frame(light, picture, regions_of(drawn, self.framing))
            for picture, drawn in zip(pictures, surfaces, strict=True)
        ]

    def _moments(self, scene: Scene, real: Video) -> Iterator[_Moment]:
        """Yield the truth of each measured frame of a scene with the rendered video ``real``."""
        last: tuple[int, list[Surfaces]] = -1, []
        for frame in self.measured_frames(scene):
            now = self._surfaces(scene, frame)
            before = last[1] if last[0] == frame - 1 else self._surfaces(scene, frame - 1) if frame else []
            yield _Moment(
                frame,
                self._truth(scene, real[:, frame], now),
                [correspond(one, other, self.framing) for one, other in zip(now, before, strict=False)],
                [
                    correspond(one, now[right], self.framing)
                    for one, (_, right) in zip(now, ring_neighbours(len(VIEWS)), strict=True)
                ],
            )
            last = frame, now

    def _frames(self, path: Path) -> Iterator[Picture]:
        """Yield the frames of a view's file at the network's size."""
        if path.suffix == ".png":
            yield read_picture(path, self.framing)
            return
        for frame in read_view(path, (self.framing.resized_height, self.framing.width)):
            yield frame[self.framing.crop :]


def next_alike(kinds: Sequence[Hashable]) -> list[int]:
    """Pair each scene with the next one of the same kind, so that its light alone does not give a swap away.

    Args:
        kinds: The kind of each scene: its light and length.

    Returns:
        For each scene, the index of its partner.

    Raises:
        ValueError: Only one scene is of a certain kind.
    """
    by_kind: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(index)
    if any(len(members) < 2 for members in by_kind.values()):
        raise ValueError("each kind needs two scenes")
    following = {m: members[(i + 1) % len(members)] for members in by_kind.values() for i, m in enumerate(members)}
    return [following[index] for index in range(len(kinds))]


def region_lines(rows: Mapping[str, Fidelity]) -> list[str]:
    """Format the table of regions: IoU and contrast in percent, PSNR in dB.

    Args:
        rows: Figures by label (``Comparison.regions``); at least one.

    Returns:
        The heading, a line for each label, and the generated videos' shares of what the VAE leaves, if both are there.
    """
    values = {
        label: {name: value * (1 if name == "psnr" else 100) for name, value in row.row().items()}
        for label, row in rows.items()
    }
    if GENERATED in rows and RECONSTRUCTED in rows:
        shares = rows[GENERATED].shares_of(rows[RECONSTRUCTED])
        values["share of the VAE's"] = {name: 100 * value for name, value in shares.items()}
    return table_lines(values)


def table_lines(rows: Mapping[str, Mapping[str, float]], digits: int = 1) -> list[str]:
    """Format a table of numbers.

    Args:
        rows: Numbers by column by label; the first row has all columns. What a row lacks, or is no number, is a dash.
        digits: Decimal places.

    Returns:
        The heading, then a line for each label.
    """
    names = list(next(iter(rows.values())))
    label_width, widths = max(map(len, rows)), {name: max(10, len(name) + 2) for name in names}
    lines = [" " * label_width + "".join(f"{name:>{widths[name]}}" for name in names)]
    for label, values in rows.items():
        numbers = {name: values.get(name, float("nan")) for name in names}
        cells = ("-" if np.isnan(value) else f"{value:.{digits}f}" for value in numbers.values())
        lines.append(
            f"{label:{label_width}}"
            + "".join(f"{cell:>{widths[name]}}" for name, cell in zip(names, cells, strict=True))
        )
    return lines
