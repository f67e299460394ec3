"""Control fidelity on the generated city: whether roads, marks and vehicles are where the conditions put them.

Pictures are cut into regions by their colours (``colour_rule.py``), rendered and generated ones the same way, and
compared with the regions that an exact drawing of the scene has (``data/synthetic/regions.py``). A number means nothing
alone: rendered pictures show what the rule can tell at best, the VAE's reconstructions what any network could reach, an
untrained network and the exact regions of *other* clips of the same light what comes without reading conditions. Clips
that are told the map, the boxes or the text of such another clip show which condition a region is drawn by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from magicdrive_core.benchmark.colour_rule import ColourRule, Frame
from magicdrive_core.data.synthetic.light import Light
from magicdrive_core.data.synthetic.regions import Region
from magicdrive_core.video.colour import Picture

# What stands out from its surroundings wherever it is, and pixels a side of the kernel that widens it to them.
STANDS_OUT, RING = (Region.MARK, Region.VEHICLE), 5


@dataclass(frozen=True)
class Fidelity:
    """How well pictures agree with what is true.

    Attributes:
        iou: by region, intersection over union, both summed over all pictures; NaN where neither shows the region.
        contrast: of marks and of vehicles, how much likelier than its surroundings the place of one looks like one, by
            its colours: 1 at best, 0 where they are drawn regardless of their places, NaN where there are none. It sees
            faint marks, too, which IoU does not count.
        psnr: dB against the rendered pictures.
    """

    iou: dict[Region, float]
    contrast: dict[Region, float]
    psnr: float

    def row(self) -> dict[str, float]:
        """All figures by name."""
        values = {region.name.lower(): value for region, value in self.iou.items()}
        contrasts = {f"{region.name.lower()}_contrast": value for region, value in self.contrast.items()}
        return {**values, **contrasts, "psnr": self.psnr}


def measure(rule: ColourRule, pictures: Sequence[Picture], truth: Sequence[Frame]) -> Fidelity:
    """Compares pictures (H, W, 3) with what is true of them, in the same order.

    Raises:
        ValueError: another number or size of pictures than of truths.
    """
    hits, either = np.zeros(len(Region)), np.zeros(len(Region))
    inside: dict[Region, list[NDArray[np.float32]]] = {region: [] for region in STANDS_OUT}
    around: dict[Region, list[NDArray[np.float32]]] = {region: [] for region in STANDS_OUT}
    squares = 0.0
    for picture, frame in zip(pictures, truth, strict=True):
        if picture.shape != frame.picture.shape:
            raise ValueError(f"a picture of {picture.shape} for a truth of {frame.picture.shape}")
        shares = rule.shares(frame.light, picture)
        found = shares.argmax(axis=-1)
        for region in Region:
            mine, true = found == region, frame.regions == region
            hits[region] += (mine & true).sum()
            either[region] += (mine | true).sum()
        for region in STANDS_OUT:
            place = frame.regions == region
            widened = cv2.dilate(place.astype(np.uint8), np.ones((RING, RING), np.uint8)) > 0
            inside[region].append(shares[place, region])
            around[region].append(shares[widened & ~place, region])
        squares += float(np.square(picture.astype(np.float64) - frame.picture).mean())
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = hits / either
        psnr = 10 * np.log10(255**2 * len(pictures) / squares) if squares else np.inf
    contrast = {region: _mean(inside[region]) - _mean(around[region]) for region in STANDS_OUT}
    return Fidelity({region: float(iou[region]) for region in Region}, contrast, float(psnr))


def _mean(shares: Sequence[NDArray[np.float32]]) -> float:
    joined = np.concatenate(shares)
    return float(joined.mean()) if len(joined) else float("nan")


def next_of_light(lights: Sequence[Light]) -> list[int]:
    """For each scene the next one in the same light, so that light alone tells nothing.

    Raises:
        ValueError: a light has one scene only.
    """
    by_light: dict[Light, list[int]] = {}
    for index, light in enumerate(lights):
        by_light.setdefault(light, []).append(index)
    if any(len(members) < 2 for members in by_light.values()):
        raise ValueError("every light needs two scenes, so that their conditions can be exchanged")
    following = {m: members[(i + 1) % len(members)] for members in by_light.values() for i, m in enumerate(members)}
    return [following[index] for index in range(len(lights))]


def table_lines(rows: dict[str, Fidelity]) -> list[str]:
    """The comparison as lines of text: IoU of each region in percent, contrast in percent, PSNR in dB."""
    names = list(next(iter(rows.values())).row())
    label_width, widths = max(map(len, rows)), {name: max(10, len(name) + 2) for name in names}
    lines = [" " * label_width + "".join(f"{name:>{widths[name]}}" for name in names)]
    for label, fidelity in rows.items():
        values = fidelity.row()
        cells = (f"{values[name] * (1 if name == 'psnr' else 100):>{widths[name]}.1f}" for name in names)
        lines.append(f"{label:{label_width}}" + "".join(cells))
    return lines
