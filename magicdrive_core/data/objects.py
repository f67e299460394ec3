"""The annotated objects of key frames, and of the frames between them.

An object is interpolated between two key frames that both hold its instance: centre linear, orientation slerp, class
and size of the earlier one. An object that only one of the two holds is left out of the frames between, because where
it was is not known. With ``data.unpaired: carry_on`` it is shown in the nearer half of the interval, as ``carry_on``
says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.data.records import CLASSES, FrameBoxes
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.boxes import lidar_boxes
from magicdrive_core.geometry.poses import slerp

if TYPE_CHECKING:
    from magicdrive_core.data.nuscenes import Record, Tables

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Objects:
    """N objects at one time in the global frame."""

    ids: list[str]  # instance tokens
    names: list[str]  # of CLASSES
    centres: Floats  # N, 3 metres
    rotations: Floats  # N, 4 quaternions (w, x, y, z), object to global
    sizes: Floats  # N, 3 width, length, height in metres

    def pick(self, rows: list[int]) -> Objects:
        """Some of the objects."""
        return Objects(
            [self.ids[row] for row in rows],
            [self.names[row] for row in rows],
            self.centres[rows],
            self.rotations[rows],
            self.sizes[rows],
        )

    def join(self, other: Objects) -> Objects:
        """These objects and then others."""
        return Objects(
            self.ids + other.ids,
            self.names + other.names,
            np.concatenate([self.centres, other.centres]),
            np.concatenate([self.rotations, other.rotations]),
            np.concatenate([self.sizes, other.sizes]),
        )

    def in_lidar(self, global_to_lidar: Floats) -> FrameBoxes:
        """The same objects as boxes of a lidar frame."""
        return FrameBoxes(self.ids, self.names, lidar_boxes(self.centres, self.rotations, self.sizes, global_to_lidar))


def read_objects(tables: Tables, sample: Record) -> Objects:
    """The objects of the ten classes in a key frame, those without lidar points too.

    Raises:
        MagicDriveError: a value that is no number, or a size that is not positive.
    """
    from magicdrive_core.data.nuscenes import detection_class  # the devkit takes seconds to import

    records = [tables.get("sample_annotation", token) for token in sample["anns"]]
    named = [(record, detection_class(record["category_name"])) for record in records]
    kept = [(record, name) for record, name in named if name in CLASSES]
    records = [record for record, _ in kept]
    sizes = tables.vectors("sample_annotation", records, "size", 3)
    if np.any(sizes <= 0):
        token = records[int(np.argmax((sizes <= 0).any(axis=1)))]["token"]
        raise MagicDriveError(f"{tables.path('sample_annotation')}: size of record {token} is not positive")
    return Objects(
        ids=[record["instance_token"] for record in records],
        names=[str(name) for _, name in kept],
        centres=tables.vectors("sample_annotation", records, "translation", 3),
        rotations=tables.vectors("sample_annotation", records, "rotation", 4),
        sizes=sizes,
    )


def interpolate(start: Objects, end: Objects, fractions: Floats) -> Iterator[Objects]:
    """The objects at each of ``fractions`` of the way from one key frame to the next."""
    rows = {token: row for row, token in enumerate(end.ids)}
    shared = [row for row, token in enumerate(start.ids) if token in rows]
    first, last = start.pick(shared), end.pick([rows[start.ids[row]] for row in shared])
    for fraction in fractions:
        centres = first.centres + fraction * (last.centres - first.centres)
        rotations = slerp(first.rotations, last.rotations, np.full(len(shared), fraction))
        yield Objects(first.ids, first.names, centres, rotations, first.sizes)


def carry_on(here: Objects, gone: Objects, other_side: Objects | None, step: float) -> Objects:
    """The objects of one key frame that its neighbour in time lacks, a little beyond their annotated places.

    They keep the heading and the velocity that they have between this key frame and the one on its other side, and
    stand still where that one does not hold them either.

    Args:
        here: the key frame that holds them.
        gone: the key frame that lacks them.
        other_side: the key frame on the other side of ``here``; None at an end of the scene.
        step: how far beyond ``here``, as a multiple of the time between ``other_side`` and ``here``.
    """
    absent = set(gone.ids)
    lone = here.pick([row for row, token in enumerate(here.ids) if token not in absent])
    rows = {} if other_side is None else {token: row for row, token in enumerate(other_side.ids)}
    centres = lone.centres.copy()
    for row, token in enumerate(lone.ids):
        if other_side is not None and token in rows:
            centres[row] += step * (lone.centres[row] - other_side.centres[rows[token]])
    return replace(lone, centres=centres)
