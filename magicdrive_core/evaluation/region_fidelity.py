"""Agreement of pictures with the exact regions of their scenes, by region: IoU, contrast and PSNR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from magicdrive_core.evaluation.region_classifier import Frame, RegionClassifier
from magicdrive_core.synthetic.regions import Region
from magicdrive_core.video.colour import Picture

STANDS_OUT = (Region.MARK, Region.VEHICLE)  # regions that differ from what is around them wherever they are
RING = 5  # pixels along each side of the kernel that widens a region to its surroundings


@dataclass(frozen=True)
class Fidelity:
    """Agreement of pictures with the exact regions of their scenes.

    Attributes:
        iou: Intersection over union by region, 0 to 1, both summed over all pictures; NaN where neither side has the
            region.
        contrast: For marks and vehicles: the classifier's mean probability of the region inside it, less that in the
            ring around it. 1 at best, 0 where pictures ignore the positions, NaN without any. Faint marks count, which
            IoU leaves out.
        psnr: dB against the rendered pictures; infinite for equal pictures.
    """

    iou: dict[Region, float]
    contrast: dict[Region, float]
    psnr: float

    def row(self) -> dict[str, float]:
        """Collect all figures by name, in the order of the table's columns.

        Returns:
            IoUs by the region's name in lower case ("road"), contrasts by that name with "_contrast", and "psnr" in dB.
        """
        values = {region.name.lower(): value for region, value in self.iou.items()}
        contrasts = {f"{region.name.lower()}_contrast": value for region, value in self.contrast.items()}
        return {**values, **contrasts, "psnr": self.psnr}

    def shares_of(self, ceiling: Fidelity) -> dict[str, float]:
        """Divide IoUs and contrasts by those of an upper limit.

        Args:
            ceiling: The upper limit, such as the pictures after the VAE.

        Returns:
            By the names of ``row``, without the PSNR; NaN where either has no such region or the limit is 0.
        """
        limits = ceiling.row()
        return {
            name: value / limits[name] if limits[name] else float("nan")
            for name, value in self.row().items()
            if name != "psnr"
        }


class FidelityTally:
    """Sums of agreement over pictures, one after the other.

    Args:
        classifier: Finds regions by colour.
    """

    def __init__(self, classifier: RegionClassifier) -> None:
        self._classifier = classifier
        self._hits, self._either = np.zeros(len(Region)), np.zeros(len(Region))
        self._inside, self._around = np.zeros((len(STANDS_OUT), 2)), np.zeros((len(STANDS_OUT), 2))  # sums, pixels
        self._squares, self._pictures = 0.0, 0

    def add(self, picture: Picture, truth: Frame) -> None:
        """Count a picture.

        Args:
            picture: RGB picture (H, W, 3).
            truth: Its exact regions, and the rendered picture.

        Raises:
            ValueError: The sizes of picture and truth differ.
        """
        if picture.shape != truth.picture.shape:
            raise ValueError(f"the picture has shape {picture.shape}, its truth {truth.picture.shape}")
        shares = self._classifier.shares(truth.light, picture)
        found = shares.argmax(axis=-1)
        for region in Region:
            mine, true = found == region, truth.regions == region
            self._hits[region] += (mine & true).sum()
            self._either[region] += (mine | true).sum()
        for number, region in enumerate(STANDS_OUT):
            place = truth.regions == region
            widened = cv2.dilate(place.astype(np.uint8), np.ones((RING, RING), np.uint8)) > 0
            for sums, pixels in ((self._inside, place), (self._around, widened & ~place)):
                sums[number] += shares[pixels, region].sum(dtype=np.float64), pixels.sum()
        self._squares += float(np.square(picture.astype(np.float64) - truth.picture).mean())
        self._pictures += 1

    def figures(self) -> Fidelity:
        """Compute the figures over all pictures together.

        Returns:
            The figures; NaN where nothing was counted.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            iou = self._hits / self._either
            contrast = self._inside[:, 0] / self._inside[:, 1] - self._around[:, 0] / self._around[:, 1]
            psnr = 10 * np.log10(255**2 * self._pictures / np.float64(self._squares))
        return Fidelity(
            {region: float(iou[region]) for region in Region},
            {region: float(value) for region, value in zip(STANDS_OUT, contrast, strict=True)},
            float(psnr),
        )


def measure_fidelity(classifier: RegionClassifier, pictures: Sequence[Picture], truth: Sequence[Frame]) -> Fidelity:
    """Compare pictures with the exact regions of their scenes.

    Args:
        classifier: Finds regions by colour.
        pictures: RGB pictures (H, W, 3).
        truth: The exact regions of each picture, in the same order.

    Returns:
        The figures over all pictures together.

    Raises:
        ValueError: Numbers or sizes of pictures and truth differ.
    """
    tally = FidelityTally(classifier)
    for picture, frame in zip(pictures, truth, strict=True):
        tally.add(picture, frame)
    return tally.figures()
