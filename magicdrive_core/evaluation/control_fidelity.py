"""Whether the conditions rule the pictures: a generated city's validation clips against an exact drawing of each scene.

The measure is that of ``fidelity.py``; of each clip the first frame counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from magicdrive_core.config.schema import Config, parse_size
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.data.map_cache import BevMaps
from magicdrive_core.data.pictures import read_picture
from magicdrive_core.data.records import Scene
from magicdrive_core.data.scene_store import Scenes
from magicdrive_core.encoders.vae import Vae, to_video
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.evaluation.region_classifier import ColourRule, Frame
from magicdrive_core.geometry.cameras import VIEWS, Framing
from magicdrive_core.synthetic.light import Light, light_of
from magicdrive_core.synthetic.regions import Region, RegionPainter
from magicdrive_core.utils.files import atomic_file, read_json
from magicdrive_core.utils.progress import track
from magicdrive_core.video.colour import Picture
from magicdrive_core.video.frames import read_view
from magicdrive_core.video.item_record import ItemRecord
from magicdrive_core.video.scene_views import SceneViews
from magicdrive_core.video.sheets import contact_sheet, six_views

RULE_SCENES = 24  # of training, from which the colours of regions are learned
SHEET_SCENES, SHEET_VIEW = 3, 200  # in the sheet, and pixels of a view there


@dataclass(frozen=True)
class Control:
    """What a generated city's validation scenes truly show.

    Raises:
        MagicDriveError: infos, pictures or tables are missing, or do not fit together.
    """

    config: Config
    project: Path = Path()

    @property
    def framing(self) -> Framing:
        """Of the frames that are compared: those that the network makes."""
        return Framing(*parse_size(self.config.generate.resolution))

    @cached_property
    def scenes(self) -> list[Scene]:
        """For validation."""
        return [scene for scene in self._all if scene.split in ("val", "both")]

    @cached_property
    def truth(self) -> list[list[Frame]]:
        """Of each validation scene its first frame, view by view."""
        return [self._frames(scene) for scene in track(self.scenes, "exact regions")]

    @cached_property
    def rule(self) -> ColourRule:
        """Learned from first frames of training scenes, spread evenly: as rendered and as the VAE gives them back."""
        train = [scene for scene in self._all if scene.split in ("train", "both")]
        chosen = np.linspace(0, len(train) - 1, min(RULE_SCENES, len(train))).round().astype(int)
        frames = [frame for index in track(chosen, "colours of regions") for frame in self._frames(train[index])]
        softened = self.reconstructed([frame.picture for frame in frames])
        both = frames + [replace(frame, picture=soft) for frame, soft in zip(frames, softened, strict=True)]
        return ColourRule.learn(both)

    @cached_property
    def others(self) -> list[int]:
        """For each validation scene the number of the one that stands for "another".

        Raises:
            MagicDriveError: a light has one validation scene only.
        """
        try:
            return next_of_light([light_of(scene.description) for scene in self.scenes])
        except ValueError as error:
            raise MagicDriveError(f"{error}", "name more scenes in data.val_scenes, or: magicdrive use learn") from None

    def compare(
        self, generated: Path, untrained: Path, exchanged: Mapping[str, Sequence[Picture]]
    ) -> dict[str, Fidelity]:
        """The table: what was generated, between what is best and what comes without reading conditions.

        Args:
            generated: folder of the items of the trained network.
            untrained: of the same clips by its initial weights.
            exchanged: by condition, the same clips told that one of another clip, as ``draw_exchanged`` gives them.

        Raises:
            MagicDriveError: an item is missing, or a light has one validation scene only.
        """
        others = [frame for other in self.others for frame in self.truth[other]]
        truth = [frame for frames in self.truth for frame in frames]
        rendered = [frame.picture for frame in truth]
        drawn = self.items(generated)
        return {
            "rendered": measure(self.rule, rendered, truth),
            "through the VAE": measure(self.rule, self.reconstructed(rendered), truth),
            "generated": measure(self.rule, drawn, truth),
            **{
                f"told another clip's {what}": measure(self.rule, pictures, truth)
                for what, pictures in exchanged.items()
            },
            "generated, judged by another clip": measure(self.rule, drawn, others),
            "rendered, judged by another clip": measure(self.rule, rendered, others),
            "untrained": measure(self.rule, self.items(untrained), truth),
        }

    def items(self, folder: Path) -> list[Picture]:
        """The first frames of the first generation of every validation scene, view by view, as the network made them.

        Raises:
            MagicDriveError: an item is missing, or its files are.
        """
        records = {path.parent: ItemRecord.read(path.parent) for path in sorted(folder.glob("*/item.json"))}
        by_scene = {record.scene: (path, record) for path, record in records.items() if record.generation == 0}
        missing = [scene.name for scene in self.scenes if scene.token not in by_scene]
        if missing:
            raise MagicDriveError(
                f"{folder} lacks {len(missing)} of {len(self.scenes)} scenes, {missing[0]} first",
                "python -m flows.generate",
            )
        found = [by_scene[scene.token] for scene in self.scenes]
        return [self._first(path / record.views[view].file) for path, record in found for view in VIEWS]

    def reconstructed(self, pictures: Sequence[Picture]) -> list[Picture]:
        """Pictures (H, W, 3) after the VAE's encoder and decoder: what no network that draws latents can surpass."""
        facts = read_json(self.project / "artifacts/encoders/encoders.json")["vae"]
        vae = Vae.load(
            self.project / facts["path"],
            scaling_factor=facts["scaling_factor"],
            chunk_frames=self.config.vae.chunk_frames,
        )
        out: list[Picture] = []
        for picture in pictures:
            latents = vae.latents(vae.moments(to_video(np.array(picture)[None, None])))
            out += [chunk[0, 0] for chunk in vae.decode(latents)]
        return out

    def write_sheet(self, generated: Path, untrained: Path, path: Path, chosen: Sequence[int] | None = None) -> None:
        """A picture: scenes as rows, by default one of each light; rendered, conditions, generated, untrained."""
        if chosen is None:
            lights = [frames[0].light for frames in self.truth]
            chosen = sorted({light: lights.index(light) for light in lights}.values())[:SHEET_SCENES]
        drawn, noise = self.items(generated), self.items(untrained)
        views, rows = len(VIEWS), []
        for index in chosen:
            scene = self.scenes[index]
            bits = BevMaps(self.config, self.project).of_scene(scene, self.config.generate.resolution, draw=False)
            scene_views = SceneViews(scene, bits, self.project / self.config.data.root, SHEET_VIEW)
            told = scene_views.conditions(0)[:, scene_views.framing.crop :]
            some = slice(index * views, (index + 1) * views)
            real = [frame.picture for frame in self.truth[index]]
            columns = [np.stack(real), told, np.stack(drawn[some]), np.stack(noise[some])]
            rows.append([six_views(column, SHEET_VIEW, captions=False) for column in columns])
        labels = [self.scenes[index].name for index in chosen]
        sheet = contact_sheet(rows, labels, ["rendered", "conditions", "generated", "untrained"])
        with atomic_file(path) as partial:
            Image.fromarray(sheet).save(partial, format="PNG")

    @cached_property
    def _all(self) -> Scenes:
        return read_scenes(self.project / "artifacts/infos")

    @cached_property
    def _painter(self) -> RegionPainter:
        return RegionPainter(self.project / self.config.data.root, self.config.data.version)

    def _frames(self, scene: Scene) -> list[Frame]:
        root, light = self.project / self.config.data.root, light_of(scene.description)
        return [
            Frame(light, read_picture(root / path, self.framing), self._painter.of_frame(path, self.framing))
            for path in scene.pictures[0]
        ]

    def _first(self, path: Path) -> Picture:
        """The first frame of a generated view's file, at the size at which it was made."""
        if path.suffix == ".png":
            return read_picture(path, self.framing)
        size = self.framing.resized_height, self.framing.width
        return next(read_view(path, size))[self.framing.crop :]


# Control fidelity on the generated city: whether roads, marks and vehicles are where the conditions put them.
#
# Pictures are cut into regions by their colours (``colour_rule.py``), rendered and generated ones the same way, and
# compared with the regions that an exact drawing of the scene has (``data/synthetic/regions.py``). A number means
# nothing alone: rendered pictures show what the rule can tell at best, the VAE's reconstructions what any network
# could reach, an untrained network and the exact regions of *other* clips of the same light what comes without
# reading conditions. Clips that are told the map, the boxes or the text of such another clip show which condition a
# region is drawn by.

# What stands out from its surroundings wherever it is, and pixels a side of the kernel that widens it to them.
STANDS_OUT, RING = (Region.MARK, Region.VEHICLE), 5


@dataclass(frozen=True)
class Fidelity:
    """How well pictures agree with what is true.

    Attributes:
        iou: by region, intersection over union, both summed over all pictures; NaN where neither shows the region.
        contrast: of marks and of vehicles, how much likelier than its surroundings the place of one looks like one, by
            its colours: 1 at best, 0 where they are drawn regardless of their places, NaN where there are none. It sees
            faint marks, too, which IoU does not count.
        psnr: dB against the rendered pictures.
    """

    iou: dict[Region, float]
    contrast: dict[Region, float]
    psnr: float

    def row(self) -> dict[str, float]:
        """All figures by name."""
        values = {region.name.lower(): value for region, value in self.iou.items()}
        contrasts = {f"{region.name.lower()}_contrast": value for region, value in self.contrast.items()}
        return {**values, **contrasts, "psnr": self.psnr}


def measure(rule: ColourRule, pictures: Sequence[Picture], truth: Sequence[Frame]) -> Fidelity:
    """Compares pictures (H, W, 3) with what is true of them, in the same order.

    Raises:
        ValueError: another number or size of pictures than of truths.
    """
    hits, either = np.zeros(len(Region)), np.zeros(len(Region))
    inside: dict[Region, list[NDArray[np.float32]]] = {region: [] for region in STANDS_OUT}
    around: dict[Region, list[NDArray[np.float32]]] = {region: [] for region in STANDS_OUT}
    squares = 0.0
    for picture, frame in zip(pictures, truth, strict=True):
        if picture.shape != frame.picture.shape:
            raise ValueError(f"a picture of {picture.shape} for a truth of {frame.picture.shape}")
        shares = rule.shares(frame.light, picture)
        found = shares.argmax(axis=-1)
        for region in Region:
            mine, true = found == region, frame.regions == region
            hits[region] += (mine & true).sum()
            either[region] += (mine | true).sum()
        for region in STANDS_OUT:
            place = frame.regions == region
            widened = cv2.dilate(place.astype(np.uint8), np.ones((RING, RING), np.uint8)) > 0
            inside[region].append(shares[place, region])
            around[region].append(shares[widened & ~place, region])
        squares += float(np.square(picture.astype(np.float64) - frame.picture).mean())
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = hits / either
        psnr = 10 * np.log10(255**2 * len(pictures) / squares) if squares else np.inf
    contrast = {region: _mean(inside[region]) - _mean(around[region]) for region in STANDS_OUT}
    return Fidelity({region: float(iou[region]) for region in Region}, contrast, float(psnr))


def _mean(shares: Sequence[NDArray[np.float32]]) -> float:
    joined = np.concatenate(shares)
    return float(joined.mean()) if len(joined) else float("nan")


def next_of_light(lights: Sequence[Light]) -> list[int]:
    """For each scene the next one in the same light, so that light alone tells nothing.

    Raises:
        ValueError: a light has one scene only.
    """
    by_light: dict[Light, list[int]] = {}
    for index, light in enumerate(lights):
        by_light.setdefault(light, []).append(index)
    if any(len(members) < 2 for members in by_light.values()):
        raise ValueError("every light needs two scenes, so that their conditions can be exchanged")
    following = {m: members[(i + 1) % len(members)] for members in by_light.values() for i, m in enumerate(members)}
    return [following[index] for index in range(len(lights))]


def table_lines(rows: dict[str, Fidelity]) -> list[str]:
    """The comparison as lines of text: IoU of each region in percent, contrast in percent, PSNR in dB."""
    names = list(next(iter(rows.values())).row())
    label_width, widths = max(map(len, rows)), {name: max(10, len(name) + 2) for name in names}
    lines = [" " * label_width + "".join(f"{name:>{widths[name]}}" for name in names)]
    for label, fidelity in rows.items():
        values = fidelity.row()
        cells = (f"{values[name] * (1 if name == 'psnr' else 100):>{widths[name]}.1f}" for name in names)
        lines.append(f"{label:{label_width}}" + "".join(cells))
    return lines
