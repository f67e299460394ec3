"""The score sheet of a package, ``scores.json``: the scores, what each one means, and what could not be scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

from magicdrive_core.config.schema import Config, fingerprint
from magicdrive_core.config.versions import SCORES_VERSION
from magicdrive_core.data.records import Scene
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.evaluation.bev_masks import Masks, evaluate_masks, map_masks
from magicdrive_core.evaluation.detection import evaluate_detections
from magicdrive_core.evaluation.frechet import Figure, measure_distances
from magicdrive_core.evaluation.key_frames import cut_to_clips, key_samples
from magicdrive_core.evaluation.protocol import CROPS, score
from magicdrive_core.utils.files import read_json, sha256_file, write_json

SHEET = "scores.json"

# Meaning of each figure, as shown on the page. Figures of different names cannot be compared.
MEANINGS = {
    "fvd_224": "FVD as the evaluator computes it: I3D logits, the lowest 224 of 225 rows",
    "fvd_212": "FVD without the black band of 848-row videos: I3D logits, the lowest 212 of 225 rows",
    "small_224": "Fréchet distance of the built-in extractor, 224 rows; not FVD",
    "small_212": "Fréchet distance of the built-in extractor, 212 rows; not FVD",
    "map": "mAP in percent, nuScenes' DetectionEval on key frames 0, 6 and 12, mean over the generations",
    "nds": "nuScenes detection score in percent, on the same key frames, mean over the generations",
    "miou": "mIoU in percent of BEV masks against the masks of scores.bev_truth, mean over the generations",
    "miou_maps": "mIoU in percent of BEV masks against the project's own BEV maps; not the track's mIoU",
    "score": "the track's score: fvd_224, map and miou against the baseline's; higher is better",
}


@dataclass(frozen=True)
class Sheet:
    """All scores of a package."""

    question: str  # fingerprint of everything that decides the figures
    package: str  # SHA-256 of results.zip
    figures: dict[str, float]  # by the names of ``MEANINGS``
    missing: list[str]  # one line for each score that is missing, with the reason
    scenes: dict[str, dict[str, float]]  # by scene token: squared distance of feature means, map, miou
    classes: dict[str, dict[str, float]]  # "map", "miou": by class
    clips: dict[str, int]  # real, generated
    inputs: dict[str, str] = field(default_factory=dict)  # SHA-256 of each file that scoring used, by path

    def write(self, folder: Path) -> None:
        """Write the sheet as ``scores.json``.

        Args:
            folder: Folder of the package.
        """
        write_json(folder / SHEET, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Sheet:
        """Read the sheet from ``scores.json``.

        Args:
            folder: Folder of the package.

        Returns:
            The sheet; whether it is current is for the caller to check (``question``).

        Raises:
            MagicDriveError: The file is missing or has other contents.
        """
        try:
            return cls(**read_json(folder / SHEET, "magicdrive score"))
        except TypeError as error:
            raise MagicDriveError(
                f"{folder / SHEET} is not a score sheet: {error}", "delete it, then run: magicdrive score"
            ) from None


def score_package(config: Config, videos: Path, package: str, scenes: Sequence[Scene], project: Path = Path()) -> Sheet:
    """Score the standard set of a package with everything that ``config.scores`` names.

    Args:
        config: All settings; ``scores`` names the files to score with.
        videos: The folder ``{team}_standard``.
        package: SHA-256 of the package's zip.
        scenes: The scenes of the package.
        project: The project's folder.

    Returns:
        The sheet, which also lists the scores that need files that are not named.

    Raises:
        MagicDriveError: A named file is missing or wrong, or the real pictures are missing.
    """
    from magicdrive_core.evaluation.extractors import SmallExtractor, TorchScriptI3D  # torch

    settings, generations = config.scores, config.generate.generations
    small = SmallExtractor()
    wanted = {f"small_{rows}": Figure(small, rows) for rows in CROPS.values()}
    missing, inputs = [], {}
    if settings.i3d is None:
        missing.append("FVD: no I3D network; set scores.i3d to a TorchScript file and its SHA-256")
    else:
        i3d = TorchScriptI3D(settings.i3d, project)
        wanted |= {name: Figure(i3d, rows) for name, rows in CROPS.items()}
        inputs[settings.i3d.path] = settings.i3d.sha256
    distances = measure_distances(wanted, videos, project / config.data.root, scenes, generations)
    figures, per_scene = dict(distances.values), {token: dict(row) for token, row in distances.scenes.items()}
    classes: dict[str, dict[str, float]] = {}
    for name, files, work in (
        ("scores.detections", settings.detections, _detections),
        ("scores.bev_masks", settings.bev_masks, _masks),
    ):
        if not files:
            what = "mAP: no detector's results" if work is _detections else "mIoU: no predicted BEV masks"
            missing.append(f"{what}; name a file for each generation in {name}")
            continue
        if len(files) != generations:
            raise MagicDriveError(
                f"{name} names {len(files)} files for {generations} generations", "one each, in order"
            )
        inputs |= {file: sha256_file(project / file) for file in files if (project / file).is_file()}
        found = work(config, [project / file for file in files], scenes, project)
        figures |= found.figures
        classes |= found.classes
        for token, row in found.scenes.items():
            per_scene[token] |= row
    if {"fvd_224", "map", "miou"} <= set(figures):
        figures["score"] = score(figures["fvd_224"], figures["map"], figures["miou"])
    else:
        missing.append("score: it needs fvd_224, mAP, and mIoU against true masks (scores.bev_truth)")
    clips = {"real": distances.real_clips, "generated": distances.generated_clips}
    return Sheet(question(config, package, project), package, figures, missing, per_scene, classes, clips, inputs)


def question(config: Config, package: str, project: Path = Path()) -> str:
    """Fingerprint a package and everything that decides its scores; a sheet with the same fingerprint is current.

    Args:
        config: All settings; ``scores`` and the number of generations count.
        package: SHA-256 of the package's zip.
        project: The project's folder, to which the files that ``scores`` names are relative; missing files do
            not count.

    Returns:
        64 hex digits.
    """
    settings = config.scores
    named = [*settings.detections, *settings.bev_masks, *([settings.bev_truth] if settings.bev_truth else [])]
    digests = {file: sha256_file(project / file) for file in named if (project / file).is_file()}
    return fingerprint(settings, config.generate.generations, package, digests, SCORES_VERSION)


@dataclass(frozen=True)
class _Found:
    figures: dict[str, float]
    classes: dict[str, dict[str, float]]
    scenes: dict[str, dict[str, float]]


def _detections(config: Config, files: Sequence[Path], scenes: Sequence[Scene], project: Path) -> _Found:
    tables, root = cut_to_clips(config, scenes, project), project / config.data.root
    results = [evaluate_detections(file, tables, root, config.data.version) for file in files]
    return _Found(
        {"map": fmean(r.mean_ap for r in results), "nds": fmean(r.nds for r in results)},
        {"map": _means([r.class_ap for r in results])},
        {token: {"map": value} for token, value in _means([r.scene_ap for r in results]).items()},
    )


def _masks(config: Config, files: Sequence[Path], scenes: Sequence[Scene], project: Path) -> _Found:
    samples = {scene.token: key_samples(scene) for scene in scenes}
    given, results = config.scores.bev_truth, []
    truth = Masks.read(project / given) if given else None
    for file in files:
        predicted = Masks.read(file)
        results.append(evaluate_masks(predicted, truth or map_masks(config, scenes, predicted, project), samples))
    name = "miou" if given else "miou_maps"
    return _Found(
        {name: fmean(r.mean_iou for r in results)},
        {name: _means([r.class_iou for r in results])},
        {token: {name: value} for token, value in _means([r.scene_iou for r in results]).items()},
    )


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average each key over the rows that have it."""
    return {key: fmean(row[key] for row in rows if key in row) for key in sorted({key for row in rows for key in row})}
