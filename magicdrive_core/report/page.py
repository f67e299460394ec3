"""The report, ``report.html``: one self-contained page with videos, conditions, scores, losses and lineage."""

from __future__ import annotations

import base64
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from numpy.typing import NDArray
from PIL import Image

from magicdrive_core.config.schema import Config
from magicdrive_core.data.edits import chosen_edits, edit_scene
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.data.map_cache import BevMaps
from magicdrive_core.data.records import CLASSES, MAP_LAYERS, Scene
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.evaluation.score_sheet import Sheet
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.report.loss_curves import Curve
from magicdrive_core.report.score_table import ScoreTable, order_scenes
from magicdrive_core.utils.files import atomic_file, file_name
from magicdrive_core.utils.progress import track
from magicdrive_core.video.colour import Picture
from magicdrive_core.video.encoder import encode_video
from magicdrive_core.video.item_record import ItemRecord, read_items
from magicdrive_core.video.palette import CLASS_COLOURS, LAYER_COLOURS
from magicdrive_core.video.scene_views import SceneViews, Views
from magicdrive_core.video.sheets import contact_sheet, six_views
from magicdrive_core.wcoda.package import Package

STILL_WIDTH, MOTION_WIDTH, ABOVE = 480, 240, 560  # pixels of a view in a still and in a video, of the panel from above
MOTION_MBIT_S = 1.2
FRONT = VIEWS.index("CAM_FRONT")
SHOWN_SCENES = 8  # with pictures and videos: more would make the page too large for browsers


def write_report(
    config: Config,
    generated: Path,
    out: Path,
    *,
    runs: Mapping[str, Path],
    package: Package | None = None,
    faults: Sequence[str] = (),
    notes: Sequence[str] = (),
    lineage: Mapping[str, str] | None = None,
    made: str = "",
    sheet: Sheet | None = None,
    project: Path = Path(),
) -> Path:
    """Write ``out/report.html``, one page without references to other files.

    Args:
        config: All settings.
        generated: Folder of items.
        out: Folder of the page.
        runs: Folder of each training stage's run, by stage.
        package: The packed submission; None if there is none (single frames).
        faults: Faults that the validator found in it.
        notes: One line for each thing that was left out, with the reason.
        lineage: Origin of the results, shown as a table; None: only that of the items is shown.
        made: Date and time that the page shows; empty: none.
        sheet: Scores of the package, if any; scenes farthest from the real clips then come first.
        project: The project's folder.

    Returns:
        The page's path.

    Raises:
        MagicDriveError: There are no generated clips, or their inputs are missing.
    """
    records = [record for record in read_items(generated) if record.generation < config.generate.generations]
    if not records:
        raise MagicDriveError(f"{generated} holds no generated clips", "run magicdrive generate")
    broken = [f"{record.name}: {fault}" for record in records for fault in record.faults(generated / record.name)]
    scenes = {scene.token: scene for scene in read_scenes(project / "artifacts/infos")}
    tokens = order_scenes(list(dict.fromkeys(record.scene for record in records)), sheet)
    names = {record.scene: record.scene_name for record in records}
    chosen = [] if broken else tokens[:SHOWN_SCENES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = pool.map(
            lambda token: _scene(config, scenes[token], [r for r in records if r.scene == token], generated, project),
            chosen,
        )
        shown = list(track(work, "report", len(chosen)))
    curves = [curve for stage, folder in runs.items() if (curve := Curve.read(stage, folder))]
    page = _template().render(
        config=config,
        made=made,
        faults=[*faults, *broken],
        notes=notes,
        scenes=shown,
        hidden=len(tokens) - len(shown),
        curves=curves,
        items=[_row(record, config) for record in records],
        records=records,
        package=package,
        scores=ScoreTable.of(sheet, names, config.submission.team) if sheet else None,
        tiles=_tiles(config, records, package, curves),
        lineage=_lineage(records, lineage or {}),
        classes=[(name.replace("_", " "), _css(c)) for name, c in zip(CLASSES, CLASS_COLOURS, strict=True)],
        layers=[(name.replace("_", " "), _css(c)) for name, c in zip(MAP_LAYERS, LAYER_COLOURS, strict=True)],
    )
    path = out / "report.html"
    with atomic_file(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


@dataclass(frozen=True)
class _Column:
    """One six-view picture and its video, as data URIs."""

    title: str
    still: str
    video: str | None
    boxes: bool  # whether boxes can be drawn over it


def _scene(
    config: Config, scene: Scene, records: Sequence[ItemRecord], generated: Path, project: Path
) -> dict[str, Any]:
    """Collect everything that the page shows of one scene, for the template."""
    edits = chosen_edits(config, project)
    scene = edit_scene(scene, edits)
    bits = BevMaps(config, project).of_scene(scene, config.generate.resolution, draw=edits.moves_lidar(scene.name))
    root = project / config.data.root
    still, motion = (SceneViews(scene, bits, root, width) for width in (STILL_WIDTH, MOTION_WIDTH))
    start, frames, fps = records[0].start, records[0].frames, records[0].fps
    numbers = range(start, start + frames)
    strip = _Strip(frames)
    columns = [
        _Column(
            "real",
            _jpeg(still.real(start)),
            _video(strip.row("real", (motion.real(n) for n in numbers)), frames, fps),
            True,
        ),
        _Column(
            "conditions",
            _jpeg(still.conditions(start)),
            _video(strip.row("conditions", (motion.conditions(n) for n in numbers)), frames, fps),
            False,
        ),
    ]
    for record in records:
        folder = generated / record.name
        columns.append(
            _Column(
                f"generated #{record.generation}",
                _jpeg(next(still.generated(folder, record))),
                _video(strip.row(f"generated #{record.generation}", motion.generated(folder, record)), frames, fps),
                True,
            )
        )
    return {
        "name": scene.name,
        "location": scene.location,
        "caption": records[0].caption,
        "frames": frames,
        "boxes": len(scene.boxes[start].names),
        "above": _png(still.bev(start, ABOVE)),
        "layer": _png(six_views(still.box_layers(start))),
        "columns": columns,
        "strip": strip.picture() if frames > 1 else None,
    }


class _Strip:
    """Contact sheet of a clip: the front view at moments spread over it, one row for each video."""

    MOMENTS = 5

    def __init__(self, frames: int) -> None:
        """Choose the moments, evenly spread from the first frame to the last.

        Args:
            frames: Number of frames of the clip.
        """
        self._moments = sorted({round(n * (frames - 1) / (self.MOMENTS - 1)) for n in range(self.MOMENTS)})
        self._rows: dict[str, list[Picture]] = {}

    def row(self, title: str, frames: Iterable[Views]) -> Iterator[Views]:
        """Pass on the frames of a video and keep those at the chosen moments.

        Args:
            title: Label of the video's row.
            frames: Views (V, H, W, 3) of each frame.

        Yields:
            The same views.
        """
        kept = self._rows.setdefault(title, [])
        for number, views in enumerate(frames):
            if number in self._moments:
                kept.append(views[FRONT])
            yield views

    def picture(self) -> str:
        """Draw the sheet; call it after all videos were read.

        Returns:
            A JPEG as data URI.
        """
        titles = [f"frame {moment}" for moment in self._moments]
        return _uri(
            contact_sheet(list(self._rows.values()), list(self._rows), titles), "jpeg", quality=84, optimize=True
        )


def _row(record: ItemRecord, config: Config) -> dict[str, Any]:
    """Values of a clip's line in the table."""
    rates = [view.mbit_s for view in record.views.values() if view.mbit_s is not None]
    psnrs = [view.psnr for view in record.views.values() if view.psnr is not None]
    cap = config.video.max_mbit_s
    return {
        "record": record,
        "bytes": sum(view.bytes for view in record.views.values()),
        "mean_rate": sum(rates) / len(rates) if rates else None,
        "max_rate": max(rates, default=None),
        "share": min(1.0, max(rates) / cap) if rates and cap else None,
        "psnr": sum(psnrs) / len(psnrs) if psnrs else None,
        "seconds": sum(record.seconds.values()),
    }


def _tiles(
    config: Config, records: Sequence[ItemRecord], package: Package | None, curves: Sequence[Curve]
) -> list[tuple[str, str, str]]:
    """Return name, figure and remark of each tile."""
    views = [view for record in records for view in record.views.values()]
    tiles = [
        ("scenes", str(len({record.scene for record in records})), f"{config.generate.generations} generations each"),
        ("views", str(len(views)), f"{records[0].frames} frame{'s' * (records[0].frames != 1)}, {records[0].size}"),
    ]
    if rates := [view.mbit_s for view in views if view.mbit_s is not None]:
        cap = config.video.max_mbit_s
        tiles.append(("highest bit rate", f"{max(rates):.2f}", "Mbit/s" + (f", cap {cap:g}" if cap else ", no cap")))
    if psnrs := [view.psnr for view in views if view.psnr is not None]:
        tiles.append(("encoding PSNR", f"{sum(psnrs) / len(psnrs):.1f}", f"dB on average, least {min(psnrs):.1f}"))
    if package is not None:
        tiles.append(("package", f"{package.zip_path.stat().st_size / 1e6:.1f}", f"MB, {len(package.files)} videos"))
    if curves:
        tiles.append(("loss", f"{curves[-1].last:.3f}", f"{curves[-1].stage}, from {curves[-1].first:.3f}"))
    return tiles


def _lineage(records: Sequence[ItemRecord], lineage: Mapping[str, str]) -> dict[str, str]:
    """Merge the lineage with that of the items, which all have the same inputs."""
    return {**lineage, **{f"item.{name}": digest for name, digest in records[0].lineage.items()}}


def _jpeg(views: Views) -> str:
    return _uri(six_views(views), "jpeg", quality=84, optimize=True)


def _png(picture: NDArray[np.uint8]) -> str:
    """Encode a picture of flat colours; a palette keeps it small."""
    image = Image.fromarray(picture)
    method = Image.Quantize.FASTOCTREE  # the only one that supports alpha
    buffer = io.BytesIO()
    image.quantize(128, method=method).save(buffer, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _uri(picture: Picture, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _video(frames: Iterable[Views], count: int, fps: int) -> str | None:
    """Encode six views as a small video; None for a single frame."""
    if count == 1:
        return None
    mosaics: Iterator[Picture] = (six_views(views) for views in frames)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mosaic.mp4")
        encode_video(mosaics, path, fps=fps, max_mbit_s=MOTION_MBIT_S)
        return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _css(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("magicdrive_core.report", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["file_name"] = file_name  # an id without spaces, of whatever a data set calls its scenes
    return environment.get_template("report.html.j2")
