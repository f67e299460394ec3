"""Conversion between RGB arrays and the colours of video: BT.709, limited range, 4:2:0, rounded exactly."""

from __future__ import annotations

import numpy as np
from av import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

# swscale's fast paths round down and drop chroma samples; these flags cost little and keep 50 dB. BITEXACT makes
# every processor compute the same bytes.
_EXACT = (
    Interpolation.BICUBIC
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)


class ColourConverter:
    """Converts the frames of one video, and keeps swscale's tables between frames."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def to_yuv(self, picture: Picture) -> VideoFrame:
        """Converts an RGB picture to a frame for the encoder: yuv420p in BT.709, limited range.

        Args:
            picture: uint8 RGB picture (H, W, 3), full range, of even height and width.

        Returns:
            The frame, of the same size, with half the rows and columns of chroma.
        """
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        return self._reformatter.reformat(
            frame,
            format="yuv420p",
            src_color_range=ColorRange.JPEG,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=_EXACT,
        )

    def to_rgb(self, frame: VideoFrame, size: tuple[int, int] | None = None) -> Picture:
        """Converts a decoded frame to RGB, by the matrix and range that its file is tagged with.

        Args:
            frame: the decoded frame.
            size: (H, W) to scale to, which is faster here than scaling the picture; None: the frame's own.

        Returns:
            RGB picture (H, W, 3).
        """
        height, width = size or (frame.height, frame.width)
        rgb = self._reformatter.reformat(frame, width=width, height=height, format="rgb24", interpolation=_EXACT)
        return rgb.to_ndarray().astype(np.uint8, copy=False)
