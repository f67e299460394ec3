"""The sensor rig of the generated ego car, and stable tokens and rounding for its records.

The calibration is a real nuScenes one, rounded. Tokens are hashes of names and numbers are rounded, so that equal
settings give equal bytes on every machine.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH


def token(*names: object) -> str:
    """Hash names to a record token in the form of nuScenes tokens.

    Args:
        names: what the token stands for, from general to particular.

    Returns:
        32 hex digits.
    """
    return hashlib.md5("/".join(map(str, names)).encode(), usedforsecurity=False).hexdigest()


def rounded(values: ArrayLike, digits: int = 4) -> list[float]:
    """Round a vector for a table, without negative zeros.

    Args:
        values: (n,) numbers.
        digits: decimal places.

    Returns:
        n numbers.
    """
    return [round(float(value), digits) + 0.0 for value in np.asarray(values)]


def heading_quaternion(heading: float) -> list[float]:
    """Compute the quaternion of a rotation about the vertical axis.

    Args:
        heading: radians, counter-clockwise seen from above.

    Returns:
        w, x, y, z, rounded to 7 decimal places.
    """
    return rounded([np.cos(heading / 2), 0, 0, np.sin(heading / 2)], 7)


Triple = tuple[float, float, float]
Quaternion = tuple[float, float, float, float]

KEY_PERIOD = 500_000  # microseconds between key frames
CAMERA_STEPS = 6  # camera records in each period between key frames: 12 Hz
LIDAR_STEPS = 10  # lidar records in each period between key frames: 20 Hz
LIDAR = "LIDAR_TOP"


@dataclass(frozen=True)
class Sensor:
    """The calibration of a sensor, and the time at which it fires."""

    channel: str
    translation: Triple  # metres in the ego frame
    rotation: Quaternion  # sensor to ego: w, x, y, z
    delay: int  # microseconds after the lidar's time stamp; negative: cameras fire before it
    focal: float = 0.0  # pixels; 0 for the lidar
    centre: tuple[float, float] = (0.0, 0.0)  # principal point in pixels

    @property
    def is_camera(self) -> bool:
        """Whether the sensor is a camera."""
        return self.focal > 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of pictures in pixels as in ``sample_data``; zeros for the lidar."""
        return (PICTURE_HEIGHT, PICTURE_WIDTH) if self.is_camera else (0, 0)

    @property
    def intrinsic(self) -> list[list[float]]:
        """The 3x3 intrinsics as in ``calibrated_sensor``; empty for the lidar."""
        if not self.is_camera:
            return []
        (x, y), f = self.centre, self.focal
        return [[f, 0.0, x], [0.0, f, y], [0.0, 0.0, 1.0]]


# fmt: off
SENSORS = (
    Sensor("CAM_FRONT", (1.7008, 0.0159, 1.5110), (-0.499802, 0.503032, -0.499780, 0.497371),
           -35_500, 1266.417, (816.267, 491.507)),
    Sensor("CAM_FRONT_RIGHT", (1.5508, -0.4934, 1.4957), (0.206035, -0.202694, 0.682451, -0.671361),
           -27_600, 1260.847, (807.968, 495.334)),
    Sensor("CAM_FRONT_LEFT", (1.5239, 0.4946, 1.5093), (0.675727, -0.673627, 0.212140, -0.211228),
           -43_100, 1272.598, (826.615, 479.752)),
    Sensor("CAM_BACK", (0.0283, 0.0035, 1.5791), (0.503787, -0.497407, -0.494185, 0.504550),
           -10_400, 809.221, (829.220, 481.778)),
    Sensor("CAM_BACK_LEFT", (1.0357, 0.4848, 1.5910), (-0.692419, 0.703162, 0.116483, -0.112033),
           -500, 1256.741, (792.113, 492.776)),
    Sensor("CAM_BACK_RIGHT", (1.0149, -0.4806, 1.5624), (-0.122810, 0.132401, 0.700431, -0.690496),
           -20_100, 1259.514, (807.253, 501.196)),
    Sensor(LIDAR, (0.9437, 0.0, 1.8402), (0.707796, -0.006492, 0.010646, -0.706307), 0),
)
# fmt: on
