"""Conditioning frames in training: which latent frames of a clip stay clean, and which are generated.

Each kind is checked against the examples of the published generator (golden notes, section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.errors import UsageError

Mask = NDArray[np.bool_]  # True: noisy, to be generated; False: a clean conditioning frame

FIRST_LENGTH = 8  # latent frames: shorter clips have no conditioning frames


def draw_masks(ratios: Mapping[str, float], batch: int, frames: int, generator: np.random.Generator) -> Mask:
    """Draws one mask a sample: each kind with its probability, else all frames noisy.

    Args:
        ratios: probability of each of ``KINDS``; the rest of 1 is no conditioning frame.
        batch: B.
        frames: T latent frames.
        generator: draws kinds, lengths and positions.

    Returns:
        (B, T) bool, True = noisy. Every row has a noisy frame.
    """
    masks = np.ones((batch, frames), dtype=np.bool_)
    if frames < FIRST_LENGTH or not ratios:
        return masks
    kinds = list(ratios)
    share = np.array([ratios[kind] for kind in kinds])
    for row in range(batch):
        index = int(np.searchsorted(np.cumsum(share), generator.random(), side="right"))
        if index < len(kinds):
            masks[row] = KINDS[kinds[index]](frames, generator)
    return masks


def check_ratios(ratios: Mapping[str, float], stage: str) -> None:
    """Checks the probabilities of a stage's masks.

    Args:
        ratios: probability of each kind of mask, see ``draw_masks``.
        stage: named in the message.

    Raises:
        UsageError: a kind is unknown, or the probabilities sum to more than 1.
    """
    unknown = sorted(set(ratios) - set(KINDS))
    if unknown:
        raise UsageError(
            f"training.{stage}.mask_ratios: {unknown[0]} is no kind of mask", f"the kinds are: {', '.join(KINDS)}"
        )
    if sum(ratios.values()) > 1 + 1e-9:
        raise UsageError(
            f"training.{stage}.mask_ratios sum to {sum(ratios.values()):g}", "they are probabilities: <= 1"
        )


def _random(frames: int, generator: np.random.Generator) -> Mask:
    noisy = generator.random(frames) >= generator.random()
    noisy[generator.integers(frames)] |= not noisy.any()
    return noisy


def _interpolate(frames: int, generator: np.random.Generator) -> Mask:
    return np.arange(frames) % 2 == generator.integers(2)


def _ends(frames: int, head: int, tail: int) -> Mask:
    index = np.arange(frames)
    return (index >= head) & (index < frames - tail)


def _quarter(frames: int, generator: np.random.Generator) -> int:
    """Draws the length of a run of clean frames: 1 to a quarter of the clip."""
    return int(generator.integers(1, frames // 4 + 1))


def _quarter_random(frames: int, generator: np.random.Generator) -> Mask:
    length = _quarter(frames, generator)
    start = int(generator.integers(frames - length + 1))
    return ~_ends(frames, start, frames - start - length)


def _quarter_head_tail(frames: int, generator: np.random.Generator) -> Mask:
    length = _quarter(frames, generator)
    return _ends(frames, length, length)


def _image_random(frames: int, generator: np.random.Generator) -> Mask:
    return np.arange(frames) != generator.integers(frames)


KINDS: dict[str, Callable[[int, np.random.Generator], Mask]] = {
    "random": _random,
    "interpolate": _interpolate,
    "quarter_random": _quarter_random,
    "quarter_head": lambda frames, generator: _ends(frames, _quarter(frames, generator), 0),
    "quarter_tail": lambda frames, generator: _ends(frames, 0, _quarter(frames, generator)),
    "quarter_head_tail": _quarter_head_tail,
    "image_random": _image_random,
    "image_head": lambda frames, _: _ends(frames, 1, 0),
    "image_tail": lambda frames, _: _ends(frames, 0, 1),
    "image_head_tail": lambda frames, _: _ends(frames, 1, 1),
}
