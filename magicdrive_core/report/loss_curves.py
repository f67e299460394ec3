"""Loss curves as inline SVG, coloured by the page's own style sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import floor, isfinite, log10
from pathlib import Path

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.tracking.runs import first_and_last

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 12, 28
WINDOW = 1 / 20  # of the steps on either side: what the bold line averages


@dataclass(frozen=True)
class Curve:
    """The losses of one training stage."""

    stage: str
    steps: list[int]
    losses: list[float]

    @classmethod
    def read(cls, stage: str, run_folder: Path) -> Curve | None:
        """Reads ``metrics.jsonl`` of a run; None where there is no step in it.

        Raises:
            MagicDriveError: a line is not a step's.
        """
        path = run_folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        try:
            rows = [json.loads(line) for line in lines]
            points = [(int(row["step"]), float(row["loss"])) for row in rows if isfinite(row["loss"])]
        except (ValueError, KeyError, TypeError) as error:
            raise MagicDriveError(f"{path} holds a line that is no step: {error}", "delete the run's folder") from None
        return cls(stage, [s for s, _ in points], [v for _, v in points]) if points else None

    @property
    def first(self) -> float:
        """Where the losses began (``first_and_last``)."""
        return first_and_last(self.losses)[0]

    @property
    def last(self) -> float:
        """Where they ended."""
        return first_and_last(self.losses)[1]

    def svg(self) -> str:
        """The curve: every step thin, its running mean bold, axes with round numbers."""
        low, high, tick = _axis(min(self.losses), max(self.losses))
        span = max(1, self.steps[-1] - self.steps[0])

        def x(step: float) -> float:
            return LEFT + (step - self.steps[0]) / span * (WIDTH - LEFT - RIGHT)

        def y(loss: float) -> float:
            return TOP + (high - loss) / (high - low) * (HEIGHT - TOP - BOTTOM)

        parts = [f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss of {self.stage}">']
        for n in range(round((high - low) / tick) + 1):
            value = low + n * tick
            row = f"{y(value):.1f}"
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{row}" y2="{row}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 7}" y="{row}" dy="3.5" text-anchor="end">{value:.3g}</text>')
        for step, anchor in ((self.steps[0], "start"), (self.steps[-1], "end")):
            text = f'<text class="tick" x="{x(step):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">step {step}</text>'
            parts.append(text)
        for name, values in (("raw", self.losses), ("mean", _running_mean(self.losses))):
            path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in _thinned(self.steps, values))
            parts.append(f'<polyline class="{name}" points="{path}"/>')
        return "".join([*parts, "</svg>"])


def _axis(low: float, high: float) -> tuple[float, float, float]:
    """Round ends and distance of about four ticks."""
    raw = max(high - low, abs(high) * 0.02, 1e-6) / 4
    size = 10.0 ** floor(log10(raw))
    tick = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw)
    bottom, top = floor(low / tick), -floor(-high / tick)
    return bottom * tick, max(top, bottom + 1) * tick, tick


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a centred window, which does not lag behind; what lies beyond the ends is left out."""
    sums = [0.0, *accumulate(values)]
    half = round(len(values) * WINDOW)
    spans = [(max(0, index - half), min(len(values), index + half + 1)) for index in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in spans]


def _thinned(steps: Sequence[int], values: Sequence[float]) -> list[tuple[int, float]]:
    """At most some 1,000 points: a line has no more pixels than that."""
    stride = max(1, len(steps) // 1000)
    return list(zip(steps[::stride], values[::stride], strict=True))
