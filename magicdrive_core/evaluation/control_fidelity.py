"""Control fidelity: whether generated pictures show roads, marks and vehicles where their conditions put them.

Only a generated city can be measured, because its regions are known exactly. A small classifier finds the regions of
rendered and of generated pictures by their colours, and these are compared with the exact ones. A figure means nothing
alone. Its upper bounds are rendered pictures (the classifier's limit) and pictures that passed through the VAE (the
limit of any network on its latents); its lower bounds are an untrained network and the regions of another clip of the
same light. Condition swaps show which condition the network takes a region from: the clips are generated again with the
map, the boxes or the text of another clip. The first frame of each clip counts.
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
from magicdrive_core.evaluation.region_classifier import Frame, RegionClassifier
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

CLASSIFIER_SCENES = 24  # training scenes from which the colours of regions are learned
SHEET_SCENES, SHEET_VIEW = 3, 200  # scenes of the contact sheet, and pixels of a view in it
STANDS_OUT = (Region.MARK, Region.VEHICLE)  # regions that differ from what is around them wherever they are
RING = 5  # pixels along each side of the kernel that widens a region to its surroundings


@dataclass(frozen=True)
class Fidelity:
    """Agreement of pictures with the exact regions of their scenes.

    Attributes:
        iou: Intersection over union by region, 0 to 1, both summed over all pictures; NaN where neither side has the
            region.
        contrast: For marks and vehicles: the classifier's mean probability of the region inside it, less that in the
            ring around it. 1 at best, 0 where pictures ignore the positions, NaN without any. Faint marks count, which
            IoU leaves out.
        psnr: dB against the rendered pictures; infinite for equal pictures.
    """

    iou: dict[Region, float]
    contrast: dict[Region, float]
    psnr: float

    def row(self) -> dict[str, float]:
        """Collect all figures by name, in the order of the table's columns.

        Returns:
            IoUs by the region's name in lower case ("road"), contrasts by that name with "_contrast", and "psnr" in dB.
        """
        values = {region.name.lower(): value for region, value in self.iou.items()}
        contrasts = {f"{region.name.lower()}_contrast": value for region, value in self.contrast.items()}
        return {**values, **contrasts, "psnr": self.psnr}


def measure_fidelity(classifier: RegionClassifier, pictures: Sequence[Picture], truth: Sequence[Frame]) -> Fidelity:
    """Compare pictures with the exact regions of their scenes.

    Args:
        classifier: Finds regions by colour.
        pictures: RGB pictures (H, W, 3).
        truth: The exact regions of each picture, in the same order.

    Returns:
        The figures over all pictures together.

    Raises:
        ValueError: Numbers or sizes of pictures and truth differ.
    """
    hits, either = np.zeros(len(Region)), np.zeros(len(Region))
    inside: dict[Region, list[NDArray[np.float32]]] = {region: [] for region in STANDS_OUT}
    around: dict[Region, list[NDArray[np.float32]]] = {region: [] for region in STANDS_OUT}
    squares = 0.0
    for picture, frame in zip(pictures, truth, strict=True):
        if picture.shape != frame.picture.shape:
            raise ValueError(f"the picture has shape {picture.shape}, its truth {frame.picture.shape}")
        shares = classifier.shares(frame.light, picture)
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


@dataclass(frozen=True)
class ControlFidelity:
    """Measures control fidelity on the validation scenes of a generated city.

    Attributes:
        config: All settings.
        project: The project's folder.

    Raises:
        MagicDriveError: Infos, pictures or tables are missing or do not fit together.
    """

    config: Config
    project: Path = Path()

    @property
    def framing(self) -> Framing:
        """Size and crop of the compared frames: those of the network's frames."""
        return Framing(*parse_size(self.config.generate.resolution))

    @cached_property
    def scenes(self) -> list[Scene]:
        """The validation scenes: those whose split is "val" or "both", in the order of the infos."""
        return [scene for scene in self._all if scene.split in ("val", "both")]

    @cached_property
    def truth(self) -> list[list[Frame]]:
        """For each validation scene, picture and exact regions of its first frame, one ``Frame`` for each view."""
        return [self._frames(scene) for scene in track(self.scenes, "exact regions")]

    @cached_property
    def classifier(self) -> RegionClassifier:
        """The classifier, trained on first frames of training scenes, as rendered and as reconstructed by the VAE."""
        train = [scene for scene in self._all if scene.split in ("train", "both")]
        chosen = np.linspace(0, len(train) - 1, min(CLASSIFIER_SCENES, len(train))).round().astype(int)
        frames = [frame for index in track(chosen, "colours of regions") for frame in self._frames(train[index])]
        softened = self.reconstructed([frame.picture for frame in frames])
        both = frames + [replace(frame, picture=soft) for frame, soft in zip(frames, softened, strict=True)]
        return RegionClassifier.learn(both)

    @cached_property
    def others(self) -> list[int]:
        """For each validation scene, the index in ``scenes`` of the one that serves as "another clip".

        It is the next validation scene of the same light (``next_of_light``).

        Raises:
            MagicDriveError: Only one validation scene has a certain light.
        """
        try:
            return next_of_light([light_of(scene.description) for scene in self.scenes])
        except ValueError as error:
            raise MagicDriveError(f"{error}", "add scenes to data.val_scenes, or run: magicdrive use learn") from None

    def compare(
        self, generated: Path, untrained: Path, swapped: Mapping[str, Sequence[Picture]]
    ) -> dict[str, Fidelity]:
        """Measure generated pictures, their upper and lower bounds, and condition swaps.

        Args:
            generated: Folder of the trained network's items.
            untrained: Folder of the items of the network's initial weights.
            swapped: By condition, pictures (H, W, 3) of the same clips with that condition of another clip, in the
                order of ``items`` (``draw_swapped``).

        Returns:
            The rows of the table by label, in the order in which they are printed.

        Raises:
            MagicDriveError: An item is missing, or only one validation scene has a certain light.
        """
        others = [frame for other in self.others for frame in self.truth[other]]
        truth = [frame for frames in self.truth for frame in frames]
        rendered = [frame.picture for frame in truth]
        drawn = self.items(generated)
        return {
            "rendered": measure_fidelity(self.classifier, rendered, truth),
            "through the VAE": measure_fidelity(self.classifier, self.reconstructed(rendered), truth),
            "generated": measure_fidelity(self.classifier, drawn, truth),
            **{
                f"condition swap: {what} of another clip": measure_fidelity(self.classifier, pictures, truth)
                for what, pictures in swapped.items()
            },
            "generated, compared with another clip": measure_fidelity(self.classifier, drawn, others),
            "rendered, compared with another clip": measure_fidelity(self.classifier, rendered, others),
            "untrained": measure_fidelity(self.classifier, self.items(untrained), truth),
        }

    def items(self, folder: Path) -> list[Picture]:
        """Read the first frame of each validation scene's first generation.

        Args:
            folder: Folder of items.

        Returns:
            RGB pictures (H, W, 3) at the network's size, view by view: V of the first scene, then V of the second.

        Raises:
            MagicDriveError: An item or one of its files is missing.
        """
        records = {path.parent: ItemRecord.read(path.parent) for path in sorted(folder.glob("*/item.json"))}
        by_scene = {record.scene: (path, record) for path, record in records.items() if record.generation == 0}
        missing = [scene.name for scene in self.scenes if scene.token not in by_scene]
        if missing:
            raise MagicDriveError(
                f"{folder}: {len(missing)} of {len(self.scenes)} scenes are missing, the first is {missing[0]}",
                "python -m flows.generate",
            )
        found = [by_scene[scene.token] for scene in self.scenes]
        return [self._first(path / record.views[view].file) for path, record in found for view in VIEWS]

    def reconstructed(self, pictures: Sequence[Picture]) -> list[Picture]:
        """Pass pictures through the VAE: no network on its latents can do better.

        Args:
            pictures: uint8 RGB pictures (H, W, 3); each is a video of one frame.

        Returns:
            The decoded pictures (H, W, 3), in the same order.

        Raises:
            MagicDriveError: ``artifacts/encoders`` is missing.
        """
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
        """Write a contact sheet: a row for each scene; rendered, conditions, generated, untrained.

        Args:
            generated: Folder of the trained network's items.
            untrained: Folder of the untrained network's items.
            path: The PNG to write.
            chosen: Indices in ``scenes``; None: the first scene of each light, ``SHEET_SCENES`` at most.

        Raises:
            MagicDriveError: An item is missing, or the cached map of a scene is missing or broken.
        """
        if chosen is None:
            lights = [frames[0].light for frames in self.truth]
            chosen = sorted({light: lights.index(light) for light in lights}.values())[:SHEET_SCENES]
        drawn, noise = self.items(generated), self.items(untrained)
        views, rows = len(VIEWS), []
        for index in chosen:
            scene = self.scenes[index]
            bits = BevMaps(self.config, self.project).of_scene(scene, self.config.generate.resolution, draw=False)
            scene_views = SceneViews(scene, bits, self.project / self.config.data.root, SHEET_VIEW)
            conditions = scene_views.conditions(0)[:, scene_views.framing.crop :]
            some = slice(index * views, (index + 1) * views)
            real = [frame.picture for frame in self.truth[index]]
            columns = [np.stack(real), conditions, np.stack(drawn[some]), np.stack(noise[some])]
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
        """Read the first frame of a view's file at the network's size."""
        if path.suffix == ".png":
            return read_picture(path, self.framing)
        size = self.framing.resized_height, self.framing.width
        return next(read_view(path, size))[self.framing.crop :]


def next_of_light(lights: Sequence[Light]) -> list[int]:
    """Pair each scene with the next one of the same light, so that light alone does not give a swap away.

    Args:
        lights: The light of each scene.

    Returns:
        For each scene, the index of its partner.

    Raises:
        ValueError: Only one scene has a certain light.
    """
    by_light: dict[Light, list[int]] = {}
    for index, light in enumerate(lights):
        by_light.setdefault(light, []).append(index)
    if any(len(members) < 2 for members in by_light.values()):
        raise ValueError("each light needs two scenes, so that their conditions can be swapped")
    following = {m: members[(i + 1) % len(members)] for members in by_light.values() for i, m in enumerate(members)}
    return [following[index] for index in range(len(lights))]


def table_lines(rows: dict[str, Fidelity]) -> list[str]:
    """Format the table: IoU and contrast of regions in percent, PSNR in dB.

    Args:
        rows: Figures by label (``ControlFidelity.compare``); at least one.

    Returns:
        The heading, then a line for each label.
    """
    names = list(next(iter(rows.values())).row())
    label_width, widths = max(map(len, rows)), {name: max(10, len(name) + 2) for name in names}
    lines = [" " * label_width + "".join(f"{name:>{widths[name]}}" for name in names)]
    for label, fidelity in rows.items():
        values = fidelity.row()
        cells = (f"{values[name] * (1 if name == 'psnr' else 100):>{widths[name]}.1f}" for name in names)
        lines.append(f"{label:{label_width}}" + "".join(cells))
    return lines
