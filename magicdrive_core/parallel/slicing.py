"""Inference in slices: a block works on a few frames, or a few places, at a time, with the result of all at once.

All of a spatial block stays within a frame (of all views), all of a temporal block within a place of a view. So the
activations of a block, which are many times its tokens, are bounded whatever the size and length of a clip.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

ALL = slice(None)


class Slice(NamedTuple):
    """A part of the tokens, which are groups of views (G, B, T, S, C)."""

    groups: slice = ALL
    frames: slice = ALL
    places: slice = ALL

    def of(self, tokens: list[Tensor]) -> list[Tensor]:
        """Views of the part."""
        return [x[:, :, self.frames, self.places] for x in tokens[self.groups]]

    def put(self, tokens: list[Tensor], results: list[Tensor]) -> None:
        """Replaces the part: in place, unless it is the whole."""
        if self == WHOLE:
            tokens[:] = results
            return
        for x, result in zip(self.of(tokens), results, strict=True):
            x.copy_(result)

    def add(self, tokens: list[Tensor], results: list[Tensor]) -> None:
        """Adds to the part: in place, unless it is the whole."""
        if self == WHOLE:
            tokens[:] = [x + result for x, result in zip(tokens, results, strict=True)]
            return
        for x, result in zip(self.of(tokens), results, strict=True):
            x.add_(result)


WHOLE = Slice()


def slices(tokens: list[Tensor], *, temporal: bool, limit: int | None) -> list[Slice]:
    """The parts that a block may work on one after the other.

    Args:
        tokens: groups of views (G, B, T, S, C).
        temporal: whether the block attends over frames, else over places and views.
        limit: tokens of a slice, unless one frame of all views or one place of a group has more; None: all.
    """
    views = sum(len(x) for x in tokens)
    _, batch, frames, places, _ = tokens[0].shape
    if limit is None or views * batch * frames * places <= limit:
        return [WHOLE]
    if not temporal:
        return [Slice(frames=some) for some in cut(frames, limit // (views * batch * places))]
    return [
        Slice(groups=slice(group, group + 1), places=some)
        for group, x in enumerate(tokens)
        for some in cut(places, limit // (len(x) * batch * frames))
    ]


def cut(length: int, size: int) -> list[slice]:
    """``length`` in parts of ``size``, at least 1."""
    size = max(1, size)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
