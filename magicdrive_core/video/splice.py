"""Videos joined without decoding: what each was, bit for bit, it still is when it is decoded from the joined file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
from av.bitstream import BitStreamFilterContext
from av.packet import Packet
from av.stream import Stream

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import atomic_file


def join_videos(parts: Sequence[Path], path: Path) -> None:
    """Writes the H.264 streams of ``parts`` one after the other into the mp4 ``path``, atomically.

    Encoders of different quality write different parameter sets; each part's travel inside the stream, before its first
    frame, where every decoder looks for them.

    Args:
        parts: mp4 files of one size and frame rate, each beginning with a key frame.
        path: the file to write.

    Raises:
        MagicDriveError: a part cannot be read as a video.
    """
    with atomic_file(path) as partial:
        try:
            _join(parts, partial)
        except av.FFmpegError as error:
            raise MagicDriveError(f"{', '.join(map(str, parts))} cannot be joined: {error.strerror}") from error


def _join(parts: Sequence[Path], partial: Path) -> None:
    delays = [_reorder_delay(part) for part in parts]
    with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as sink:
        target, begin = None, Fraction(0)
        for part, delay in zip(parts, delays, strict=True):
            with av.open(str(part)) as container:
                source = container.streams.video[0]
                target = target or sink.add_stream_from_template(source)
                count = 0
                for packet in _with_parameters(source, container.demux(source)):
                    pts, dts = packet.pts or 0, packet.dts or 0
                    packet.pts = pts + int(begin / packet.time_base)
                    packet.dts = dts + int((begin + delay - max(delays)) / packet.time_base)  # never back in time
                    packet.stream = target
                    sink.mux(packet)
                    count += 1
                begin += count / Fraction(source.average_rate or 1)


def _reorder_delay(part: Path) -> Fraction:
    """Seconds by which decoding must be ahead of display, because frames are stored in another order."""
    with av.open(str(part)) as container:
        first = next(container.demux(container.streams.video[0]))
        return -(first.dts or 0) * first.time_base


def _with_parameters(source: Stream, packets: Iterator[Packet]) -> Iterator[Packet]:
    """Packets whose key frames carry the stream's parameter sets (Annex B)."""
    annex_b = BitStreamFilterContext("h264_mp4toannexb", source, None)
    for packet in packets:
        if packet.size:
            key, pts, dts, base = packet.is_keyframe, packet.pts, packet.dts, packet.time_base
            for made in annex_b.filter(packet):
                made.is_keyframe, made.time_base, made.pts, made.dts = key, base, pts, dts
                yield made
