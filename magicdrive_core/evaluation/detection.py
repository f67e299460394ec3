"""mAP of a detector on generated key frames, computed by the unmodified ``DetectionEval`` of the nuScenes devkit."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from magicdrive_core.data.nuscenes_files import SPLIT, Tables, write_cut
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import read_json

CONFIGURATION = "detection_cvpr_2019"  # nuScenes' own: matching by distance of centres at 0.5, 1, 2 and 4 m


@dataclass(frozen=True)
class Detection:
    """Results of ``DetectionEval`` for one result file, in percent."""

    mean_ap: float
    nds: float
    class_ap: dict[str, float]
    scene_ap: dict[str, float]  # by scene token: mean over the classes that the scene has


def evaluate_detections(result: Path, tables: Tables, root: Path, version: str) -> Detection:
    """Score one nuScenes detection result file.

    Args:
        result: JSON with ``results`` (boxes by sample token) and ``meta``; samples that the tables lack are ignored.
        tables: Tables cut to the scored samples (``key_frames.cut_to_clips``).
        root: The data root of the tables.
        version: Version of the tables.

    Returns:
        mAP, NDS and APs in percent, AP being nuScenes' mean over four distances; scenes without any true box have none.

    Raises:
        MagicDriveError: The file is not such JSON, lacks a sample, or holds no box.
    """
    _check(result, {record["token"] for record in tables["sample"]})
    from nuscenes import NuScenes  # seconds to import
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.detection.evaluate import DetectionEval

    with tempfile.TemporaryDirectory(prefix="magicdrive-") as folder:
        write_cut(tables, root, version, Path(folder))
        devkit = NuScenes(version, folder, verbose=False)
        try:
            run = DetectionEval(
                devkit, config_factory(CONFIGURATION), str(result), SPLIT, f"{folder}/evaluation", verbose=False
            )
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise MagicDriveError(f"nuScenes' evaluation rejects {result}: {type(error).__name__}: {error}") from None
        whole, _ = run.evaluate()
        truth, found, scenes = run.gt_boxes, run.pred_boxes, {}
        for scene in tables["scene"]:
            samples = [r["token"] for r in tables["sample"] if r["scene_token"] == scene["token"]]
            run.gt_boxes, run.pred_boxes = EvalBoxes(), EvalBoxes()
            for sample in samples:
                run.gt_boxes.add_boxes(sample, truth[sample])
                run.pred_boxes.add_boxes(sample, found[sample])
            known = {box.detection_name for box in run.gt_boxes.all}
            if known:
                per_class = run.evaluate()[0].mean_dist_aps
                scenes[scene["token"]] = 100 * fmean(per_class[name] for name in sorted(known))
    classes = {name: 100 * float(value) for name, value in whole.mean_dist_aps.items()}
    return Detection(100 * float(whole.mean_ap), 100 * float(whole.nd_score), classes, scenes)


def _check(result: Path, samples: set[str]) -> None:
    hint = "run a nuScenes detector on the roots of magicdrive export-frames"
    content = read_json(result, hint)
    if not (isinstance(content, dict) and isinstance(content.get("results"), dict) and "meta" in content):
        raise MagicDriveError(f"{result} is not a nuScenes detection result: it needs results and meta", hint)
    missing: Sequence[str] = sorted(samples - set(content["results"]))
    if missing:
        raise MagicDriveError(
            f"{result}: {len(missing)} of {len(samples)} samples are missing, the first is {missing[0]}", hint
        )
    if not any(content["results"][sample] for sample in samples):
        raise MagicDriveError(f"{result} has no box in any of the {len(samples)} samples", hint)
