"""Day, night and rain: what they do to colours."""

from __future__ import annotations

import re
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from magicdrive_core.geometry import poses
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH
from magicdrive_core.synthetic.ground import SHADOW, WET, Label
from magicdrive_core.synthetic.lens import Lens

Array = NDArray[np.float64]
Picture = NDArray[np.uint8]  # (900, 1600, 3) blue, green, red

COARSE = 8  # pixels a side of a cell of the map of lamp light
HEAD_LAMPS = ((2.2, 16.0), (4.5, 34.0))  # dipped beams: half width at the car and reach, metres, of two lobes
STREET_LAMP_REACH = 9.0  # metres

RGB = tuple[float, float, float]
# Red, green, blue by daylight.
GROUND = {
    Label.LAND: (112, 122, 84),
    Label.WALKWAY: (176, 168, 154),
    Label.ROAD: (98, 99, 103),
    Label.ROAD_BLOCK: (108, 109, 112),
    Label.CARPARK: (92, 98, 112),
    Label.CROSSING: (232, 232, 226),
    Label.STOP_LINE: (214, 206, 214),
    Label.ROAD_DIVIDER: (236, 190, 60),
    Label.LANE_DIVIDER: (226, 226, 222),
    Label.KERB: (206, 200, 188),
}


@dataclass(frozen=True)
class Light:
    """The light of a scene."""

    zenith: RGB
    horizon: RGB  # of the sky, and of the haze in the distance
    clouds: tuple[RGB, RGB]  # sunlit and shaded side
    skyline: RGB
    ambient: float  # share of a colour that a surface turned from the sun shows
    sun: float  # what the sun adds where it shines straight
    sun_from: RGB  # unit vector to the sun, global frame
    shadow: float  # share of a ground colour that is left in shadow
    haze: float  # metres after which a colour is two thirds haze
    ground: float  # brightness of the ground
    shining: bool = False  # lamps and windows
    wet: bool = False
    dark: bool = False  # lit by lamps only

    @property
    def shadow_step(self) -> Array:
        """Metres (2,) by which the shadow of a point one metre high lies off."""
        x, y, z = self.sun_from
        return np.array([-x / z, -y / z]) if self.sun else np.zeros(2)


# fmt: off
DAY = Light(
    zenith=(92, 146, 208), horizon=(206, 220, 232), clouds=((246, 247, 249), (218, 224, 232)), skyline=(150, 166, 170),
    ambient=0.68, sun=0.42, sun_from=(0.48, 0.36, 0.8), shadow=0.6, haze=420.0, ground=1.0,
)
RAIN = Light(
    zenith=(142, 150, 160), horizon=(188, 193, 198), clouds=((180, 185, 190), (148, 155, 164)), skyline=(146, 154, 160),
    ambient=0.7, sun=0.0, sun_from=(0.0, 0.0, 1.0), shadow=0.72, haze=130.0, ground=0.74, shining=True, wet=True,
)
NIGHT = Light(
    zenith=(9, 12, 26), horizon=(34, 36, 52), clouds=((20, 23, 38), (15, 18, 32)), skyline=(20, 22, 32),
    ambient=1.0, sun=0.0, sun_from=(0.0, 0.0, 1.0), shadow=0.55, haze=160.0, ground=1.0, shining=True, dark=True,
)
# fmt: on
LAMP_COLOUR = np.array([1.0, 0.93, 0.78])  # red, green, blue of lamp light
NIGHT_FLOOR = 0.15  # of a colour that is left where no lamp shines


def light_of(description: str) -> Light:
    """The light that a scene's description tells of: nuScenes names night and rain in words."""
    words = set(re.findall(r"[a-z]+", description.lower()))
    if words & {"night", "nighttime", "dark"}:
        return NIGHT
    return RAIN if words & {"rain", "rainy", "raining"} else DAY


def colourise(labels: NDArray[np.uint8], lens: Lens, light: Light) -> Picture:
    """Colours of the sky and the ground, with haze growing towards the horizon."""
    starts = _bands(lens.horizon)
    ends = [*starts[1:], PICTURE_HEIGHT]
    picture = np.empty((PICTURE_HEIGHT, PICTURE_WIDTH, 3), np.uint8)
    middles = (np.array(starts) + np.array(ends)) / 2
    for start, end, palette in zip(starts, ends, _palettes(middles, lens, light), strict=True):
        cv2.applyColorMap(labels[start:end], palette[:, None], dst=picture[start:end])
    return picture


def _bands(horizon: float) -> list[int]:
    """First rows of bands that share one palette: high ones far from the horizon, where haze changes slowly."""
    starts = [0]
    while starts[-1] < PICTURE_HEIGHT:
        below = starts[-1] - horizon
        step = 4 if below < 0 else 2 if below < 24 else 4 if below < 80 else 12 if below < 200 else 32
        starts.append(starts[-1] + step)
    return starts[:-1]


def _palettes(rows: Array, lens: Lens, light: Light) -> NDArray[np.uint8]:
    """Blue, green, red of every label at each of R rows: (R, 256, 3)."""
    below = (rows - lens.horizon) / lens.intrinsics[1, 1]  # tangent of the angle under the horizon
    distance = lens.height / np.maximum(below, 1e-3)
    clear = np.exp(-distance / light.haze)[:, None]
    horizon = np.array(light.horizon)
    out = np.zeros((len(rows), 256, 3))
    high = (1 - np.exp(-np.maximum(-below, 0) * 3.2))[:, None]
    out[:, Label.SKY] = horizon + (np.array(light.zenith) - horizon) * high
    for label, cloud in zip((Label.CLOUD, Label.CLOUD_SHADE), light.clouds, strict=True):
        out[:, label] = horizon + (np.array(cloud) - horizon) * np.minimum(1, 0.35 + 1.6 * high)
    out[:, Label.FAR] = horizon + (np.array(light.skyline) - horizon) * 0.55
    out[:, Label.TREES] = horizon + (np.array(light.skyline) - horizon) * 0.95
    for label, daylight in GROUND.items():
        colour = np.array(daylight) * light.ground * (LAMP_COLOUR if light.dark else 1)
        if light.wet and label in WET:
            colour = colour * 0.82 + horizon * 0.14  # the sky in the water
        for flag, share in ((0, 1.0), (SHADOW, light.shadow)):
            out[:, label | flag] = horizon + (colour * share - horizon) * clear
    return np.rint(out[..., ::-1]).astype(np.uint8)


def lamp_light(points: Array, lens: Lens, lamps: Array) -> Array:
    """How brightly lamps light places on the ground at night, 0 to 1.

    Args:
        points: (N, 2) metres in the global frame.
        lens: the camera; the ego's dipped beams shine ahead of its car.
        lamps: (M, 2) street lamps.
    """
    ego = poses.inverse(lens.ego_to_global) @ lens.lift
    ahead = points @ ego[0, :2] + ego[0, 2]
    left = points @ ego[1, :2] + ego[1, 2]
    beyond = np.maximum(ahead - 3.5, 0)
    level = np.full(len(points), NIGHT_FLOOR)
    before = 1 - np.exp(-np.maximum(ahead - 2.5, 0))
    for width, reach in HEAD_LAMPS:
        level += 0.34 * before * np.exp(-((left / (width + 0.2 * beyond)) ** 2) - (beyond / reach) ** 2)
    for x, y in lamps:
        square = (points[:, 0] - x) ** 2 + (points[:, 1] - y) ** 2
        close = square < (2.5 * STREET_LAMP_REACH) ** 2
        level[close] += 0.38 * np.exp(-square[close] / STREET_LAMP_REACH**2)
    return np.minimum(level, 1.0)


def darken(picture: Picture, lens: Lens, lamps: Array) -> None:
    """Leaves of the ground what lamps (M, 2) light at night."""
    first = int(np.clip(lens.horizon - 40, 0, PICTURE_HEIGHT - COARSE)) // COARSE  # the horizon may lean
    rows, columns = -(-PICTURE_HEIGHT // COARSE) - first, PICTURE_WIDTH // COARSE
    v, u = np.mgrid[first : first + rows, :columns].reshape(2, -1) * float(COARSE) + COARSE / 2
    (fx, _, cx), (_, fy, cy) = lens.intrinsics[:2]
    ray = np.stack([(u - cx) / fx, (v - cy) / fy, np.ones_like(u)], axis=1) @ lens.camera_to_global[:3, :3].T
    drop = ray @ lens.ego_to_global[:3, 2]
    down = drop < -0.004
    places = lens.eye[:2] + ray[down, :2] * (-lens.height / drop[down])[:, None]
    coarse = np.full(len(ray), 255, np.uint8)
    coarse[down] = np.rint(255 * lamp_light(places, lens, lamps))
    coarse = coarse.reshape(rows, columns)
    fine = cv2.resize(coarse, None, fx=COARSE, fy=COARSE, interpolation=cv2.INTER_LINEAR_EXACT)
    ground = picture[first * COARSE :]
    cv2.multiply(ground, cv2.cvtColor(fine[: len(ground)], cv2.COLOR_GRAY2BGR), dst=ground, scale=1 / 255)
