"""Contact sheets: six views in the order around the car, and tables of pictures with labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.video.colour import Picture
from magicdrive_core.video.palette import BACKGROUND, INK, SOFT_INK, font

DRIVING_ORDER = ((0, 1, 2), (5, 4, 3))  # indices of VIEWS: front left, front, front right / back left, back, back right


def view_title(view: str) -> str:
    """Returns the name of a view for readers: ``CAM_FRONT_LEFT`` gives ``front left``.

    Args:
        view: one of ``cameras.VIEWS``.
    """
    return view.removeprefix("CAM_").replace("_", " ").lower()


def resize(frame: Picture, width: int) -> Picture:
    """Resizes a frame to a width; its proportions are kept up to an even height.

    Args:
        frame: uint8 frame (H, W, C), C 3 or 4.
        width: wanted columns in pixels.

    Returns:
        The frame (H', width, C), H' even; ``frame`` itself if it has this size.
    """
    height = max(2, round(frame.shape[0] * width / frame.shape[1] / 2) * 2)
    if (height, width) == frame.shape[:2]:
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def six_views(frames: NDArray[np.uint8], width: int | None = None, captions: bool = True) -> Picture:
    """Arranges six views in two rows of three, in driving order.

    Args:
        frames: views (V, H, W, 3) in the order of ``VIEWS``, or RGBA layers (V, H, W, 4) for an overlay of the grid.
        width: pixels of each view in the grid; None: its own.
        captions: whether each view's name is written in its corner.

    Returns:
        The grid (H, W, 3), or (H, W, 4) for layers.
    """
    views = [resize(frame, width) if width else frame for frame in frames]
    height, width = views[0].shape[:2]
    gap = max(2, width // 160 * 2)  # even, so that a sheet can be a frame of a video
    layered = views[0].shape[2] == 4
    size = (3 * width + 2 * gap, 2 * height + gap)
    sheet = Image.new("RGBA", size) if layered else Image.new("RGB", size, BACKGROUND)
    for row, order in enumerate(DRIVING_ORDER):
        for column, view in enumerate(order):
            corner = (column * (width + gap), row * (height + gap))
            sheet.paste(Image.fromarray(views[view]), corner)
            if captions:
                _tag(sheet, corner, view_title(VIEWS[view]), max(9, width // 26))
    return np.asarray(sheet)


def contact_sheet(
    rows: Sequence[Sequence[Picture]],
    row_labels: Sequence[str],
    column_labels: Sequence[str] = (),
    title: str = "",
    subtitle: str = "",
) -> Picture:
    """Arranges pictures in a table.

    Args:
        rows: pictures (H, W, 3), of one height within a row and one width within a column.
        row_labels: text to the left of each row; empty: none.
        column_labels: text above each column; empty: none.
        title: text above the table.
        subtitle: smaller text below the title.

    Returns:
        The sheet (H, W, 3).
    """
    heights, widths = [row[0].shape[0] for row in rows], [picture.shape[1] for picture in rows[0]]
    text = max(12, sum(widths) // 100)
    gap, margin = max(4, text // 3), text * 2
    side = (
        margin
        + max((int(font(text).getlength(label)) for label in row_labels), default=0)
        + (text if row_labels else 0)
    )
    top = margin + (text * 2 + text // 2 if title else 0) + (text * 2 if subtitle else 0)
    top += text * 2 if column_labels else 0
    size = (side + sum(widths) + gap * (len(widths) - 1) + margin, top + sum(heights) + gap * (len(rows) - 1) + margin)
    sheet = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((margin, margin), title, fill=INK, font=font(text * 8 // 5, bold=True), anchor="lt")
    if subtitle:
        pen.text((margin, margin + text * 5 // 2), subtitle, fill=SOFT_INK, font=font(text), anchor="lt")
    y = top
    for row, label, height in zip(rows, row_labels or [""] * len(rows), heights, strict=True):
        pen.text((margin, y + height / 2), label, fill=SOFT_INK, font=font(text), anchor="lm")
        x = side
        for picture in row:
            sheet.paste(Image.fromarray(picture), (x, y))
            x += picture.shape[1] + gap
        y += height + gap
    x = side
    for label, width in zip(column_labels, widths, strict=False):
        pen.text((x + width / 2, top - text), label, fill=SOFT_INK, font=font(text), anchor="mm")
        x += width + gap
    return np.asarray(sheet)


def _tag(sheet: Image.Image, corner: tuple[int, int], label: str, text: int) -> None:
    """Writes a label on a dark, translucent plate in the upper left corner of a picture."""
    pad, inset = text // 2, text // 2
    width = int(font(text).getlength(label)) + 2 * pad
    left, top = corner[0] + inset, corner[1] + inset
    box = (left, top, left + width, top + text + pad + 2)
    plate = Image.new("L", (4 * (box[2] - box[0]), 4 * (box[3] - box[1])))
    ImageDraw.Draw(plate).rounded_rectangle((0, 0, plate.width - 1, plate.height - 1), radius=2 * text, fill=165)
    sheet.paste((8, 10, 14), box[:2], plate.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BOX))
    pen = ImageDraw.Draw(sheet)
    pen.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), label, fill=(245, 247, 250), font=font(text), anchor="mm")
