"""Loss curves of training stages as inline SVG, drawn by matplotlib in the colours of the page's style sheet."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite
from pathlib import Path
from typing import Any

from matplotlib import rc_context, style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from magicdrive_core.tracking.runs import first_and_last
from magicdrive_core.training.metrics_file import METRICS, read_metrics

SIZE = (5.4, 2.7)  # inches, width and height
WINDOW = 1 / 20  # share of the steps on either side that the running mean covers
MOST_POINTS = 1000  # of a line: it has no more pixels

# Colours that stand for variables of the page's style sheet, so that curves follow its light and its dark scheme.
ACCENT, SOFT, LINE = "#010203", "#040506", "#070809"
VARIABLES = {ACCENT: "var(--accent)", SOFT: "var(--soft)", LINE: "var(--line)"}

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "magicdrive",  # equal curves give equal bytes
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}


@dataclass(frozen=True)
class Curve:
    """The losses of one training stage.

    Attributes:
        stage: Name of the stage.
        steps: The logged steps whose loss is finite, in order.
        losses: The loss of each of these steps.
    """

    stage: str
    steps: list[int]
    losses: list[float]

    @classmethod
    def read(cls, stage: str, run_folder: Path) -> Curve | None:
        """Read the losses of a training stage from ``metrics.jsonl``; skipped steps are left out.

        Args:
            stage: Name of the stage.
            run_folder: Folder of the stage's run.

        Returns:
            The curve; None if the file is missing or holds no such step.
        """
        rows = read_metrics(run_folder / METRICS)
        points = [(row["step"], row["loss"]) for row in rows if row["loss"] is not None and isfinite(row["loss"])]
        return cls(stage, [s for s, _ in points], [v for _, v in points]) if points else None

    @property
    def first(self) -> float:
        """Mean loss at the start of the run (``first_and_last``)."""
        return first_and_last(self.losses)[0]

    @property
    def last(self) -> float:
        """Mean loss at the end of the run (``first_and_last``)."""
        return first_and_last(self.losses)[1]

    def svg(self) -> str:
        """Draw the curve as an SVG element: each step as a thin line, the running mean as a bold one.

        Returns:
            The element ``<svg>`` as text, without style sheet or metadata; its colours are variables of the page's
            style sheet. The same curve gives the same text.
        """
        line: dict[str, Any] = {
            "color": ACCENT,
            "solid_capstyle": "round",
            "clip_on": False,  # a clip path would be a link by URL
        }
        with style.context("default"), rc_context(STYLE):  # whatever other libraries have set
            figure = Figure(figsize=SIZE, layout="constrained")
            axes = figure.subplots()
            for values, width, alpha in ((self.losses, 0.8, 0.35), (_running_mean(self.losses), 2.0, 1.0)):
                steps, shown = zip(*_thinned(self.steps, values), strict=True)
                # Twice the last point: a single one is drawn as a dot, by the round ends of its line.
                axes.plot((*steps, steps[-1]), (*shown, shown[-1]), linewidth=width, alpha=alpha, **line)
            axes.grid(axis="y", clip_on=False)
            axes.tick_params(bottom=False, left=False)
            axes.margins(x=0.01)
            axes.set_xlabel("step")
            axes.set_ylabel("loss")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg ") :]  # without the headers of a file
        svg = re.sub("<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)  # styles would leak
        svg = re.sub(' id="[^"]*"', "", svg)  # nothing refers to them, and several curves share a page
        svg = svg.replace("<svg ", f'<svg class="curve" role="img" aria-label="loss of {self.stage}" ', 1)
        for colour, variable in VARIABLES.items():
            svg = svg.replace(colour, variable)
        return svg


def _running_mean(values: Sequence[float]) -> list[float]:
    """Average over a centred window, which does not lag behind; it is cut off at both ends."""
    sums = [0.0, *accumulate(values)]
    half = round(len(values) * WINDOW)
    spans = [(max(0, index - half), min(len(values), index + half + 1)) for index in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in spans]


def _thinned(steps: Sequence[int], values: Sequence[float]) -> list[tuple[int, float]]:
    """Keep every n-th point, so that about ``MOST_POINTS`` are left."""
    stride = max(1, len(steps) // MOST_POINTS)
    return list(zip(steps[::stride], values[::stride], strict=True))
