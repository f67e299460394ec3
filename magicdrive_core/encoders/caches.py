"""What the encoders computed once: text features, and VAE moments of all clips that are trained on.

A cache is a folder that appears whole or not at all, with an ``index.json`` that says what it was made from. Readers
compare it with the encoders and infos that lie beside the cache (the layout of ``artifacts/``) and refuse a stale one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from magicdrive_core.config import STAGES, Config, bucket_name, fingerprint
from magicdrive_core.data.clips import caption, weathers
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.data.records import CLASSES, Clip
from magicdrive_core.encoders.encode import encode_scenes
from magicdrive_core.encoders.scene_work import EncoderSettings, SceneWork, plan_scenes
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.files import atomic_folder, read_json, resumable_folder, sha256_folder, write_json

FORMAT = 1  # of the files below; another number is refused
INDEX = "index.json"
FEATURES = "features.safetensors"
CAPTIONS = "captions.json"
HINT = "run `dvc repro`"


def write_text(config: Config, infos: Path, encoders: Path, out: Path) -> None:
    """T5 features of every distinct caption, with and without "Daytime.", every class name and the empty text.

    Writes ``features.safetensors`` (one (l, D) float32 tensor a caption, named by its place in ``captions.json``;
    ``class_features`` (K, D): the mean over the tokens of the bare class name; ``base_feature`` (D): the empty
    text's) and ``index.json``.

    Raises:
        MagicDriveError: the infos or the encoder are missing, or the disk is full.
    """
    from magicdrive_core.encoders.text import TextEncoder  # readers of caches need no transformers

    scenes = read_scenes(infos)
    by_day = (caption(scene, say_daytime=True) for scene in scenes if weathers(scene.description) == ["none"])
    captions = sorted({*(caption(scene) for scene in scenes), *by_day})
    made = read_json(encoders / "encoders.json", HINT)["text"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = TextEncoder.load(made["path"], config.text.max_tokens, device)
    features = encoder.encode([*captions, *CLASSES, ""])
    classes = features[len(captions) : -1]
    tensors = {str(i): feature.contiguous() for i, feature in enumerate(features[: len(captions)])}
    tensors["class_features"] = torch.stack([feature.mean(dim=0) for feature in classes])
    tensors["base_feature"] = features[-1].mean(dim=0)
    with atomic_folder(out) as folder:
        save_file(tensors, folder / FEATURES)
        write_json(folder / CAPTIONS, captions)
        settings = {"max_tokens": config.text.max_tokens, "encoder": made["digest"], "infos": sha256_folder(infos)}
        _write_index(folder, [FEATURES, CAPTIONS], settings)


def write_latents(config: Config, infos: Path, encoders: Path, out: Path) -> None:
    """Moments of every training clip of every bucket of the three stages.

    With ``latents.live`` there is nothing to encode, and only an index is written.

    A bucket's clips start at frame 0, ``start_stride``, 2 ``start_stride``, ...; single frames are the key frames.
    Writes ``<HxW>-<frames>/<scene>.safetensors`` with ``moments`` (n, V, 2C, T, h, w) and ``starts`` (n), and
    ``index.json`` with the standard deviation of each bucket's scaled latents. Interrupted, it goes on after the scenes
    that are encoded.

    Raises:
        MagicDriveError: infos, encoder or a picture are missing or broken, or the disk is too small.
    """
    made = read_json(encoders / "encoders.json", HINT)["vae"]
    buckets = sorted({(b.size, b.frames) for stage in STAGES for b in config.training.stage(stage).buckets})
    works: list[SceneWork] = []
    if not config.latents.live:
        works = plan_scenes(read_scenes(infos), Path(config.data.root), buckets, config.latents.start_stride)
    settings = EncoderSettings(
        made["path"], made["scaling_factor"], made["latent_channels"], config.vae.chunk_frames, config.latents.dtype
    )
    key = fingerprint(
        made["digest"], sha256_folder(infos), config.data.root, config.vae.chunk_frames, config.latents, buckets
    )
    with resumable_folder(out, key) as folder:
        there = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        _check_space(out, sum(work.bytes(settings) for work in works) - there)
        spread = encode_scenes(works, settings, folder, scaled=config.latents.scaled_decoding) if works else {}
        files = [f"{bucket_name(work.size, n)}/{work.scene}.safetensors" for work in works for n in work.starts]
        index = {
            "encoder": made["digest"],
            "infos": sha256_folder(infos),
            "chunk_frames": config.vae.chunk_frames,
            "dtype": config.latents.dtype,
            "scaled_decoding": config.latents.scaled_decoding,
            "start_stride": config.latents.start_stride,
            "scaled_std": spread,
        }
        _write_index(folder, files, index)


class TextCache:
    """Reads what ``write_text`` wrote.

    Raises:
        MagicDriveError: missing, half-written, or made by other encoders or from other infos than those beside it.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        self._index = _read_index(folder, "text")
        self._folder = folder
        self._names = {caption: str(i) for i, caption in enumerate(read_json(folder / CAPTIONS, HINT))}
        self._file = safe_open(folder / FEATURES, framework="pt")
        self.class_features: Tensor = self._file.get_tensor("class_features")  # K, D
        self.base_feature: Tensor = self._file.get_tensor("base_feature")  # D

    @property
    def width(self) -> int:
        """D."""
        return int(self.base_feature.shape[0])

    def __contains__(self, caption: str) -> bool:
        return caption in self._names

    def features(self, caption: str) -> Tensor:
        """(l, D) float32: the features of a caption's own tokens.

        Raises:
            MagicDriveError: the caption is not in the cache.
        """
        if caption not in self._names:
            raise MagicDriveError(f"{self._folder} has no features of the caption {caption!r}", HINT)
        tensor: Tensor = self._file.get_tensor(self._names[caption])
        return tensor


class LatentCache:
    """Reads what ``write_latents`` wrote, a clip at a time and without loading the rest of the file.

    Raises:
        MagicDriveError: missing, half-written, or made by other encoders or from other infos than those beside it.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        self._index = _read_index(self._folder, "vae")

    def starts(self, size: str, frames: int, scene: str) -> list[int]:
        """First frames of the clips of one scene that the cache holds, rising; none: an empty list."""
        if f"{bucket_name(size, frames)}/{scene}.safetensors" not in self._index["files"]:
            return []
        with self._open(size, frames, scene) as file:
            return [int(start) for start in file.get_tensor("starts")]

    def moments(self, size: str, clip: Clip) -> Tensor:
        """(V, 2C, T, h, w): posterior mean and log-variance of a clip's views, in the dtype of the cache.

        Raises:
            MagicDriveError: the cache does not hold this clip.
        """
        starts = self.starts(size, clip.frames, clip.scene)
        if clip.start not in starts:
            name = bucket_name(size, clip.frames)
            raise MagicDriveError(
                f"{self._folder} has no latents of {name} from frame {clip.start} of scene {clip.scene}", HINT
            )
        with self._open(size, clip.frames, clip.scene) as file:
            moments: Tensor = file.get_slice("moments")[starts.index(clip.start)]
        return moments

    def _open(self, size: str, frames: int, scene: str) -> Any:
        path = self._folder / bucket_name(size, frames) / f"{scene}.safetensors"
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise MagicDriveError(f"{path} cannot be read: {error}", f"delete {self._folder} and {HINT}") from None


def _write_index(folder: Path, files: Iterable[str], settings: dict[str, Any]) -> None:
    sizes = {name: (folder / name).stat().st_size for name in files}
    write_json(folder / INDEX, {"format": FORMAT, "files": sizes, **settings})


def _read_index(folder: Path, encoder: str) -> dict[str, Any]:
    """The index of a cache that is whole and was made from what lies beside it."""
    index: dict[str, Any] = read_json(folder / INDEX, HINT)
    again = f"delete {folder} and {HINT}"
    if index.get("format") != FORMAT:
        raise MagicDriveError(f"{folder} was written by another version of this program", again)
    for name, size in index["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise MagicDriveError(f"{path} is missing or not whole", again)
    encoders = folder.parent / "encoders/encoders.json"
    if encoders.is_file() and read_json(encoders)[encoder]["digest"] != index["encoder"]:
        raise MagicDriveError(f"{folder} is stale: it was made by another encoder than {encoders} names", HINT)
    infos = folder.parent / "infos"
    if infos.is_dir() and sha256_folder(infos) != index["infos"]:
        raise MagicDriveError(f"{folder} is stale: it was made from other data than {infos}", HINT)
    return index


def _check_space(out: Path, needed: int) -> None:
    existing = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise MagicDriveError(
            f"latents need {needed / 1e9:.1f} GB, and {existing} has {free / 1e9:.1f} GB free",
            "free some space, raise latents.start_stride, or train fewer buckets",
        )
