"""Mean and covariance of a stream of features, and the Fréchet distance between two of them.

Features come and go: what is kept is a mean and a scatter matrix, so that 3,600 clips take no more memory than one, and
what several workers have seen can be put together.
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
    """Of N features of width D, in float64.

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
        """Of no features."""
        return cls(0, np.zeros(width), np.zeros((width, width)))

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> Statistics:
        """Of features (N, D) that are at hand."""
        features = np.asarray(features, np.float64)
        if not len(features):
            return cls.empty(features.shape[1])
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: Statistics) -> Statistics:
        """Of both streams together, in any order (Chan, Golub and LeVeque 1979).

        With n = n_a + n_b and d = m_b - m_a: m = m_a + d n_b/n, S = S_a + S_b + d d^T n_a n_b / n.
        """
        count = self.count + other.count
        if not count:
            return self
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(step, step) * (self.count * other.count / count)
        return Statistics(count, self.mean + step * (other.count / count), scatter)

    @property
    def covariance(self) -> Floats:
        """(D, D), unbiased: the scatter over N - 1; zeros for a single feature."""
        return self.scatter / max(1, self.count - 1)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), between normal distributions (Dowson and Landau 1982).

    The trace of the root is the sum of the singular values of C_a^(1/2) C_b^(1/2): real and never negative, where
    a matrix root of C_a C_b goes astray as soon as there are fewer features than their width.

    Raises:
        ValueError: one of them is of no features, or their widths differ.
    """
    if not a.count or not b.count:
        raise ValueError("the Fréchet distance needs features on both sides")
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} numbers cannot be compared")
    shift = a.mean - b.mean
    root = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False).sum()
    return float(max(0.0, shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root))


def _root(covariance: Floats) -> Floats:
    """The symmetric root of a positive semi-definite matrix; eigenvalues below zero are rounding."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


# Fréchet distances between the clips of a package and the real ones, all views pooled, as a stream.
#
# A clip is decoded, cut, turned into features and forgotten: what is kept are statistics.

Clip = NDArray[np.uint8]  # F, 225, 400, 3
BLOCK = 12  # clips that are decoded together, and held at once


@dataclass(frozen=True)
class Figure:
    """How one distance is measured."""

    extractor: Extractor
    rows: int  # kept at the bottom of 225


@dataclass(frozen=True)
class Distances:
    """By the names of the figures that were asked for."""

    values: dict[str, float]
    scenes: dict[str, dict[str, float]]  # squared distance between the means of a scene, by scene token
    real_clips: int
    generated_clips: int


def measure_distances(
    figures: Mapping[str, Figure], videos: Path, root: Path, scenes: Sequence[Scene], generations: int
) -> Distances:
    """Compares the videos of a package with the pictures of the data set.

    Args:
        figures: what to measure, by name.
        videos: the folder ``{team}_standard``.
        root: the data root.
        scenes: that the package holds; its clips begin at their first frames.
        generations: of each scene.

    Raises:
        MagicDriveError: a video or a picture is missing or broken, or a clip has not 16 frames.
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
                name: _apart(truth[name].means[scene.token], ours[name].means[scene.token]) for name in figures
            }
            for scene in scenes
        },
        sum(map(len, real.values())),
        sum(map(len, made.values())),
    )


class _Features:
    """What is kept of the features of one figure: statistics of all, a sum for each scene."""

    def __init__(self) -> None:
        self._whole: Statistics | None = None
        self._sums: dict[str, Floats] = {}
        self._counts: Counter[str] = Counter()

    def add(self, tokens: Sequence[str], features: Floats) -> None:
        """Features (N, D) of clips of the scenes ``tokens`` (N)."""
        block = Statistics.of(features)
        self._whole = self._whole.merge(block) if self._whole else block
        for token, feature in zip(tokens, features, strict=True):
            self._sums[token] = self._sums[token] + feature if token in self._sums else feature
        self._counts.update(tokens)

    @property
    def whole(self) -> Statistics:
        """Of all of them."""
        if self._whole is None:
            raise ValueError("no features")
        return self._whole

    @property
    def means(self) -> dict[str, Floats]:
        """By scene token, (D,) each."""
        return {token: total / self._counts[token] for token, total in self._sums.items()}


class _Source(Protocol):
    def read(self) -> Clip:
        """The frames of a clip at a quarter of their size."""


@dataclass(frozen=True)
class _Real:
    root: Path
    scene: Scene
    view: int

    def read(self) -> Clip:
        if len(self.scene) < FRAMES:
            raise MagicDriveError(f"{self.scene.name} has {len(self.scene)} frames, fewer than {FRAMES}")
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
    """A picture of the data set at the reduced size; of one that is not 16:9, the part that the cameras speak of."""
    try:
        with Image.open(path) as image:
            box = full_window(image.width, image.height)
            return np.asarray(image.convert("RGB").resize(REDUCED[::-1], Image.Resampling.BICUBIC, box=box))
    except FileNotFoundError:
        raise MagicDriveError(f"{path} is missing", "complete the data set: scores compare with its pictures") from None
    except (UnidentifiedImageError, OSError) as error:
        raise MagicDriveError(f"{path} cannot be read as a picture: {error}") from None


def _gather(figures: Mapping[str, Figure], sources: Mapping[str, Sequence[_Source]], what: str) -> dict[str, _Features]:
    """Features by figure; the same numbers whatever the number of threads."""
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


def _apart(a: Floats, b: Floats) -> float:
    return float((a - b) @ (a - b))
