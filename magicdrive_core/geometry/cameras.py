"""The ring of six cameras, pinhole projection, and how resizing and cropping move pixels.

Camera frames are those of nuScenes: x right, y down, z forward; pixel centres are at integer + 0.5 of the full 1600x900
picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Order of views in the network: clockwise seen from above, so that neighbours in the list are neighbours on the car.
VIEWS = (
    "CAM_FRONT_LEFT",
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_RIGHT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
)
PICTURE_HEIGHT, PICTURE_WIDTH = 900, 1600


def ring_neighbours(views: int) -> list[tuple[int, int]]:
    """List the left and right neighbour of every view of a closed ring.

    Args:
        views: number of views V, in the order of ``VIEWS`` (clockwise seen from above).

    Returns:
        V pairs (left, right) of view indices; with one or two views, neighbours are equal.
    """
    return [((view - 1) % views, (view + 1) % views) for view in range(views)]


@dataclass(frozen=True)
class Framing:
    """The way a 1600x900 picture becomes a video frame: resized by ``ratio``, then ``crop`` rows cut off the top.

    224x400: ratio 1/4, 1 row; 424x800: 1/2, 26 rows; 848x1600: 1, 52 rows (golden notes, section 1).
    """

    height: int  # of the video, pixels
    width: int

    @property
    def ratio(self) -> float:
        """Video pixels for each picture pixel, along one axis."""
        return self.width / PICTURE_WIDTH

    @property
    def resized_height(self) -> int:
        """Rows of the resized picture, before the crop."""
        return int(PICTURE_HEIGHT * self.ratio)

    @property
    def crop(self) -> int:
        """Rows cut off the top of the resized picture."""
        return self.resized_height - self.height

    @property
    def matrix(self) -> Array:
        """The matrix from picture pixels to video pixels: scale by ``ratio``, shift by -``crop`` rows.

        Returns:
            (4, 4), to be applied to pixels written as (column, row, depth, 1); depth does not change.
        """
        out = np.eye(4)
        out[0, 0] = out[1, 1] = self.ratio
        out[1, 3] = -self.crop
        return out


def full_window(width: int, height: int) -> tuple[float, float, float, float]:
    """Find the window of a picture that views show: the largest central one of 16:9.

    Intrinsics refer to this window, scaled to 1600x900.

    Args:
        width: width of the picture in pixels.
        height: height of the picture in pixels.

    Returns:
        Left, top, right and bottom in pixels of the picture; the whole picture if it is 16:9.
    """
    ratio = min(width / PICTURE_WIDTH, height / PICTURE_HEIGHT)
    left, top = (width - ratio * PICTURE_WIDTH) / 2, (height - ratio * PICTURE_HEIGHT) / 2
    return left, top, left + ratio * PICTURE_WIDTH, top + ratio * PICTURE_HEIGHT


def project(points: Array, intrinsics: Array) -> tuple[Array, Array]:
    """Project points of a camera frame by a pinhole camera.

    Args:
        points: (..., 3) metres.
        intrinsics: (3, 3) pixels.

    Returns:
        Pixels (..., 2) as (column, row), meaningful where the depth is positive; and depth (...) in metres.
    """
    image = np.asarray(points) @ intrinsics.T
    depth = image[..., 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        return image[..., :2] / depth[..., None], depth
