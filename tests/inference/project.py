"""A project of one short scene with small encoders and a small network, as if DVC stages and training had run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import save_file

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Config
from magicdrive_core.data.clips import caption
from magicdrive_core.data.infos import infos_digest, write_infos
from magicdrive_core.data.map_cache import write_map
from magicdrive_core.data.records import CLASSES, FrameBoxes, Scene
from magicdrive_core.encoders.caches import CAPTIONS, FEATURES, FORMAT, INDEX
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.geometry.poses import pose
from magicdrive_core.model.build import build_stage_network
from magicdrive_core.utils.files import sha256_file, write_json

PROFILE = Path(__file__).resolve().parents[2] / "profiles/demo.yaml"
SMALL = [
    "conditions.map_cells={80x144: 200, 96x176: 200, 32x64: 40}",
    "model={width: 32, depth: 1, heads: 2, control_depth: 1, temporal_heads: 2, box_widths: [32, 16, 16], "
    "map_channels: [4, 8, 8]}",
    "generate={resolution: 32x64, frames: 9, steps: 2, guidance: 2.0, generations: 2, seed: 1024, workers: 2}",
    "submission.frames=2",
    "text.max_tokens=8",
    "video.max_mbit_s=60",  # one pass: an untrained VAE's frames are noise
]
STAGE = "runs/stage3-0123456789ab"


def small_config(*overrides: str) -> Config:
    return load_config(PROFILE, [*SMALL, *overrides])


def small_scene(frames: int = 12, split: str = "val", name: str = "scene-0001") -> Scene:
    """An ego car that drives at 6 m/s behind another car."""
    forward = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    boxes = FrameBoxes(["car"], ["car"], np.array([[0.0, 12.0, -1.0, 1.8, 4.2, 1.6, 0.1]]))
    return Scene(
        token=f"token-of-{name}",
        name=name,
        split=split,
        location="singapore-onenorth",
        description="Fog",
        tokens=[f"{name.replace('-', '')}f{n}" for n in range(frames)],
        key_frames=np.arange(frames) % 6 == 0,
        timestamps=np.arange(frames) * 83_333,
        lidar_to_ego=np.tile(pose(np.eye(3), [0.9, 0, 1.84]), (frames, 1, 1)),
        ego_to_global=pose(np.tile(np.eye(3), (frames, 1, 1)), [[0, 0.5 * n, 0] for n in range(frames)]),
        pictures=[[f"samples/{view}.jpg" for view in VIEWS]] * frames,
        intrinsics=np.tile(np.array([[1266.0, 0, 800], [0, 1266, 450], [0, 0, 1]]), (frames, 6, 1, 1)),
        camera_to_lidar=np.tile(pose(forward, [0, 0.4, -0.3]), (frames, 6, 1, 1)),
        boxes=[boxes] * frames,
    )


def make_project(folder: Path, config: Config, scene: Scene) -> None:
    """Writes ``artifacts/`` and a finished training run into ``folder``."""
    artifacts = folder / "artifacts"
    (artifacts / "infos").mkdir(parents=True)
    write_infos([scene], {"version": "v1.0-test", "rule": "by hand", "unpaired": "leave_out"}, artifacts / "infos")
    cells = config.conditions.map_cells[config.generate.resolution]
    bits = np.random.default_rng(0).integers(0, 256, (len(scene), cells, cells), dtype=np.uint8)
    write_map(artifacts / f"conditions/bev/{cells}/{scene.token}.npz", bits)

    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4
    )
    vae.save_pretrained(artifacts / "encoders/vae")
    encoders = {
        "vae": {"path": "artifacts/encoders/vae", "digest": "v", "scaling_factor": 1.0, "latent_channels": 4},
        "text": {"path": "artifacts/encoders/text", "digest": "t", "width": 16},
    }
    write_json(artifacts / "encoders/encoders.json", encoders)

    text = artifacts / "text"
    text.mkdir()
    tensors = {
        "0": torch.randn(5, 16),
        "class_features": torch.randn(len(CLASSES), 16),
        "base_feature": torch.randn(16),
    }
    save_file(tensors, text / FEATURES)
    write_json(text / CAPTIONS, [caption(scene)])
    index = {
        "format": FORMAT,
        "files": {name: (text / name).stat().st_size for name in (FEATURES, CAPTIONS)},
        "encoder": "t",
        "max_tokens": config.text.max_tokens,
        "infos": infos_digest(artifacts / "infos"),
    }
    write_json(text / INDEX, index)

    network = build_stage_network(config, "stage3", folder)
    for parameter in network.parameters():  # no parameter stays zero, so that every layer has an effect
        torch.nn.init.normal_(parameter, std=0.05)
    run = folder / STAGE
    run.mkdir(parents=True)
    save_file(network.state_dict(), run / "ema.safetensors")
    write_json(run / "run.json", {"stage": "stage3", "weights_sha256": sha256_file(run / "ema.safetensors")})
