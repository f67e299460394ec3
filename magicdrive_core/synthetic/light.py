"""Day, night and rain: the colours of sky and ground, haze, and lamp light."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from magicdrive_core.geometry import poses
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH
from magicdrive_core.synthetic.camera import PosedCamera
from magicdrive_core.synthetic.city import TOWNS
from magicdrive_core.synthetic.ground import SHADOW, WET, Label

Array = NDArray[np.float64]
Picture = NDArray[np.uint8]  # (900, 1600, 3) blue, green, red

COARSE = 8  # side of a cell of the lamp light map, in pixels
HEAD_LAMPS = ((2.2, 16.0), (4.5, 34.0))  # dipped beams, two lobes: half width at the car and reach, metres
STREET_LAMP_REACH = 9.0  # metres

RGB = tuple[float, float, float]
# Red, green and blue in daylight.
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
# What is different in the second town.
SECOND_GROUND = {
    Label.LAND: (170, 150, 108),
    Label.WALKWAY: (182, 132, 112),
    Label.ROAD: (122, 110, 100),
    Label.ROAD_BLOCK: (130, 118, 108),
    Label.CARPARK: (128, 112, 96),
    Label.ROAD_DIVIDER: (240, 240, 236),
    Label.KERB: (120, 120, 124),
}


@dataclass(frozen=True)
class Light:
    """The lighting of a scene.

    Colours are red, green and blue from 0 to 255; brightness factors multiply them.
    """

    zenith: RGB
    horizon: RGB  # colour of the sky at the horizon and of distant haze
    clouds: tuple[RGB, RGB]  # lit and shaded side
    skyline: RGB
    ambient: float  # brightness of a surface that faces away from the sun
    sun: float  # brightness that direct sun adds
    sun_from: RGB  # unit vector to the sun, global frame
    shadow: float  # brightness factor of the ground in shadow
    haze: float  # metres at which a colour is 63 % haze
    ground: float  # brightness factor of the ground
    shining: bool = False  # whether lamps and windows are lit
    wet: bool = False  # whether roads mirror the scene
    dark: bool = False  # whether only lamps light the ground
    second_town: bool = False  # whether ground and surfaces have the colours of the second town

    @property
    def shadow_step(self) -> Array:
        """Offset of the shadow of a point one metre above the ground.

        Returns:
            (2,) metres along x and y of the global frame; zeros without sun.
        """
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
LAMP_COLOUR = np.array([1.0, 0.93, 0.78])  # red, green and blue factors of lamp light
NIGHT_FLOOR = 0.15  # brightness factor where no lamp shines


def light_of(description: str, location: str = "") -> Light:
    """Choose the lighting from words of a scene's description.

    Args:
        description: description of the scene, such as "Night, rain, turn left".
        location: name of the map; those of the second town have its colours.

    Returns:
        ``NIGHT`` for a word of night, otherwise ``RAIN`` for a word of rain, otherwise ``DAY``.
    """
    light = _light_in(description)
    return replace(light, second_town=True) if location in TOWNS["second"] else light


def _light_in(description: str) -> Light:
    words = set(re.findall(r"[a-z]+", description.lower()))
    if words & {"night", "nighttime", "dark"}:
        return NIGHT
    return RAIN if words & {"rain", "rainy", "raining"} else DAY


def colourise(labels: NDArray[np.uint8], camera: PosedCamera, light: Light) -> Picture:
    """Colour the labels of sky and ground, with more haze towards the horizon.

    Args:
        labels: (900, 1600) labels of ``ground``.
        camera: the camera.
        light: the lighting.

    Returns:
        (900, 1600, 3) blue, green, red.
    """
    starts = _bands(camera.horizon)
    ends = [*starts[1:], PICTURE_HEIGHT]
    picture = np.empty((PICTURE_HEIGHT, PICTURE_WIDTH, 3), np.uint8)
    middles = (np.array(starts) + np.array(ends)) / 2
    for start, end, palette in zip(starts, ends, _palettes(middles, camera, light), strict=True):
        cv2.applyColorMap(labels[start:end], palette[:, None], dst=picture[start:end])
    return picture


def _bands(horizon: float) -> list[int]:
    """List the first rows of bands that share a palette; bands are higher where haze changes slowly."""
    starts = [0]
    while starts[-1] < PICTURE_HEIGHT:
        below = starts[-1] - horizon
        step = 4 if below < 0 else 2 if below < 24 else 4 if below < 80 else 12 if below < 200 else 32
        starts.append(starts[-1] + step)
    return starts[:-1]


def _palettes(rows: Array, camera: PosedCamera, light: Light) -> NDArray[np.uint8]:
    """Compute the colour of every label at R rows: (R, 256, 3) blue, green, red."""
    below = (rows - camera.horizon) / camera.intrinsics[1, 1]  # tangent of the angle below the horizon
    distance = camera.height / np.maximum(below, 1e-3)
    clear = np.exp(-distance / light.haze)[:, None]
    horizon = np.array(light.horizon)
    out = np.zeros((len(rows), 256, 3))
    high = (1 - np.exp(-np.maximum(-below, 0) * 3.2))[:, None]
    out[:, Label.SKY] = horizon + (np.array(light.zenith) - horizon) * high
    for label, cloud in zip((Label.CLOUD, Label.CLOUD_SHADE), light.clouds, strict=True):
        out[:, label] = horizon + (np.array(cloud) - horizon) * np.minimum(1, 0.35 + 1.6 * high)
    out[:, Label.FAR] = horizon + (np.array(light.skyline) - horizon) * 0.55
    out[:, Label.TREES] = horizon + (np.array(light.skyline) - horizon) * 0.95
    for label, daylight in (GROUND | SECOND_GROUND if light.second_town else GROUND).items():
        colour = np.array(daylight) * light.ground * (LAMP_COLOUR if light.dark else 1)
        if light.wet and label in WET:
            colour = colour * 0.82 + horizon * 0.14  # the sky in the water
        for flag, share in ((0, 1.0), (SHADOW, light.shadow)):
            out[:, label | flag] = horizon + (colour * share - horizon) * clear
    return np.rint(out[..., ::-1]).astype(np.uint8)


def lamp_light(points: Array, camera: PosedCamera, lamps: Array) -> Array:
    """Compute the lamp light at points on the ground at night.

    Args:
        points: (N, 2) metres in the global frame.
        camera: the camera; the dipped beams of the ego car shine forward.
        lamps: (M, 2) positions of street lamps in metres of the global frame.

    Returns:
        (N,) brightness from ``NIGHT_FLOOR`` (no lamp) to 1.
    """
    ego = poses.inverse(camera.ego_to_global) @ camera.lift
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


def darken(picture: Picture, camera: PosedCamera, lamps: Array) -> None:
    """Darken the ground of a picture to what lamps light at night, in place.

    Args:
        picture: (900, 1600, 3) blue, green, red.
        camera: the camera.
        lamps: (M, 2) positions of street lamps in metres of the global frame.
    """
    first = int(np.clip(camera.horizon - 40, 0, PICTURE_HEIGHT - COARSE)) // COARSE  # the horizon may be tilted
    rows, columns = -(-PICTURE_HEIGHT // COARSE) - first, PICTURE_WIDTH // COARSE
    v, u = np.mgrid[first : first + rows, :columns].reshape(2, -1) * float(COARSE) + COARSE / 2
    (fx, _, cx), (_, fy, cy) = camera.intrinsics[:2]
    ray = np.stack([(u - cx) / fx, (v - cy) / fy, np.ones_like(u)], axis=1) @ camera.camera_to_global[:3, :3].T
    drop = ray @ camera.ego_to_global[:3, 2]
    down = drop < -0.004
    points = camera.eye[:2] + ray[down, :2] * (-camera.height / drop[down])[:, None]
    coarse = np.full(len(ray), 255, np.uint8)
    coarse[down] = np.rint(255 * lamp_light(points, camera, lamps))
    coarse = coarse.reshape(rows, columns)
    fine = cv2.resize(coarse, None, fx=COARSE, fy=COARSE, interpolation=cv2.INTER_LINEAR_EXACT)
    ground = picture[first * COARSE :]
    cv2.multiply(ground, cv2.cvtColor(fine[: len(ground)], cv2.COLOR_GRAY2BGR), dst=ground, scale=1 / 255)
