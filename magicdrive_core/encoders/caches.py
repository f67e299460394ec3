"""What the encoders computed once: text features, and VAE moments of all clips that are trained on.

A cache is a folder that appears whole or not at all, with an ``index.json`` that says what it was made from. Readers
compare it with the encoders and infos that lie beside the cache (the layout of ``artifacts/``) and refuse a stale one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from magicdrive_core.config.schema import STAGES, Config, bucket_name, fingerprint, parse_size
from magicdrive_core.config.versions import CITY_VERSION, LATENTS_VERSION, VAE_VERSION
from magicdrive_core.data.clips import caption, weather_groups
from magicdrive_core.data.infos import infos_digest, read_scenes
from magicdrive_core.data.pictures import read_clip
from magicdrive_core.data.records import CLASSES, Clip, Scene, SceneHeader
from magicdrive_core.device import this_device
from magicdrive_core.encoders.encode_latents import DTYPES, EncoderSettings, SceneWork, encode_scenes, plan_scenes
from magicdrive_core.encoders.vae import Vae, latent_shape, to_video
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.utils.files import atomic_folder, check_space, read_json, resumable_folder, write_json
from magicdrive_core.utils.progress import announce, track

if TYPE_CHECKING:
    from magicdrive_core.encoders.text import TextEncoder

FORMAT = 1  # of the files below; another number is refused
TEXTS_AT_ONCE = 32
SAMPLE = 8  # texts whose time is taken before
INDEX = "index.json"
FEATURES = "features.safetensors"
CAPTIONS = "captions.json"
HINT = "run `dvc repro`"
ENCODERS_HINT = "run `dvc repro encoders`"


def write_text_cache(config: Config, infos: Path, encoders: Path, out: Path) -> None:
    """T5 features of every distinct caption, with and without "Daytime.", every class name and the empty text.

    With ``text.live`` there are no captions in it, only class names and the empty text. Writes
    ``features.safetensors`` (one (l, D) float32 tensor a caption, named by its place in ``captions.json``;
    ``class_features`` (K, D): the mean over the tokens of the bare class name; ``base_feature`` (D): the empty
    text's), ``captions.json`` and ``index.json``.

    Raises:
        MagicDriveError: the infos or the encoder are missing, or the disk is too small.
    """
    from magicdrive_core.encoders.text import TextEncoder  # readers of caches need no transformers

    scenes = [] if config.text.live else [SceneHeader.of(scene) for scene in read_scenes(infos)]
    by_day = (caption(scene, say_daytime=True) for scene in scenes if weather_groups(scene.description) == ["none"])
    captions = sorted({*(caption(scene) for scene in scenes), *by_day})
    made = read_json(encoders / "encoders.json", HINT)["text"]
    encoder = TextEncoder.load(made["path"], config.text.max_tokens, this_device())
    texts = [*captions, *CLASSES, ""]
    features = _encode_texts(encoder, texts, out)
    classes = features[len(captions) : -1]
    tensors = {str(i): feature.contiguous() for i, feature in enumerate(features[: len(captions)])}
    tensors["class_features"] = torch.stack([feature.mean(dim=0) for feature in classes])
    tensors["base_feature"] = features[-1].mean(dim=0)
    with atomic_folder(out) as folder:
        save_file(tensors, folder / FEATURES)
        write_json(folder / CAPTIONS, captions)
        sources = {"encoder": made["digest"], "infos": infos_digest(infos)}
        _write_index(folder, [FEATURES, CAPTIONS], sources | _text_settings(config))


def _encode_texts(encoder: TextEncoder, texts: list[str], out: Path) -> list[Tensor]:
    """Features of texts; before, a sample of them tells how long all will take."""
    rows = encoder.count_tokens(texts)
    size = 4 * encoder.width * rows
    check_space(out, "text features", size, "free some space, or set text.live")
    sample = texts[:: -(-len(texts) // SAMPLE)]
    encoder.encode(sample)  # the first time takes longer
    began = time.perf_counter()
    encoder.encode(sample)
    seconds = (time.perf_counter() - began) * rows / encoder.count_tokens(sample)
    announce("text", f"{len(texts):,} texts", size, seconds)
    features: list[Tensor] = []
    for start in track(range(0, len(texts), TEXTS_AT_ONCE), "text features"):
        features += encoder.encode(texts[start : start + TEXTS_AT_ONCE])
    return features


def write_latent_cache(config: Config, infos: Path, encoders: Path, out: Path) -> None:
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
    buckets = [bucket for stage in STAGES for bucket in config.training.stage(stage).buckets]
    works: list[SceneWork] = []
    if not config.latents.live:
        works = plan_scenes(read_scenes(infos), Path(config.data.root), buckets, config.latents.start_stride)
    settings = EncoderSettings(
        made["path"], made["scaling_factor"], made["latent_channels"], config.vae.chunk_frames, config.latents.dtype
    )
    chosen = sorted({(bucket.resolution, bucket.frames, bucket.whole) for bucket in buckets})
    key = fingerprint(
        *(made["digest"], infos_digest(infos), config.data.root, config.vae.chunk_frames, config.latents, chosen),
        *(CITY_VERSION, VAE_VERSION, LATENTS_VERSION),
    )
    with resumable_folder(out, key) as folder:
        there = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        needed = sum(work.bytes(settings) for work in works) - there
        check_space(
            out,
            "latents",
            needed,
            "free some space, raise latents.start_stride, train fewer buckets, or set latents.live",
        )
        spread = encode_scenes(works, settings, folder, scaled=config.latents.scaled_decoding) if works else {}
        files = [f"{bucket_name(work.size, n)}/{work.scene}.safetensors" for work in works for n in work.starts]
        sources = {"encoder": made["digest"], "infos": infos_digest(infos)}
        _write_index(folder, files, sources | _latent_settings(config) | {"scaled_std": spread})


class TextCache:
    """Reads what ``write_text`` wrote.

    Args:
        folder: the cache.
        config: that its settings must be those of; None: class names alone are read, which no setting changes.

    Raises:
        MagicDriveError: missing, half-written, or made by other encoders, from other infos than those beside it, or
            with other settings.
    """

    def __init__(self, folder: Path | str, config: Config | None = None) -> None:
        folder = Path(folder)
        self._index = _read_index(folder, "text", _text_settings(config) if config else {})
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
    """Reads what ``write_latent_cache`` wrote, a clip at a time and without loading the rest of the file.

    Raises:
        MagicDriveError: missing, half-written, or made by other encoders, from other infos than those beside it, or
            with other settings than those of ``config``.
    """

    def __init__(self, folder: Path | str, config: Config) -> None:
        self._folder = Path(folder)
        self._index = _read_index(self._folder, "vae", _latent_settings(config))

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


def _text_settings(config: Config) -> dict[str, Any]:
    """The settings that decide what the text cache holds."""
    return {"max_tokens": config.text.max_tokens}


def _latent_settings(config: Config) -> dict[str, Any]:
    """The settings that decide what the latents are."""
    return {
        "chunk_frames": config.vae.chunk_frames,
        "dtype": config.latents.dtype,
        "scaled_decoding": config.latents.scaled_decoding,
    }


def _read_index(folder: Path, encoder: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The index of a cache that is whole and was made from what lies beside it, with these settings."""
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
    if infos.is_dir() and infos_digest(infos) != index["infos"]:
        raise MagicDriveError(f"{folder} is stale: it was made from other data than {infos}", HINT)
    for name, value in settings.items():
        if index.get(name) != value:
            raise MagicDriveError(f"{folder} is stale: made with {name} {index.get(name)}, {value} is asked for", HINT)
    return index


class LiveText:
    """Encodes captions, as ``caches.TextCache`` reads; each is kept from its first time on.

    Raises:
        MagicDriveError: there is no encoder.
    """

    def __init__(self, config: Config, project: Path) -> None:
        from magicdrive_core.encoders.text import TextEncoder  # imports transformers, which takes seconds

        made = read_json(project / "artifacts/encoders/encoders.json", ENCODERS_HINT)["text"]
        device = this_device()
        self._encoder = TextEncoder.load(project / made["path"], config.text.max_tokens, device)
        self._known: dict[str, Tensor] = {}

    def features(self, caption: str) -> Tensor:
        """(l, D) float32: the features of a caption's own tokens."""
        if caption not in self._known:
            self._known[caption] = self._encoder.encode([caption])[0]
        return self._known[caption]


def open_text(config: Config, project: Path) -> TextCache | LiveText:
    """The features of captions, from the cache or encoded now, as ``text.live`` says.

    Raises:
        MagicDriveError: the cache is missing or stale, or there is no encoder.
    """
    return LiveText(config, project) if config.text.live else TextCache(project / "artifacts/text", config)


class LiveLatents:
    """Encodes view by view, as ``caches.LatentCache`` reads.

    Args:
        config: of the VAE and the pictures.
        project: the project's folder.
        scenes: by token.

    Raises:
        MagicDriveError: there is no encoder.
    """

    def __init__(self, config: Config, project: Path, scenes: Mapping[str, Scene]) -> None:
        made = read_json(project / "artifacts/encoders/encoders.json", ENCODERS_HINT)["vae"]
        self._vae = Vae.load(
            project / made["path"],
            scaling_factor=made["scaling_factor"],
            chunk_frames=config.vae.chunk_frames,
            device=this_device(),
        )
        self._root, self._scenes = project / config.data.root, scenes
        self._dtype, self._scaled = DTYPES[config.latents.dtype], config.latents.scaled_decoding

    def moments(self, size: str, clip: Clip, views: Sequence[int] = range(len(VIEWS))) -> Tensor:
        """(V, 2C, T, h, w): posterior mean and log-variance of a clip's views, in the dtype of the cache.

        ``views``: those that are encoded; the others are zeros.

        Raises:
            MagicDriveError: a picture is missing or broken.
        """
        scene, height, width = self._scenes[clip.scene], *parse_size(size)
        frames, h, w = latent_shape(clip.frames, height, width)
        moments = torch.zeros(len(VIEWS), 2 * self._vae.latent_channels, frames, h, w, dtype=self._dtype)
        pictures = read_clip(self._root, scene, clip, size, scaled=self._scaled, views=views)
        for view, frames_of_view in zip(views, pictures, strict=True):
            moments[view] = self._vae.moments(to_video(frames_of_view[None]))[0].cpu()
        return moments
