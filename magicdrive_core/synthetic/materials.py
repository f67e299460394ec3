"""Materials of surfaces, each of one fixed colour, so that every class is recognisable."""

from __future__ import annotations

from enum import IntEnum, auto

import numpy as np


class Material(IntEnum):
    """Materials of objects and scenery."""

    CAR = 0
    TRUCK_CAB = auto()
    TRUCK_CARGO = auto()
    BUS = auto()
    BUS_BAND = auto()
    TRAILER = auto()
    TRAILER_STRIPE = auto()
    EXCAVATOR = auto()
    EXCAVATOR_DARK = auto()
    MOTORCYCLE = auto()
    BICYCLE = auto()
    SHIRT = auto()
    RIDER = auto()
    CYCLIST = auto()
    TROUSERS = auto()
    SKIN = auto()
    HAIR = auto()
    HELMET = auto()
    CONE = auto()
    CONE_BAND = auto()
    BARRIER = auto()
    BARRIER_BAND = auto()
    TYRE = auto()
    HUB = auto()
    GLASS = auto()
    BUMPER = auto()
    PLATE = auto()
    HEAD_LAMP = auto()
    TAIL_LAMP = auto()
    BRICK = auto()
    PLASTER = auto()
    CONCRETE = auto()
    ROOF = auto()
    WINDOW = auto()
    LIT_WINDOW = auto()
    SHOP = auto()
    TRUNK = auto()
    LEAVES = auto()
    POLE = auto()
    LANTERN = auto()


# Red, green and blue in daylight.
_COLOURS = {
    Material.CAR: (62, 104, 168),
    Material.TRUCK_CAB: (226, 228, 230),
    Material.TRUCK_CARGO: (70, 138, 92),
    Material.BUS: (196, 58, 48),
    Material.BUS_BAND: (236, 222, 196),
    Material.TRAILER: (214, 210, 202),
    Material.TRAILER_STRIPE: (52, 84, 140),
    Material.EXCAVATOR: (240, 178, 34),
    Material.EXCAVATOR_DARK: (66, 64, 62),
    Material.MOTORCYCLE: (128, 32, 38),
    Material.BICYCLE: (30, 140, 150),
    Material.SHIRT: (178, 70, 150),
    Material.RIDER: (92, 46, 50),
    Material.CYCLIST: (44, 160, 132),
    Material.TROUSERS: (48, 54, 78),
    Material.SKIN: (216, 172, 142),
    Material.HAIR: (62, 46, 38),
    Material.HELMET: (232, 232, 226),
    Material.CONE: (244, 104, 26),
    Material.CONE_BAND: (246, 244, 238),
    Material.BARRIER: (222, 74, 44),
    Material.BARRIER_BAND: (240, 238, 232),
    Material.TYRE: (34, 34, 36),
    Material.HUB: (150, 152, 156),
    Material.GLASS: (44, 56, 70),
    Material.BUMPER: (52, 54, 58),
    Material.PLATE: (232, 230, 214),
    Material.HEAD_LAMP: (244, 242, 226),
    Material.TAIL_LAMP: (186, 26, 24),
    Material.BRICK: (166, 112, 90),
    Material.PLASTER: (204, 190, 160),
    Material.CONCRETE: (158, 160, 164),
    Material.ROOF: (112, 108, 106),
    Material.WINDOW: (88, 106, 126),
    Material.LIT_WINDOW: (92, 110, 130),
    Material.SHOP: (60, 74, 92),
    Material.TRUNK: (98, 78, 60),
    Material.LEAVES: (84, 124, 60),
    Material.POLE: (110, 114, 118),
    Material.LANTERN: (222, 220, 206),
}
# What is different in the second town.
_SECOND_COLOURS = {
    Material.CAR: (176, 52, 46),
    Material.TRUCK_CAB: (44, 74, 120),
    Material.TRUCK_CARGO: (224, 216, 196),
    Material.BUS: (232, 190, 60),
    Material.BUS_BAND: (70, 72, 78),
    Material.TRAILER: (92, 120, 84),
    Material.TRAILER_STRIPE: (232, 228, 216),
    Material.MOTORCYCLE: (38, 96, 72),
    Material.BICYCLE: (196, 110, 40),
    Material.SHIRT: (232, 168, 44),
    Material.BRICK: (216, 206, 188),
    Material.PLASTER: (132, 156, 168),
    Material.CONCRETE: (178, 134, 104),
    Material.ROOF: (146, 74, 58),
    Material.LEAVES: (124, 132, 48),
}
# Red, green and blue of materials that shine when lights are on.
_SHINING = {
    Material.HEAD_LAMP: (255, 250, 224),
    Material.TAIL_LAMP: (255, 48, 36),
    Material.LIT_WINDOW: (248, 206, 128),
    Material.SHOP: (226, 190, 132),
    Material.LANTERN: (255, 234, 178),
}

COLOURS, SECOND_COLOURS = (
    np.array([colours[material] for material in Material], dtype=np.float64)
    for colours in (_COLOURS, _COLOURS | _SECOND_COLOURS)
)
SHINING = np.array([_SHINING.get(material, (-1, -1, -1)) for material in Material], dtype=np.float64)
