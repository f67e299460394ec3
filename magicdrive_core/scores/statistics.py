"""Mean and covariance of a stream of features, and the Fréchet distance between two of them.

Features come and go: what is kept is a mean and a scatter matrix, so that 3,600 clips take no more memory than one, and
what several workers have seen can be put together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
