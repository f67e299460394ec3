"""A small data set: infos of two scenes, and their pictures."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from magicdrive_core.config.load import parse_config
from magicdrive_core.config.schema import Config
from magicdrive_core.data import infos
from magicdrive_core.data.records import FrameBoxes, Scene
from magicdrive_core.geometry.cameras import VIEWS

PROFILE = Path(__file__).resolve().parents[2] / "profiles/demo.yaml"
LENGTH = 19  # frames of a scene: clips of 17 from frames 0 and 2


@dataclass(frozen=True)
class Project:
    """Folders of a project whose infos are made, and its configuration."""

    config: Config
    artifacts: Path
    root: Path

    @property
    def infos(self) -> Path:
        return self.artifacts / "infos"

    @property
    def encoders(self) -> Path:
        return self.artifacts / "encoders"


def picture(index: int) -> Image.Image:
    """Sky, ground, and two blocks that drift with ``index``."""
    pixels = np.empty((900, 1600, 3), np.uint8)
    pixels[:450] = (120, 160, 220)
    pixels[450:] = np.linspace(60, 130, 450)[:, None, None]
    for left, colour in ((200 + 60 * index, (200, 40, 40)), (1000 - 40 * index, (40, 60, 90))):
        pixels[350:600, left : left + 300] = colour
    return Image.fromarray(pixels)


def make_scene(name: str, split: str, description: str, offset: int, frames: int = LENGTH) -> Scene:
    F, V = frames, len(VIEWS)
    return Scene(
        token=f"token-{name}",
        name=name,
        split=split,
        location="singapore-onenorth",
        description=description,
        tokens=[f"{name}-{frame}" for frame in range(F)],
        key_frames=np.arange(F) % 6 == 0,
        timestamps=np.arange(F) * 83_333,
        lidar_to_ego=np.tile(np.eye(4), (F, 1, 1)),
        ego_to_global=np.tile(np.eye(4), (F, 1, 1)),
        pictures=[[f"samples/{(frame + view + offset) % 12}.jpg" for view in range(V)] for frame in range(F)],
        intrinsics=np.tile(np.eye(3), (F, V, 1, 1)),
        camera_to_lidar=np.tile(np.eye(4), (F, V, 1, 1)),
        boxes=[FrameBoxes([], [], np.zeros((0, 7))) for _ in range(F)],
    )


def write_infos(folder: Path, scenes: list[Scene]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    infos.write_infos(scenes, {"version": "v1.0-test", "rule": "by hand", "unpaired": "leave_out"}, folder)


def make_config(root: Path, **changes: object) -> Config:
    """The demo profile with small encoders and two sizes of buckets; ``changes`` are sections' values."""
    values = yaml.safe_load(PROFILE.read_text())
    values["data"]["root"] = str(root)
    values["conditions"]["map_cells"] |= {"56x104": 200, "112x200": 100}
    values["vae"]["build"] = {
        "block_out_channels": [8, 12, 12, 16],
        "latent_channels": 4,
        "layers_per_block": 1,
        "resolution": "56x104",
        "steps": 2,
        "batch": 2,
        "crop": 32,
        "clips": 2,
        "learning_rate": 1e-2,
        "seed": 1,
    }
    values["latents"] |= {"start_stride": 2, "scaled_decoding": False}
    training = values["training"]
    training["stage1"]["buckets"] = [{"resolution": "56x104", "frames": 1, "batch": 1}]
    training["stage2"]["buckets"] = [{"resolution": "56x104", "frames": n, "batch": 1} for n in (1, 9)]
    training["stage3"]["buckets"] = [
        {"resolution": "56x104", "frames": 17, "batch": 1},
        {"resolution": "112x200", "frames": 1, "batch": 1},
    ]
    for section, keys in changes.items():
        values[section] = {**values[section], **keys}  # type: ignore[dict-item]
    return parse_config(values)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Infos and pictures; encoders and caches are for the tests to make elsewhere."""
    root = tmp_path_factory.mktemp("root")
    (root / "samples").mkdir()
    for index in range(12):
        picture(index).save(root / f"samples/{index}.jpg")
    artifacts = tmp_path_factory.mktemp("artifacts")
    scenes = [
        make_scene("scene-1", "train", "Parked truck, turn left", 0),
        make_scene("scene-2", "val", "Night, rain", 5),
    ]
    write_infos(artifacts / "infos", scenes)
    return Project(make_config(root), artifacts, root)
