"""One look for everything that is drawn: colours of classes and map layers, and the font."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import ImageFont

Colour = tuple[int, int, int]

# By index into records.CLASSES; easy to tell apart on asphalt, on sky and on the dark panels.
CLASS_COLOURS: tuple[Colour, ...] = (
    (74, 158, 255),  # car
    (255, 159, 67),  # truck
    (214, 168, 96),  # construction_vehicle
    (255, 99, 132),  # bus
    (178, 132, 255),  # trailer
    (160, 174, 192),  # barrier
    (45, 212, 191),  # motorcycle
    (74, 222, 128),  # bicycle
    (250, 218, 94),  # pedestrian
    (255, 122, 69),  # traffic_cone
)

# By index into records.MAP_LAYERS: quiet areas, clear lines.
LAYER_COLOURS: tuple[Colour, ...] = (
    (60, 69, 84),  # drivable_area
    (112, 128, 160),  # ped_crossing
    (66, 84, 78),  # walkway
    (200, 104, 100),  # stop_line
    (72, 66, 98),  # carpark_area
    (232, 196, 104),  # road_divider
    (164, 178, 194),  # lane_divider
    (68, 78, 94),  # road_block
)
LAYER_ORDER = (0, 7, 4, 2, 1, 3, 6, 5)  # order of painting: areas first, lines on top

BACKGROUND: Colour = (18, 21, 27)
PAPER: Colour = (26, 30, 38)
INK: Colour = (232, 236, 241)
SOFT_INK: Colour = (148, 158, 171)
EGO: Colour = (255, 255, 255)


@lru_cache
def font(pixels: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Loads DejaVu Sans, which matplotlib ships, so that every machine draws the same letters.

    Args:
        pixels: height in pixels.
        bold: whether the bold face is loaded.

    Returns:
        The font; repeated calls share it.
    """
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), pixels)
