"""Small scenes and fake caches: enough for plans and loaders, without images and encoders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from magicdrive_core.data.records import Clip, FrameBoxes, Scene


def make_scene(name: str, frames: int, split: str = "train") -> Scene:
    """Make a scene that drives along +x past two cars, one of which leaves halfway."""
    poses = np.tile(np.eye(4), (frames, 1, 1))
    poses[:, 0, 3] = np.arange(frames) * 0.5
    boxes = [
        FrameBoxes(
            [f"car{i}" for i in range(2 if frame <= frames // 2 else 1)],
            ["car", "truck"][: 2 if frame <= frames // 2 else 1],
            np.array([[5.0 + i, 3.0, 0.5, 2.0, 4.0, 1.5, 0.1] for i in range(2 if frame <= frames // 2 else 1)]),
        )
        for frame in range(frames)
    ]
    return Scene(
        token=f"token-{name}",
        name=name,
        split=split,
        location="singapore-onenorth",
        description=f"Scene {name}",
        tokens=[f"{name}{frame}" for frame in range(frames)],
        key_frames=np.arange(frames) % 6 == 0,
        timestamps=np.arange(frames, dtype=np.int64) * 83_333,
        lidar_to_ego=np.tile(np.eye(4), (frames, 1, 1)),
        ego_to_global=poses,
        pictures=[[f"samples/{name}-{frame}-{view}.jpg" for view in range(6)] for frame in range(frames)],
        intrinsics=np.tile(np.diag([1000.0, 1000.0, 1.0]), (frames, 6, 1, 1)),
        camera_to_lidar=np.tile(np.eye(4), (frames, 6, 1, 1)),
        boxes=boxes,
    )


class FakeLatents:
    """Moments by which a clip is recognised: the mean is its start, the log-variance 0."""

    def __init__(self, _folder: object, _config: object) -> None: ...

    def moments(self, size: str, clip: Clip) -> Tensor:
        height, width = (int(side) // 8 for side in size.split("x"))
        shape = (6, 4, (clip.frames - 1) // 4 + 1, height, width)
        return torch.cat([torch.full(shape, float(clip.start)), torch.zeros(shape)], 1).half()


class FakeLive:
    """The same moments, of the requested views only."""

    encoded = 0  # views, of all clips

    def __init__(self, _config: object, _project: object, _scenes: object) -> None: ...

    def moments(self, size: str, clip: Clip, views: Sequence[int] = range(6)) -> Tensor:
        FakeLive.encoded += len(views)
        whole = FakeLatents(None, None).moments(size, clip)
        others = [view for view in range(6) if view not in views]
        whole[others] = 0
        return whole


class FakeMaps:
    """Maps whose cells all hold the layers 0 and 2."""

    held = 0

    def __init__(self, _config: object, _project: object, *, hold: int) -> None: ...

    def of_clip(self, _scene: Scene, clip: Clip, _size: str) -> np.ndarray:
        return np.full((clip.frames, 4, 4), 5, np.uint8)


class FakeText:
    """Features of four tokens of width 5."""

    def __init__(self, _config: object, _project: object) -> None: ...

    def features(self, caption: str) -> Tensor:
        return torch.full((4, 5), float(len(caption)))
