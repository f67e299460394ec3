"""Data classes that the packages exchange: a scene at 12 Hz, a clip of it, and the conditions of that clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ClassName = Literal[
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
]
CLASSES: tuple[ClassName, ...] = get_args(ClassName)
MAP_LAYERS = (
    "drivable_area",
    "ped_crossing",
    "walkway",
    "stop_line",
    "carpark_area",
    "road_divider",
    "lane_divider",
    "road_block",
)
MAP_EXTENT = 100.0  # side of the square BEV map in metres, centred on the lidar


@dataclass(frozen=True)
class FrameBoxes:
    """The N annotated objects of one frame."""

    ids: list[str]  # N instance tokens
    names: list[str]  # N, of CLASSES
    boxes: Floats  # (N, 7): x, y, z of the centre in the lidar frame, w, l, h in metres, yaw' = -yaw - pi/2


@dataclass(frozen=True)
class Scene:
    """One scene of F frames at 12 Hz; views in the order of ``cameras.VIEWS``, poses as ``a_to_b`` matrices."""

    token: str
    name: str
    split: str  # "train", "val", or "both" where a data set has a single scene
    location: str
    description: str
    tokens: list[str]  # F: the sample's token; between key frames, that of the last key frame and one character
    key_frames: NDArray[np.bool_]  # F
    timestamps: NDArray[np.int64]  # F, microseconds
    lidar_to_ego: Floats  # F, 4, 4
    ego_to_global: Floats  # F, 4, 4, at the lidar's time
    pictures: list[list[str]]  # F, V: paths below the data root
    intrinsics: Floats  # F, V, 3, 3 in pixels of the full picture
    camera_to_lidar: Floats  # F, V, 4, 4; ego motion between camera and lidar time is compensated
    boxes: list[FrameBoxes]  # F

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def first_sample(self) -> str:
        """The token of the first sample, by which W-CODA names a scene."""
        return self.tokens[0]


@dataclass(frozen=True)
class SceneHeader:
    """The identity and length of a scene: what planning needs, small enough to keep for every scene."""

    token: str
    name: str
    split: str
    location: str
    description: str
    key_frames: NDArray[np.bool_]  # F

    @classmethod
    def of(cls, scene: Scene) -> SceneHeader:
        """Copy the header of a scene, so that the scene's mapped file can be released.

        Args:
            scene: the scene.

        Returns:
            The header, which shares no array with the scene.
        """
        texts = scene.token, scene.name, scene.split, scene.location, scene.description
        return cls(*texts, scene.key_frames.copy())

    def __len__(self) -> int:
        return len(self.key_frames)


@dataclass(frozen=True, slots=True)  # slots: a training stage holds a million clips
class Clip:
    """Consecutive frames of a scene."""

    scene: str  # scene token
    start: int  # index of the first frame in the scene
    frames: int  # F


@dataclass(frozen=True)
class ClipConditions:
    """The conditions of one clip, all but the text features. F frames, V views, N box slots."""

    caption: str
    cameras: Floats  # F, V, 3, 7: K | camera-to-lidar R | t
    ego_motion: Floats  # F, 4, 4: first lidar frame -> this lidar frame
    box_corners: NDArray[np.float32]  # F, N, 8, 3 metres in the lidar frame of the frame
    box_classes: NDArray[np.int64]  # F, N; -1 where the slot's object is absent
    box_masks: NDArray[np.int64]  # F, V, N: 1 shown, 0 no box in this view, -1 hidden
    box_ids: list[str]  # N instance tokens
    bev_map: NDArray[np.uint8]  # F, h, w; bit c of [i, j] is layer c: i along the lidar's x, j along its y
    height: int  # of the video, pixels
    width: int
    fps: int  # 12, or 120 for single frames
