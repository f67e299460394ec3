"""Fréchet distances between generated and real clips: running statistics of features, and the distance between two.

Clips are decoded, cut and turned into features in a stream, all views pooled. Only a mean and a scatter matrix are
kept, so that 3,600 clips need no more memory than one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from os import cpu_count
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from magicdrive_core.data.records import Scene
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.evaluation.protocol import FRAMES, REDUCED, framed, reduced
from magicdrive_core.geometry.cameras import VIEWS, full_window
from magicdrive_core.utils.progress import track
from magicdrive_core.video.frames import read_view
from magicdrive_core.video.item_record import item_name, video_name

if TYPE_CHECKING:
    from magicdrive_core.evaluation.extractors import Extractor

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """Mean and scatter of N features of width D, in float64.

    Attributes:
        count: N.
        mean: (D,).
        scatter: (D, D), the sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: Floats
    scatter: Floats

    @classmethod
    def empty(cls, width: int) -> Statistics:
        """Return the statistics of no features: all zeros, the neutral element of ``merge``.

        Args:
            width: Width D of the features.
        """
        return cls(0, np.zeros(width), np.zeros((width, width)))

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> Statistics:
        """Compute the statistics of features.

        Args:
            features: Features (N, D); N may be 0.

        Returns:
            Their number, mean (D,) and scatter (D, D) in float64.
        """
        features = np.asarray(features, np.float64)
        if not len(features):
            return cls.empty(features.shape[1])
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: Statistics) -> Statistics:
        """Combine the statistics of two streams; the order does not matter (Chan, Golub and LeVeque 1979).

        With n = n_a + n_b and d = m_b - m_a: m = m_a + d n_b/n, S = S_a + S_b + d d^T n_a n_b / n.

        Args:
            other: Statistics of the other stream, of the same width D.

        Returns:
            The statistics of both streams together.
        """
        count = self.count + other.count
        if not count:
            return self
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(step, step) * (self.count * other.count / count)
        return Statistics(count, self.mean + step * (other.count / count), scatter)

    @property
    def covariance(self) -> Floats:
        """The unbiased covariance (D, D): the scatter over N - 1; zeros for a single feature."""
        return self.scatter / max(1, self.count - 1)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Compute the squared Fréchet distance between two normal distributions (Dowson and Landau 1982).

    It is |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). The trace of the root is computed as the sum of the
    singular values of C_a^(1/2) C_b^(1/2), which is real and never negative; a matrix root of C_a C_b becomes
    inaccurate when there are fewer features than their width.

    Args:
        a: Statistics of one side, at least one feature.
        b: Statistics of the other side, of the same width D.

    Returns:
        The squared distance, not negative, in squared units of the features.

    Raises:
        ValueError: One side has no features, or the widths differ.
    """
    if not a.count or not b.count:
        raise ValueError("the Fréchet distance needs features on both sides")
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} numbers cannot be compared")
    shift = a.mean - b.mean
    root = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False).sum()
    return float(max(0.0, shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root))


def _root(covariance: Floats) -> Floats:
    """Return the symmetric root of a positive semi-definite matrix; negative eigenvalues are rounding errors."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


Clip = NDArray[np.uint8]  # F, 225, 400, 3
BLOCK = 12  # clips in memory at once


@dataclass(frozen=True)
class Figure:
    """Defines one distance: the extractor of the features and the rows that it sees."""

    extractor: Extractor
    rows: int  # the lowest of 225


@dataclass(frozen=True)
class Distances:
    """Measured distances by the name of the figure."""

    values: dict[str, float]
    scenes: dict[str, dict[str, float]]  # squared distance between the means of a scene, by scene token
    real_clips: int
    generated_clips: int


def measure_distances(
    figures: Mapping[str, Figure], videos: Path, root: Path, scenes: Sequence[Scene], generations: int
) -> Distances:
    """Compare the videos of a package with the pictures of the data set.

    Args:
        figures: What to measure, by name.
        videos: The folder ``{team}_standard``.
        root: The data root.
        scenes: The scenes of the package; clips start at their first frames.
        generations: Generations of each scene.

    Returns:
        Squared Fréchet distances by the names of ``figures``, and for each scene the squared distance of feature means.

    Raises:
        MagicDriveError: A video or a picture is missing or broken, or a clip has fewer than 16 frames.
    """
    views = range(len(VIEWS))
    real = {scene.token: [_Real(root, scene, view) for view in views] for scene in scenes}
    made = {
        scene.token: [_Generated(videos, scene, view, number) for number in range(generations) for view in views]
        for scene in scenes
    }
    truth, ours = _gather(figures, real, "real clips"), _gather(figures, made, "videos")
    return Distances(
        {name: frechet_distance(truth[name].whole, ours[name].whole) for name in figures},
        {
            scene.token: {
                name: _squared_distance(truth[name].means[scene.token], ours[name].means[scene.token])
                for name in figures
            }
            for scene in scenes
        },
        sum(map(len, real.values())),
        sum(map(len, made.values())),
    )


class _Features:
    """Accumulates the features of one figure: statistics of all clips, and a sum for each scene."""

    def __init__(self) -> None:
        self._whole: Statistics | None = None
        self._sums: dict[str, Floats] = {}
        self._counts: Counter[str] = Counter()

    def add(self, tokens: Sequence[str], features: Floats) -> None:
        """Add the features of a block of clips.

        Args:
            tokens: N scene tokens, one for each clip.
            features: Features (N, D).
        """
        block = Statistics.of(features)
        self._whole = self._whole.merge(block) if self._whole else block
        for token, feature in zip(tokens, features, strict=True):
            self._sums[token] = self._sums[token] + feature if token in self._sums else feature
        self._counts.update(tokens)

    @property
    def whole(self) -> Statistics:
        """Statistics of all clips."""
        if self._whole is None:
            raise ValueError("no features")
        return self._whole

    @property
    def means(self) -> dict[str, Floats]:
        """Mean feature (D,) of each scene, by scene token."""
        return {token: total / self._counts[token] for token, total in self._sums.items()}


class _Source(Protocol):
    def read(self) -> Clip:
        """Read the frames of a clip at a quarter of their size.

        Returns:
            uint8 RGB frames (F, 225, 400, 3), F 16.
        """


@dataclass(frozen=True)
class _Real:
    root: Path
    scene: Scene
    view: int

    def read(self) -> Clip:
        if len(self.scene) < FRAMES:
            raise MagicDriveError(f"{self.scene.name} has {len(self.scene)} frames, {FRAMES} are needed")
        return np.stack([_picture(self.root / views[self.view]) for views in self.scene.pictures[:FRAMES]])


@dataclass(frozen=True)
class _Generated:
    videos: Path
    scene: Scene
    view: int
    generation: int

    def read(self) -> Clip:
        token = self.scene.first_sample
        path = self.videos / item_name(token, self.generation) / video_name(token, VIEWS[self.view])
        frames = [reduced(picture) for picture in islice(read_view(path), FRAMES)]
        if len(frames) < FRAMES:
            raise MagicDriveError(f"{path} has {len(frames)} frames, not {FRAMES}", "run magicdrive package again")
        return np.stack(frames)


def _picture(path: Path) -> NDArray[np.uint8]:
    """Read a picture of the data set at the reduced size, cut to 16:9 as the camera parameters assume."""
    try:
        with Image.open(path, formats=["JPEG", "PNG"]) as image:
            box = full_window(image.width, image.height)
            return np.asarray(image.convert("RGB").resize(REDUCED[::-1], Image.Resampling.BICUBIC, box=box))
    except FileNotFoundError:
        raise MagicDriveError(f"{path} is missing", "complete the data set: scores compare with its pictures") from None
    except (UnidentifiedImageError, OSError) as error:
        raise MagicDriveError(f"{path} cannot be read as a picture: {error}") from None


def _gather(figures: Mapping[str, Figure], sources: Mapping[str, Sequence[_Source]], what: str) -> dict[str, _Features]:
    """Extract the features of each figure; the numbers do not depend on the number of threads."""
    flat = [(token, source) for token, group in sources.items() for source in group]
    out = {name: _Features() for name in figures}
    blocks = [flat[start : start + BLOCK] for start in range(0, len(flat), BLOCK)]
    with ThreadPoolExecutor(cpu_count()) as pool:
        for block in track(blocks, what, len(blocks)):
            clips = list(pool.map(lambda pair: pair[1].read(), block))
            for name, figure in figures.items():
                features = figure.extractor(np.stack([framed(clip, figure.rows) for clip in clips]))
                out[name].add([token for token, _ in block], features)
    return out


def _squared_distance(a: Floats, b: Floats) -> float:
    return float((a - b) @ (a - b))
