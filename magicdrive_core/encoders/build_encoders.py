"""The DVC stage ``encoders``: builds the small VAE and T5 if the settings say so, or checks the encoders they name.

In both cases the encoders are from_pretrained folders, and ``encoders.json`` records their paths and facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magicdrive_core.config.schema import Config
from magicdrive_core.data.clips import caption
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.data.records import CLASSES, Scene
from magicdrive_core.encoders import text, vae
from magicdrive_core.encoders.small_vae import CLIP_FRAMES, build_vae, draw_clips, latent_spread, longest_clip, psnr
from magicdrive_core.encoders.text import build_text_encoder
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import atomic_folder, read_json, sha256_folder, write_json

HELD_OUT_FRAMES, HELD_OUT_CLIPS, HELD_OUT_LENGTH = 36, 3, 17  # for PSNR: single frames; clips and their most frames
SPREAD_CLIPS, SPREAD_SIZE = 12, "224x400"  # clips for the scaling factor, and their size for a VAE that is not built


def build_encoders(config: Config, infos: Path, out: Path) -> None:
    """Writes ``encoders.json``, and the folders ``vae`` and ``text`` next to it for encoders that are built.

    A built encoder is in ``out`` whatever ``path`` is set to; ``encoders.json`` names the folder that is used.

    Args:
        config: settings; sections ``vae``, ``text`` and ``data`` are read.
        infos: folder of the infos.
        out: folder to write.

    Raises:
        MagicDriveError: a named encoder is missing or of another kind, or data for building is missing.
    """
    scenes = read_scenes(infos)
    with atomic_folder(out) as folder:
        facts = {"vae": _prepare_vae(config, scenes, folder, out), "text": _prepare_text(config, scenes, folder, out)}
        write_json(folder / "encoders.json", facts)


def _prepare_vae(config: Config, scenes: Sequence[Scene], folder: Path, out: Path) -> dict[str, Any]:
    build, root = config.vae.build, Path(config.data.root)
    facts: dict[str, Any] = {}
    train = _split(scenes, "train")
    length = longest_clip(train, CLIP_FRAMES)
    if build is not None:
        clips = draw_clips(train, root, build.resolution, length, build.clips, build.seed)
        model = build_vae(build, clips)
        model.save_pretrained(folder / "vae")
        model_folder, path = folder / "vae", (out / "vae").as_posix()
        facts["steps"] = build.steps
    else:
        model_folder, path = Path(config.vae.path), config.vae.path
        described = _describe(model_folder, "vae.path", vae.BUILD_HINT)
        if described.get("_class_name") != "AutoencoderKLCogVideoX":
            raise MagicDriveError(
                f"vae.path: {path} holds a {described.get('_class_name')}, not a CogVideoX VAE", vae.BUILD_HINT
            )
        clips = None
    loaded = vae.Vae.load(model_folder, scaling_factor=1.0, chunk_frames=config.vae.chunk_frames)
    if build is not None:
        held_out = _split(scenes, "val")
        frames = draw_clips(held_out, root, build.resolution, 1, HELD_OUT_FRAMES, build.seed)
        facts["psnr_frames"] = round(psnr(loaded, frames), 3)
        held_out_length = longest_clip(held_out, HELD_OUT_LENGTH)
        if held_out_length > 1:
            videos = draw_clips(held_out, root, build.resolution, held_out_length, HELD_OUT_CLIPS, build.seed)
            facts["psnr_clips"] = round(psnr(loaded, videos), 3)
    factor = config.vae.scaling_factor
    if factor == "measure":
        if clips is None:
            clips = draw_clips(train, root, SPREAD_SIZE, length, SPREAD_CLIPS, seed=0)
        factor = round(1 / latent_spread(loaded, clips[:SPREAD_CLIPS]), 6)
    elif factor == "stored":
        factor = read_json(model_folder / "config.json").get("scaling_factor")
        if not isinstance(factor, int | float) or not factor > 0:
            raise MagicDriveError(f"{model_folder / 'config.json'} stores no scaling_factor", "set vae.scaling_factor")
    return {
        **facts,
        "path": path,
        "digest": sha256_folder(model_folder),
        "scaling_factor": factor,
        "latent_channels": loaded.latent_channels,
    }


def _prepare_text(config: Config, scenes: Sequence[Scene], folder: Path, out: Path) -> dict[str, Any]:
    if config.text.build is not None:
        build_text_encoder(
            config.text.build, sorted({caption(scene) for scene in scenes} | set(CLASSES)), folder / "text"
        )
        return {
            "path": (out / "text").as_posix(),
            "digest": sha256_folder(folder / "text"),
            "width": config.text.build.width,
        }
    path = Path(config.text.path)
    described = _describe(path, "text.path", text.BUILD_HINT)
    if described.get("model_type") != "t5":
        raise MagicDriveError(f"text.path: {path} holds a {described.get('model_type')}, not a T5", text.BUILD_HINT)
    return {"path": config.text.path, "digest": sha256_folder(path), "width": described["d_model"]}


def _split(scenes: Sequence[Scene], split: str) -> list[Scene]:
    return [scene for scene in scenes if scene.split in (split, "both")]


def _describe(folder: Path, key: str, hint: str) -> dict[str, Any]:
    """Reads config.json of a from_pretrained folder and checks that weights are there.

    Args:
        folder: the folder.
        key: setting that names it, for messages.
        hint: how to get the encoder.

    Raises:
        MagicDriveError: the folder, its weights or config.json are missing.
    """
    if not folder.is_dir():
        raise MagicDriveError(f"{key}: the folder {folder} is missing", hint)
    if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise MagicDriveError(f"{key}: {folder} holds no weights (*.safetensors or *.bin)", hint)
    config: dict[str, Any] = read_json(folder / "config.json", hint)
    return config
