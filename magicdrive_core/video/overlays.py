"""Drawings of the conditions: boxes in the views, the BEV map on the ground, the scene from above.

Lidar frame as in nuScenes: x right, y forward, z up, metres. Corners of a box in the order of ``data.boxes``:
(ux, uy, uz) = (-,-,0)(-,-,1)(-,+,1)(-,+,0)(+,-,0)(+,-,1)(+,+,1)(+,+,0); the object's front is uy = -.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from magicdrive_core.geometry.cameras import Framing, project
from magicdrive_core.geometry.poses import inverse, transform
from magicdrive_core.video.colour import Picture
from magicdrive_core.video.palette import BACKGROUND, CLASS_COLOURS, EGO, LAYER_COLOURS, LAYER_ORDER

Floats = NDArray[np.float64]
Points = list[tuple[float, float]]

SMOOTH = 3  # lines are drawn this many times larger and reduced, because PIL's own have jagged edges
NEAR = 0.2  # metres in front of a camera at which boxes are cut off
RINGS = (20, 40)  # metres, radii drawn around the car in the panel from above
MAP_METRES = 100.0  # side of the BEV map, centred on the lidar

_FRONT = (0, 1, 5, 4)
_FACES = ((0, 1, 2, 3), (4, 5, 6, 7), (2, 3, 7, 6), (1, 2, 6, 5), (0, 3, 7, 4), _FRONT)  # painted in this order
_FOOTPRINT = (0, 3, 7, 4)


def draw_boxes(
    frame: Picture,
    corners: NDArray[np.floating],
    classes: NDArray[np.integer],
    intrinsics: Floats,
    camera_to_lidar: Floats,
    framing: Framing,
) -> Picture:
    """Returns a copy of a view with the boxes drawn on it.

    Args:
        frame: RGB view (H, W, 3).
        corners: (N, 8, 3) corners in metres in the lidar frame.
        classes: (N) indices into ``records.CLASSES``; -1: no box.
        intrinsics: (3, 3) camera matrix in pixels of the full-size image.
        camera_to_lidar: (4, 4) pose of the camera.
        framing: from the full-size image to ``frame``.

    Returns:
        RGB view (H, W, 3).
    """
    layer = Image.fromarray(box_layer(corners, classes, intrinsics, camera_to_lidar, framing))
    return np.asarray(Image.alpha_composite(Image.fromarray(frame).convert("RGBA"), layer).convert("RGB"))


def box_layer(
    corners: NDArray[np.floating],
    classes: NDArray[np.integer],
    intrinsics: Floats,
    camera_to_lidar: Floats,
    framing: Framing,
) -> Picture:
    """Draws boxes on a transparent background, with edges, a tinted body and a stronger front.

    Args:
        corners: (N, 8, 3) corners in metres in the lidar frame.
        classes: (N) indices into ``records.CLASSES``; -1: no box.
        intrinsics: (3, 3) camera matrix in pixels of the full-size image.
        camera_to_lidar: (4, 4) pose of the camera.
        framing: from the full-size image to the view.

    Returns:
        RGBA layer (H, W, 4).
    """
    matrix = _to_frame(framing) @ intrinsics
    planes = _frustum(matrix, framing)
    lidar_to_camera = inverse(np.asarray(camera_to_lidar, dtype=np.float64))
    known = classes >= 0
    placed = transform(lidar_to_camera, corners[known])
    # Most boxes of a scene are completely beyond one side of a view: they are left out before their faces are clipped.
    outside = (placed @ planes[:, :3].T + planes[:, 3] < 0).all(axis=1).any(axis=1)
    boxes = [(box, CLASS_COLOURS[index]) for box, index in zip(placed[~outside], classes[known][~outside], strict=True)]
    size = framing.width * SMOOTH, framing.height * SMOOTH
    layer = Image.new("RGBA", size)
    line = round(max(1.0, framing.width / 420) * SMOOTH)
    for box, colour in sorted(boxes, key=lambda item: -float(item[0][:, 2].mean())):
        faces = [(face, _visible(box[list(face)], planes, matrix)) for face in _FACES]
        area = _around([point for _, outline in faces for point in outline], line, size)
        if area is None:
            continue
        body = Image.new("RGBA", (area[2] - area[0], area[3] - area[1]))
        pen = ImageDraw.Draw(body)
        visible = [(face, [(x - area[0], y - area[1]) for x, y in outline]) for face, outline in faces if outline]
        for face, outline in visible:
            pen.polygon(outline, fill=(*colour, 70 if face == _FRONT else 28))
        for _, outline in visible:
            pen.line([*outline, outline[0]], fill=(*colour, 235), width=line, joint="curve")
        layer.alpha_composite(body, area[:2])
    return np.asarray(layer.resize((framing.width, framing.height), Image.Resampling.BOX))


def draw_ground(
    frame: Picture,
    bev_map: NDArray[np.uint8],
    intrinsics: Floats,
    camera_to_lidar: Floats,
    lidar_to_ego: Floats,
    framing: Framing,
    opacity: float = 1.0,
) -> Picture:
    """Returns a copy of a view with the BEV map painted on the ground, as far as the map reaches.

    Ground and image are two planes seen by one camera, so that one homography (3, 3) maps a pixel to its cell.

    Args:
        frame: RGB view (H, W, 3).
        bev_map: (8, h, w) of 0 and 1, [c, i, j]: i along the lidar's x, j along its y; 100 m along each side.
        intrinsics: (3, 3) camera matrix in pixels of the full-size image.
        camera_to_lidar: (4, 4) pose of the camera.
        lidar_to_ego: (4, 4) pose of the lidar; the origin of the ego frame is on the ground.
        framing: from the full-size image to ``frame``.
        opacity: of the paint, 0 to 1.

    Returns:
        RGB view (H, W, 3).
    """
    fine = 2  # rays of a pixel in each direction
    side = bev_map.shape[-1]
    lidar_to_camera, ego_to_lidar = inverse(camera_to_lidar), inverse(lidar_to_ego)
    ground_to_pixel = _to_frame(framing) @ intrinsics @ (lidar_to_camera @ ego_to_lidar)[:3, [0, 1, 3]]
    ground_to_cell = ego_to_lidar[[0, 1, 3]][:, [0, 1, 3]]
    ground_to_cell[:2] = (ground_to_cell[:2] / MAP_METRES + [[0, 0, 0.5]]) * side
    to_cell = ground_to_cell @ np.linalg.inv(ground_to_pixel)
    columns = (np.arange(framing.width * fine) + 0.5) / fine
    rows = (np.arange(framing.height * fine)[:, None] + 0.5) / fine
    i, j, nearness = (along * columns + (down * rows + here) for along, down, here in to_cell)
    below = nearness > 0  # the horizon: beyond it a pixel's ray meets the ground behind the camera
    depth = 1 / np.where(below, nearness, 1)
    i, j = i * depth, j * depth
    known = below & (i >= 0) & (i < side) & (j >= 0) & (j < side)
    i, j = np.where(known, i, 0).astype(np.int32), np.where(known, j, 0).astype(np.int32)
    mapped = bev_map.any(axis=0)[..., None]
    cells = np.concatenate([_paint(bev_map) * mapped, 255 * mapped], axis=-1).astype(np.uint16)  # colour times alpha
    paint = cells[i, j] * known[..., None]
    paint = paint[0::2, 0::2] + paint[0::2, 1::2] + paint[1::2, 0::2] + paint[1::2, 1::2]
    paint = paint.astype(np.float32) * (opacity / 4)
    return np.round(frame * (1 - paint[..., 3:] / 255) + paint[..., :3]).astype(np.uint8)


def bev_panel(
    bev_map: NDArray[np.uint8], corners: NDArray[np.floating], classes: NDArray[np.integer], cells: int = 400
) -> Picture:
    """Draws the scene from above, forward up: map layers, boxes with their headings, the ego car as an arrow.

    Args:
        bev_map: (8, h, w) of 0 and 1, [c, i, j]: i along the lidar's x, j along its y; 100 m along each side.
        corners: (N, 8, 3) corners in metres in the lidar frame.
        classes: (N) indices into ``records.CLASSES``; -1: no box.
        cells: width and height of the panel in pixels.

    Returns:
        The RGB panel (cells, cells, 3).
    """
    ground = Image.fromarray(np.ascontiguousarray(_paint(bev_map).transpose(1, 0, 2)[::-1]))
    side = cells * SMOOTH
    panel = ground.resize((side, side), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(panel, "RGBA")
    for metres in RINGS:
        radius = metres / MAP_METRES * side
        box = (side / 2 - radius, side / 2 - radius, side / 2 + radius, side / 2 + radius)
        pen.ellipse(box, outline=(*EGO, 36), width=max(1, side // 600))

    def pixel(points: NDArray[np.floating]) -> Points:
        return [((x / MAP_METRES + 0.5) * side, (0.5 - y / MAP_METRES) * side) for x, y in points[:, :2]]

    for n in np.flatnonzero(classes >= 0):
        colour = CLASS_COLOURS[classes[n]]
        outline = pixel(corners[n][list(_FOOTPRINT)])
        pen.polygon(outline, fill=(*colour, 120), outline=(*colour, 255), width=max(1, side // 350))
        middle = pixel(corners[n][list(_FOOTPRINT)].mean(axis=0, keepdims=True))[0]
        front = pixel(corners[n][[0, 4]].mean(axis=0, keepdims=True))[0]
        pen.line([middle, front], fill=(*colour, 255), width=max(1, side // 350))
    tip, wing = side * 0.026, side * 0.014
    centre = side / 2
    arrow = [(centre, centre - tip), (centre + wing, centre + tip * 0.75), (centre, centre + tip * 0.35)]
    pen.polygon([*arrow, (centre - wing, centre + tip * 0.75)], fill=EGO, outline=BACKGROUND, width=max(1, side // 300))
    return np.asarray(panel.resize((cells, cells), Image.Resampling.BOX))


def _paint(bev_map: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the colours (h, w, 3) of the map's cells."""
    out = np.empty((*bev_map.shape[1:], 3), dtype=np.uint8)
    out[:] = BACKGROUND
    for layer in LAYER_ORDER:
        out[bev_map[layer] > 0] = LAYER_COLOURS[layer]
    return out


def _to_frame(framing: Framing) -> Floats:
    """Returns the matrix (3, 3) from homogeneous (column, row, 1) of the full-size image to those of the frame."""
    return framing.matrix[np.ix_([0, 1, 3], [0, 1, 3])]


def _frustum(matrix: Floats, framing: Framing) -> Floats:
    """Returns planes (5, 4) with inward normals: the near plane, and the sides of the view widened by a quarter."""
    w, h = framing.width, framing.height
    left, right, top, bottom = -w / 4, w * 1.25, -h / 4, h * 1.25
    sides = [
        matrix[0] - left * matrix[2],
        right * matrix[2] - matrix[0],
        matrix[1] - top * matrix[2],
        bottom * matrix[2] - matrix[1],
    ]
    planes = np.zeros((5, 4))
    planes[0] = (0.0, 0.0, 1.0, -NEAR)
    planes[1:, :3] = sides
    return planes


def _visible(polygon: Floats, planes: Floats, matrix: Floats) -> Points:
    """Clips a convex polygon (n, 3) in a camera frame to ``planes`` and projects it to pixels of the enlarged layer."""
    for plane in planes:
        polygon = _clip(polygon, polygon @ plane[:3] + plane[3])
        if len(polygon) < 3:
            return []
    pixels, _ = project(polygon, matrix)
    return [(float(x), float(y)) for x, y in pixels * SMOOTH]


def _around(points: Points, margin: int, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Returns the pixels (left, top, right, bottom) around points within a picture; None if there are none."""
    if not points:
        return None
    columns, rows = zip(*points, strict=True)
    left, top = max(0, int(min(columns)) - margin), max(0, int(min(rows)) - margin)
    right, bottom = min(size[0], int(max(columns)) + margin + 1), min(size[1], int(max(rows)) + margin + 1)
    return (left, top, right, bottom) if left < right and top < bottom else None


def _clip(polygon: Floats, side: Floats) -> Floats:
    """Clips a polygon to where ``side``, the signed distance of its points, is not negative (Sutherland-Hodgman)."""
    if (side >= 0).all():
        return polygon
    return np.array(list(_clipped_points(polygon, side))).reshape(-1, 3)


def _clipped_points(polygon: Floats, side: Floats) -> Iterable[Floats]:
    for here in range(len(polygon)):
        after = (here + 1) % len(polygon)
        if side[here] >= 0:
            yield polygon[here]
        if (side[here] >= 0) != (side[after] >= 0):
            yield polygon[here] + (polygon[after] - polygon[here]) * side[here] / (side[here] - side[after])
