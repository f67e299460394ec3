"""How a clip that is longer than what the network samples at once is cut into windows. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

STRIDE = 4  # frames of a latent frame, the first excepted (the VAE's TIME_STRIDE, whose module needs torch)


@dataclass(frozen=True)
class Window:
    """Frames that are sampled at once."""

    start: int  # in the clip
    frames: int  # 8n+1
    given: int  # latent frames at its beginning that are there already: of the window before, or first frames

    @property
    def given_frames(self) -> int:
        """Pictures that the given latent frames stand for."""
        return given_frames(self.given)


def given_frames(latents: int) -> int:
    """Pictures of so many latent frames at the beginning of a window: the first one stands for one, others for four."""
    return STRIDE * (latents - 1) + 1 if latents else 0


def plan_windows(frames: int, longest: int, overlap: int, *, begun: bool = False) -> list[Window]:
    """Cuts a clip into windows of the longest length that overlap by at least ``overlap`` latent frames, evenly.

    None is shorter than the others: a network makes what it was trained on.

    Args:
        frames: of the clip, 8n+1.
        longest: frames of a window, 8n+1.
        overlap: latent frames, fewer than a window has.
        begun: whether the first window's ``overlap`` is given too.
    """
    first = overlap if begun else 0
    if frames <= longest:
        return [Window(0, frames, first)]
    count = 1 + -(-(frames - longest) // (longest - given_frames(overlap)))
    places = [(frames - longest) * n // (count - 1) for n in range(count)]
    starts = [start - start % STRIDE for start in places]
    shared = [(before + longest - start - 1) // STRIDE + 1 for before, start in pairwise(starts)]
    return [Window(start, longest, given) for start, given in zip(starts, [first, *shared], strict=True)]
