"""Small runs of each computation that has a version number, reduced to a few numbers.

A probe passes through other computations, too: generated frames depend on the network. It names all their versions,
its own first, so that numbers may change when one of them was raised.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from safetensors.torch import load_file

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Bucket, Conditions, Config, TextBuild, VaeBuild
from magicdrive_core.data.adapters import open_adapter
from magicdrive_core.data.bev_maps import rasterise, unpack
from magicdrive_core.data.clips import list_clips
from magicdrive_core.data.conditions import add_boxes, clip_conditions, drop_frames, hide_boxes
from magicdrive_core.data.edits import Edits
from magicdrive_core.data.infos import build_infos, read_scenes
from magicdrive_core.data.map_cache import BevMaps
from magicdrive_core.data.records import Clip, Scene
from magicdrive_core.diffusion.frame_masks import draw_masks
from magicdrive_core.encoders.encode_latents import EncoderSettings, encode_scenes, plan_scenes
from magicdrive_core.encoders.small_vae import build_vae, latent_spread, psnr
from magicdrive_core.encoders.text import TextEncoder, build_text_encoder
from magicdrive_core.encoders.vae import Vae, to_video
from magicdrive_core.evaluation.bev_masks import Masks, evaluate_masks
from magicdrive_core.evaluation.extractors import SmallExtractor
from magicdrive_core.evaluation.frechet import Statistics, frechet_distance
from magicdrive_core.evaluation.protocol import framed, score
from magicdrive_core.experiment.stages import StagePlan, write_job
from magicdrive_core.inference.items import list_items
from magicdrive_core.inference.models import Models
from magicdrive_core.inference.processes import SingleProcess
from magicdrive_core.inference.sampler import Sampler
from magicdrive_core.video.decoder import decode_video
from magicdrive_core.video.encoder import encode_video
from magicdrive_core.video.frames import full_size_image
from magicdrive_core.wcoda.validator import validate
from tests.conftest import MakeConfig
from tests.inference.project import PROFILE, STAGE, make_project, small_config, small_scene
from tests.model.networks import conditions as made_up_conditions
from tests.model.networks import network as small_network
from tests.training.gloo_ranks import run_distributed
from tests.training.networks import training
from tests.training.tiny_rank import NeverStop, train_tiny

Numbers = dict[str, list[float]]
CAPTION = "A driving scene image at singapore-onenorth. Fog."


def summary(values: ArrayLike | torch.Tensor) -> list[float]:
    """Reduce an array to its mean, its standard deviation and two projections on fixed waves, all of one magnitude."""
    flat = np.asarray(values.detach() if isinstance(values, torch.Tensor) else values, np.float64).ravel()
    waves = [np.sin(rate * np.arange(flat.size) + rate) for rate in (0.7, 1.9)]
    return [float(flat.mean()), float(flat.std()), *(float(flat @ wave) / flat.size**0.5 for wave in waves)]


def moving_picture(frames: int, height: int, width: int) -> np.ndarray:
    """Draw RGB frames (F, H, W, 3) of smooth colours that drift."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(0.05 * x + 0.3 * t), np.cos(0.07 * y - 0.2 * t), np.sin(0.03 * (x + y) + 0.1 * t)]
    return np.stack([np.round(127.5 + 100 * wave) for wave in waves], axis=-1).astype(np.uint8)


SMALL_VAE = VaeBuild(
    block_out_channels=[8, 12, 12, 16],
    latent_channels=4,
    layers_per_block=1,
    resolution="32x48",
    steps=2,
    batch=1,
    crop=32,
    clips=2,
    learning_rate=1e-2,
    seed=1,
)
CLIPS = np.stack([moving_picture(9, 32, 48), moving_picture(9, 32, 48)[::-1]])


@dataclass(frozen=True)
class Workspace:
    """Folders that probes share; each is filled by the first probe that needs it."""

    folder: Path
    root: Path  # the generated data of the fixture ``synthetic_root``
    make_config: MakeConfig

    @cached_property
    def config(self) -> Config:
        return self.make_config(self.root)

    @cached_property
    def scenes(self) -> list[Scene]:
        build_infos(self.config, self.folder / "artifacts/infos")
        return list(read_scenes(self.folder / "artifacts/infos"))

    @cached_property
    def vae(self) -> Vae:
        """A small VAE, built in two steps on drifting colours."""
        build_vae(SMALL_VAE, CLIPS).save_pretrained(self.folder / "vae")
        return Vae.load(self.folder / "vae", scaling_factor=0.5, chunk_frames=8)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """A small T5 with random weights."""
        build = TextBuild(width=16, layers=1, heads=2, feed_forward=16, seed=1)
        build_text_encoder(build, [CAPTION], self.folder / "text")
        return TextEncoder.load(self.folder / "text", 16)

    @cached_property
    def sampler(self) -> Sampler:
        folder, config, scene = self.folder / "generation", small_config(), small_scene()
        make_project(folder, config, scene)
        (item, *_) = list_items(config, [scene], folder)
        models = Models.load(config, folder / STAGE, folder)
        return Sampler(config, models, item, scene, Edits(), BevMaps(config, folder))

    @cached_property
    def latents(self) -> list[torch.Tensor]:
        return self.sampler.sample(SingleProcess())


def infos(work: Workspace) -> Numbers:
    scene = work.scenes[0]
    return {
        "frames": [len(scene) for scene in work.scenes],
        "times": summary(scene.timestamps - scene.timestamps[0]),
        "ego poses": summary(scene.ego_to_global),
        "calibration": summary(np.concatenate([scene.camera_to_lidar.ravel(), scene.lidar_to_ego.ravel()])),
        "intrinsics": summary(scene.intrinsics),
        "boxes": summary(np.concatenate([frame.boxes for frame in scene.boxes])),
    }


def bev_maps(work: Workspace) -> Numbers:
    scene = work.scenes[0]
    bits = rasterise(open_adapter(work.config).vector_map(scene), scene.ego_to_global @ scene.lidar_to_ego, 100)
    return {"cells of each layer": unpack(bits).sum(axis=(0, 2, 3)).tolist(), "bits": summary(bits)}


def conditions(work: Workspace) -> Numbers:
    scene = work.scenes[0]
    made = clip_conditions(scene, Clip(scene.token, 1, 9), "80x144", np.zeros((9, 4, 4), np.uint8), published=False)
    arrays = {name: value for name, value in vars(made).items() if isinstance(value, np.ndarray)}
    clips = list_clips(work.scenes, "train", 9, 4)
    return {name: summary(value) for name, value in sorted(arrays.items())} | {
        "caption": summary(list(made.caption.encode())),
        "starts of clips": [float(clip.start) for clip in clips],
    }


def encoders(work: Workspace) -> Numbers:
    weights, text = work.vae.model.state_dict(), work.text_encoder.model.state_dict()
    return {
        "vae": summary(torch.cat([weights[name].flatten() for name in sorted(weights)])),
        "text": summary(torch.cat([text[name].flatten() for name in sorted(text)])),
        "spread of latents": [latent_spread(work.vae, CLIPS)],
        "psnr": [psnr(work.vae, CLIPS)],
    }


def text(work: Workspace) -> Numbers:
    features = work.text_encoder.encode([CAPTION, "car", ""])
    return {name: summary(feature) for name, feature in zip(("caption", "class", "empty"), features, strict=True)}


def vae(work: Workspace) -> Numbers:
    moments = work.vae.moments(to_video(moving_picture(17, 32, 48)[None]))
    frames = np.concatenate(list(work.vae.decode(work.vae.latents(moments))), axis=1)
    return {"moments": summary(moments), "frames": summary(frames)}


def latents(work: Workspace) -> Numbers:
    """One clip of 9 frames, read from the generated pictures."""
    bucket = Bucket(resolution="56x104", frames=9, batch=1)
    scenes = [scene for scene in work.scenes if scene.split in ("train", "both")][:1]
    works = plan_scenes(scenes, work.root, [bucket], stride=1000)
    assert work.vae
    spread = encode_scenes(
        works, EncoderSettings(str(work.folder / "vae"), 0.5, 4, 8, "float32"), work.folder / "latents"
    )
    (file,) = (work.folder / "latents").rglob("*.safetensors")
    return {"moments": summary(load_file(file)["moments"]), "spread": list(spread.values())}


def network(_: Workspace) -> Numbers:
    model = small_network()
    for rows, parameter in enumerate(model.parameters()):  # nothing left at zero: every part counts
        values = torch.sin(0.7 * torch.arange(parameter.numel()) + rows) / max(1, parameter[0].numel()) ** 0.5
        parameter.data = values.reshape(parameter.shape)
    made = made_up_conditions(frames=9)
    x = torch.sin(torch.arange(6 * 3 * 3 * 4 * 6) * 0.37).reshape(1, 6, 3, 3, 4, 6)
    out = model(x, torch.tensor([321.0]), made)
    (out * x.cos()).mean().backward()
    norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    return {"output": summary(out), "norms of gradients": summary(norms)}


def training_run(work: Workspace) -> Numbers:
    folder = work.folder / "run"
    config = load_config(PROFILE, ["cluster.ranks=1"])
    settings = Conditions(map_cells={"16x16": 8} | config.conditions.map_cells)
    config = config.model_copy(update={"training": training(), "conditions": settings})
    write_job(StagePlan("stage1", folder, "f" * 64, {}, None), config)
    assert run_distributed(train_once, 1, folder) == [0]
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ema = load_file(folder / "ema.safetensors")
    fresh = small_network(fresh=True)
    return {
        "losses": losses,
        "ema": summary(torch.cat([ema[name].flatten() for name in sorted(ema)])),
        "initial weights": summary(torch.cat([parameter.flatten() for parameter in fresh.parameters()])),
        **_augmented(work),
    }


def train_once(folder: Path) -> int:
    return train_tiny(folder, NeverStop())


def _augmented(work: Workspace) -> Numbers:
    scene, rng = work.scenes[0], np.random.default_rng(0)
    made = clip_conditions(scene, Clip(scene.token, 0, 9), "80x144", np.zeros((9, 4, 4), np.uint8), published=False)
    hidden = hide_boxes(made, scene.key_frames[:9], 0.5, rng)
    masks = draw_masks({"random": 0.5, "image_head": 0.5}, 4, 17, rng)
    return {
        "box masks": summary(add_boxes(hidden, 0.5, rng).box_masks),
        "kept frames": drop_frames(17, 0.5, rng).astype(float).tolist(),
        "frame masks": [] if masks is None else summary(masks),
    }


def sampler(work: Workspace) -> Numbers:
    return {"latents": summary(torch.cat([part.flatten() for part in work.latents]))}


def decode(work: Workspace) -> Numbers:
    frames = [list(view) for view in islice(work.sampler.decode_views(work.latents), 2)]
    return {
        "decoded": summary(np.asarray(frames)),
        "full size": summary(full_size_image(moving_picture(1, 224, 400)[0])),
    }


def video(work: Workspace) -> Numbers:
    path = work.folder / "video.mp4"
    made = encode_video(moving_picture(16, 90, 160), path, fps=12, max_mbit_s=1.0)
    return {"decoded": summary(np.asarray(list(decode_video(path))))[:2], "psnr": [made.psnr], "bytes": [made.bytes]}


def validator(work: Workspace) -> Numbers:
    path = work.folder / "results.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("owls_standard/a_gen0/a_CAM_FRONT.mp4", b"no video")
        archive.writestr("owls_standard/a_gen9/other.txt", b"")
    return {"faults": [len(validate(path))]}


def scores(_: Workspace) -> Numbers:
    clips = np.stack([moving_picture(16, 225, 400) // (1 + n) for n in range(4)])
    features = SmallExtractor()(np.stack([framed(clip, 212) for clip in clips]))
    masks = moving_picture(2, 8, 8).transpose(0, 3, 1, 2) > 127
    ours, theirs = (Masks(["a", "b", "c"], {"s": masks[n]}) for n in range(2))
    return {
        "distance": [frechet_distance(Statistics.of(features[:2]), Statistics.of(features[2:]))],
        "features": summary(features),
        "miou": [evaluate_masks(ours, theirs, {"scene": ["s"]}).mean_iou],
        "score": [score(100.0, 20.0, 30.0)],
    }


# Version numbers that a probe passes through, its own first. CITY_VERSION: tests/synthetic holds digests of the city.
PROBES: Mapping[str, tuple[Callable[[Workspace], Numbers], tuple[str, ...]]] = {
    "infos": (infos, ("INFOS_VERSION", "CITY_VERSION")),
    "bev_maps": (bev_maps, ("BEV_MAPS_VERSION", "INFOS_VERSION", "CITY_VERSION")),
    "conditions": (conditions, ("CONDITIONS_VERSION", "INFOS_VERSION", "CITY_VERSION")),
    "encoders": (encoders, ("ENCODERS_VERSION", "VAE_VERSION")),
    "text": (text, ("TEXT_VERSION", "ENCODERS_VERSION")),
    "vae": (vae, ("VAE_VERSION", "ENCODERS_VERSION")),
    "latents": (latents, ("LATENTS_VERSION", "VAE_VERSION", "ENCODERS_VERSION", "INFOS_VERSION", "CITY_VERSION")),
    "network": (network, ("NETWORK_VERSION",)),
    "training": (training_run, ("TRAINING_VERSION", "CONDITIONS_VERSION", "INFOS_VERSION", "CITY_VERSION")),
    "sampler": (sampler, ("SAMPLER_VERSION", "NETWORK_VERSION", "CONDITIONS_VERSION")),
    "decode": (decode, ("DECODE_VERSION", "VAE_VERSION", "SAMPLER_VERSION", "NETWORK_VERSION", "CONDITIONS_VERSION")),
    "video": (video, ("VIDEO_VERSION",)),
    "validator": (validator, ("VALIDATOR_VERSION",)),
    "scores": (scores, ("SCORES_VERSION",)),
}
