"""Contact sheets: six views as they stand around the car, and rows of frames with captions."""

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
    """``CAM_FRONT_LEFT`` -> ``front left``."""
    return view.removeprefix("CAM_").replace("_", " ").lower()


def resize(frame: Picture, width: int) -> Picture:
    """The frame at another width, proportions kept, with an even height."""
    height = max(2, round(frame.shape[0] * width / frame.shape[1] / 2) * 2)
    if (height, width) == frame.shape[:2]:
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def six_views(frames: NDArray[np.uint8], width: int | None = None, captions: bool = True) -> Picture:
    """Six views (V, H, W, 3) in the order of ``VIEWS`` as a grid of two rows of three, in driving order.

    Args:
        frames: the views; layers (V, H, W, 4) give a layer to lay over the grid of the views.
        width: of each view in the grid; as it is where left out.
        captions: whether each view's name stands in its corner.
    """
    views = [resize(frame, width) if width else frame for frame in frames]
    height, width = views[0].shape[:2]
    gap = max(2, width // 160 * 2)  # even, so that a sheet can be a frame of a video
    layered = views[0].shape[2] == 4
    size = (3 * width + 2 * gap, 2 * height + gap)
    sheet = Image.new("RGBA", size) if layered else Image.new("RGB", size, BACKGROUND)
    for row, order in enumerate(DRIVING_ORDER):
        for column, view in enumerate(order):
            place = (column * (width + gap), row * (height + gap))
            sheet.paste(Image.fromarray(views[view]), place)
            if captions:
                _tag(sheet, place, view_title(VIEWS[view]), max(9, width // 26))
    return np.asarray(sheet)


def contact_sheet(
    rows: Sequence[Sequence[Picture]],
    row_labels: Sequence[str],
    column_labels: Sequence[str] = (),
    title: str = "",
    subtitle: str = "",
) -> Picture:
    """A table of pictures of one height, with a title above, and labels before rows and over columns."""
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


def _tag(sheet: Image.Image, place: tuple[int, int], label: str, text: int) -> None:
    """A caption on a dark, see-through plate in the upper left corner of a picture."""
    pad, inset = text // 2, text // 2
    width = int(font(text).getlength(label)) + 2 * pad
    box = (place[0] + inset, place[1] + inset, place[0] + inset + width, place[1] + inset + text + pad + 2)
    plate = Image.new("L", (4 * (box[2] - box[0]), 4 * (box[3] - box[1])))
    ImageDraw.Draw(plate).rounded_rectangle((0, 0, plate.width - 1, plate.height - 1), radius=2 * text, fill=165)
    sheet.paste((8, 10, 14), box[:2], plate.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BOX))
    pen = ImageDraw.Draw(sheet)
    pen.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), label, fill=(245, 247, 250), font=font(text), anchor="mm")
