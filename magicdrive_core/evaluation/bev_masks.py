"""mIoU of BEV masks that a model predicted from generated key frames.

A masks file is an npz with ``tokens`` (N sample tokens), ``classes`` (K names) and ``masks`` (N, K, h, w) of 0 and 1.
The true masks are read from a file of the same form. Without one, the project's BEV maps are used (100 m along each
side; index i along the lidar's x axis, j along its y axis), and the figure has another name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.config.schema import Config
from magicdrive_core.data.adapters import open_adapter
from magicdrive_core.data.bev_maps import rasterise, unpack
from magicdrive_core.data.records import MAP_LAYERS, Scene
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.evaluation.protocol import KEY_FRAMES
from magicdrive_core.utils.files import UNREADABLE_ZIP

Bits = NDArray[np.bool_]


@dataclass(frozen=True)
class Masks:
    """BEV masks of samples: class names, and masks (K, h, w) by sample token."""

    classes: list[str]
    by_sample: dict[str, Bits]  # (K, h, w)

    @classmethod
    def read(cls, path: Path) -> Masks:
        """Read masks from an npz file.

        Args:
            path: An npz with ``tokens`` (N), ``classes`` (K) and ``masks`` (N, K, h, w) of 0 and 1.

        Returns:
            The masks by sample token, as bool.

        Raises:
            MagicDriveError: The file is missing, not an npz, or has other contents.
        """
        hint = "an npz with tokens (N), classes (K) and masks (N, K, h, w) of 0 and 1"
        try:
            with np.load(path, allow_pickle=False) as archive:
                tokens, classes, masks = archive["tokens"], archive["classes"], archive["masks"]
        except FileNotFoundError:
            raise MagicDriveError(f"{path} is missing", hint) from None
        except UNREADABLE_ZIP as error:
            raise MagicDriveError(f"{path} cannot be read as BEV masks: {error}", hint) from None
        if masks.ndim != 4 or masks.shape[:2] != (len(tokens), len(classes)) or not np.isin(masks, (0, 1)).all():
            raise MagicDriveError(
                f"{path}: masks must be 0 or 1 with shape (N, K, h, w), got {masks.dtype} {masks.shape}", hint
            )
        names = [str(token) for token in tokens]
        return cls([str(name) for name in classes], dict(zip(names, masks.astype(np.bool_), strict=True)))


@dataclass(frozen=True)
class Segmentation:
    """Intersection over union in percent: mean over the classes, by class and by scene."""

    mean_iou: float
    class_iou: dict[str, float]  # without classes that are nowhere, neither predicted nor true
    scene_iou: dict[str, float]  # by scene token


def map_masks(config: Config, scenes: Sequence[Scene], predicted: Masks, project: Path = Path()) -> Masks:
    """Rasterise the project's BEV maps as true masks, at the size of the predicted ones.

    Args:
        config: All settings; those of the data are used.
        scenes: Scenes whose key frames are scored.
        predicted: Masks whose classes and size are taken.
        project: The project's folder.

    Returns:
        Masks (K, h, h) of each scored key frame, with the classes of ``predicted`` in their order; a mask covers 100 m
        along each side.

    Raises:
        MagicDriveError: A class is not a layer of the map, or the masks are not square.
    """
    unknown = [name for name in predicted.classes if name not in MAP_LAYERS]
    if unknown:
        raise MagicDriveError(
            f"BEV masks: {unknown[0]} is not a layer of the map",
            f"set scores.bev_truth, or use {', '.join(MAP_LAYERS)}",
        )
    height, width = next(iter(predicted.by_sample.values())).shape[1:]
    if height != width:
        raise MagicDriveError(
            f"BEV masks have {height}x{width} cells, the project's maps are square", "set scores.bev_truth"
        )
    layers = [MAP_LAYERS.index(name) for name in predicted.classes]
    adapter, out = open_adapter(config, project), {}
    for scene in scenes:
        frames = list(KEY_FRAMES)
        bits = rasterise(adapter.vector_map(scene), scene.ego_to_global[frames] @ scene.lidar_to_ego[frames], height)
        for frame, mask in zip(frames, unpack(bits)[:, layers].astype(np.bool_), strict=True):
            out[scene.tokens[frame]] = mask
    return Masks(predicted.classes, out)


def evaluate_masks(predicted: Masks, truth: Masks, samples: Mapping[str, Sequence[str]]) -> Segmentation:
    """Compute the intersection over union of each class over all samples, and its mean over the classes.

    Args:
        predicted: Masks that a model predicted from generated frames.
        truth: True masks of the same classes.
        samples: Tokens of the scored samples by scene token.

    Returns:
        IoUs in percent. Cells are counted over all samples, or all samples of a scene, before the division. A class
        that is neither true nor predicted there does not enter the mean.

    Raises:
        MagicDriveError: Classes or sizes differ, a sample has no masks, or no class appears anywhere.
    """
    if predicted.classes != truth.classes:
        raise MagicDriveError(
            f"BEV masks: predicted classes {predicted.classes} differ from true classes {truth.classes}"
        )
    counts = {
        scene: np.sum([_counts(predicted, truth, token) for token in tokens], axis=0)
        for scene, tokens in samples.items()
    }
    whole = _ious(np.sum(list(counts.values()), axis=0), predicted.classes)
    if not whole:
        raise MagicDriveError("BEV masks: no class is true or predicted in any sample")
    scenes = {scene: _ious(count, predicted.classes) for scene, count in counts.items()}
    return Segmentation(_mean(whole), whole, {scene: _mean(ious) for scene, ious in scenes.items() if ious})


def _counts(predicted: Masks, truth: Masks, token: str) -> NDArray[np.int64]:
    """Count the cells of intersection and union of a sample, (K, 2)."""
    for masks, whose in ((predicted, "predicted"), (truth, "true")):
        if token not in masks.by_sample:
            raise MagicDriveError(f"the {whose} BEV masks have no sample {token}")
    ours, theirs = predicted.by_sample[token], truth.by_sample[token]
    if ours.shape != theirs.shape:
        raise MagicDriveError(f"sample {token}: predicted masks have shape {ours.shape}, true masks {theirs.shape}")
    return np.stack([(ours & theirs).sum(axis=(1, 2)), (ours | theirs).sum(axis=(1, 2))], axis=1)


def _ious(counts: NDArray[np.int64], classes: Sequence[str]) -> dict[str, float]:
    return {name: 100 * float(i) / float(u) for name, (i, u) in zip(classes, counts, strict=True) if u}


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
