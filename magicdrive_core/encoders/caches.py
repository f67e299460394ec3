"""Text features and VAE moments for training: computed once into caches, or live when they are needed.

A cache is a folder that appears only when it is complete. Its ``index.json`` says what it was made from. Readers
compare this with the encoders and infos next to the cache (the layout of ``artifacts/``) and refuse a stale one.

``TextCache`` and ``LatentCache`` read caches. ``LiveText`` and ``LiveLatents`` have the same interface and encode when
they are asked (``text.live``, ``latents.live``).
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

from magicdrive_core.config.schema import Config, bucket_name, fingerprint, parse_size
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
from magicdrive_core.utils.files import atomic_folder, check_space, file_name, read_json, resumable_folder, write_json
from magicdrive_core.utils.progress import announce, track

if TYPE_CHECKING:
    from magicdrive_core.encoders.text import TextEncoder

FORMAT = 1  # of the cache files; another number is refused
TEXTS_AT_ONCE = 32
SAMPLE = 8  # texts that are timed for the estimate
INDEX = "index.json"
FEATURES = "features.safetensors"
CAPTIONS = "captions.json"
HINT = "run `dvc repro`"
ENCODERS_HINT = "run `dvc repro encoders`"


def write_text_cache(config: Config, infos: Path, encoders: Path, out: Path) -> None:
    """Writes the T5 features of every distinct caption, with and without "Daytime.", and of every class name.

    The folder holds ``captions.json``, ``index.json`` and ``features.safetensors`` with these tensors in float32: one
    (l, D) for each caption, named by its index in ``captions.json``; ``class_features`` (K, D), the mean over the
    tokens of each class name; ``base_feature`` (D), of the empty text. With ``text.live`` it holds no captions.

    Args:
        config: settings; sections ``text`` and ``data`` are read.
        infos: folder of the infos.
        encoders: folder of ``encoders.json``.
        out: folder of the cache.

    Raises:
        MagicDriveError: the infos or the encoder are missing, or the disk is too small.
    """
    from magicdrive_core.encoders.text import TextEncoder  # imports transformers, which readers of caches do not need

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
    """Encodes texts to features (l, D); announces size and duration first, estimated from a sample."""
    rows = encoder.count_tokens(texts)
    size = 4 * encoder.width * rows
    check_space(out, "text features", size, "free some space, or set text.live")
    sample = texts[:: -(-len(texts) // SAMPLE)]
    encoder.encode(sample)  # warm-up: the first call takes longer
    began = time.perf_counter()
    encoder.encode(sample)
    seconds = (time.perf_counter() - began) * rows / encoder.count_tokens(sample)
    announce("text", f"{len(texts):,} texts", size, seconds)
    features: list[Tensor] = []
    for start in track(range(0, len(texts), TEXTS_AT_ONCE), "text features"):
        features += encoder.encode(texts[start : start + TEXTS_AT_ONCE])
    return features


def write_latent_cache(config: Config, infos: Path, encoders: Path, out: Path) -> None:
    """Writes the VAE moments of every training clip of every bucket of the three stages.

    The clips of a bucket start at frame 0, ``start_stride``, 2 ``start_stride`` and so on; single frames are the key
    frames. The folder holds ``<HxW>-<frames>/<scene>.safetensors`` with ``moments`` (n, V, 2C, T, h, w) and ``starts``
    (n), and ``index.json`` with the standard deviation of each bucket's scaled latents. After an interruption the next
    call continues with the scenes that are not encoded yet. With ``latents.live`` only the index is written.

    Args:
        config: settings; sections ``training``, ``latents``, ``vae`` and ``data`` are read.
        infos: folder of the infos.
        encoders: folder of ``encoders.json``.
        out: folder of the cache.

    Raises:
        MagicDriveError: infos, encoder or a picture are missing or broken, or the disk is too small.
    """
    made = read_json(encoders / "encoders.json", HINT)["vae"]
    buckets = [bucket for stage in config.training.stages for bucket in config.training.stage(stage).buckets]
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
        written = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        needed = sum(work.bytes(settings) for work in works) - written
        check_space(
            out,
            "latents",
            needed,
            "free some space, raise latents.start_stride, train fewer buckets, or set latents.live",
        )
        spread = encode_scenes(works, settings, folder, scaled=config.latents.scaled_decoding) if works else {}
        files = [
            f"{bucket_name(work.size, n)}/{file_name(work.scene)}.safetensors" for work in works for n in work.starts
        ]
        sources = {"encoder": made["digest"], "infos": infos_digest(infos)}
        _write_index(folder, files, sources | _latent_settings(config) | {"scaled_std": spread})


class TextCache:
    """Reads text features from the cache of ``write_text_cache``.

    Args:
        folder: the cache.
        config: settings that the cache must have been made with; None: only class names are read, which do not depend
            on settings.

    Attributes:
        class_features: (K, D) features of the class names.
        base_feature: (D) feature of the empty text.

    Raises:
        MagicDriveError: the cache is missing or incomplete, or was made by another encoder, from other infos than those
            next to it, or with other settings.
    """

    def __init__(self, folder: Path | str, config: Config | None = None) -> None:
        folder = Path(folder)
        self._index = _read_index(folder, "text", _text_settings(config) if config else {})
        self._folder = folder
        self._names = {caption: str(i) for i, caption in enumerate(read_json(folder / CAPTIONS, HINT))}
        self._file = safe_open(folder / FEATURES, framework="pt")
        self.class_features: Tensor = self._file.get_tensor("class_features")
        self.base_feature: Tensor = self._file.get_tensor("base_feature")

    @property
    def width(self) -> int:
        """Width D of the features."""
        return int(self.base_feature.shape[0])

    def __contains__(self, caption: str) -> bool:
        return caption in self._names

    def features(self, caption: str) -> Tensor:
        """Reads the features of a caption.

        Args:
            caption: the text, exactly as it was cached.

        Returns:
            (l, D) in float32 for the caption's l tokens.

        Raises:
            MagicDriveError: the caption is not in the cache.
        """
        if caption not in self._names:
            raise MagicDriveError(f"{self._folder} has no features of the caption {caption!r}", HINT)
        tensor: Tensor = self._file.get_tensor(self._names[caption])
        return tensor


class LatentCache:
    """Reads VAE moments from the cache of ``write_latent_cache``, one clip at a time, without loading the whole file.

    Args:
        folder: the cache.
        config: settings that the cache must have been made with.

    Raises:
        MagicDriveError: the cache is missing or incomplete, or was made by another encoder, from other infos than those
            next to it, or with other settings.
    """

    def __init__(self, folder: Path | str, config: Config) -> None:
        self._folder = Path(folder)
        self._index = _read_index(self._folder, "vae", _latent_settings(config))

    def starts(self, size: str, frames: int, scene: str) -> list[int]:
        """Lists the first frames of the cached clips of one scene in ascending order.

        Args:
            size: height and width of the video, such as "224x400".
            frames: frames of the clips.
            scene: scene token.

        Returns:
            Frame numbers within the scene; empty if the cache has no clips of this kind.

        Raises:
            MagicDriveError: a file of the cache cannot be read.
        """
        if f"{bucket_name(size, frames)}/{file_name(scene)}.safetensors" not in self._index["files"]:
            return []
        with self._open(size, frames, scene) as file:
            return [int(start) for start in file.get_tensor("starts")]

    def moments(self, size: str, clip: Clip) -> Tensor:
        """Reads the posterior mean and log-variance of a clip.

        Args:
            size: height and width of the video, such as "224x400".
            clip: the clip.

        Returns:
            (V, 2C, T, h, w) in the dtype of the cache: mean, then log-variance, along the channels.

        Raises:
            MagicDriveError: the cache does not hold this clip, or its file cannot be read.
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
        path = self._folder / bucket_name(size, frames) / f"{file_name(scene)}.safetensors"
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise MagicDriveError(f"{path} cannot be read: {error}", f"delete {self._folder} and {HINT}") from None


def _write_index(folder: Path, files: Iterable[str], settings: dict[str, Any]) -> None:
    sizes = {name: (folder / name).stat().st_size for name in files}
    write_json(folder / INDEX, {"format": FORMAT, "files": sizes, **settings})


def _text_settings(config: Config) -> dict[str, Any]:
    """Returns the settings that decide the contents of the text cache."""
    return {"max_tokens": config.text.max_tokens}


def _latent_settings(config: Config) -> dict[str, Any]:
    """Returns the settings that decide the latents."""
    return {
        "chunk_frames": config.vae.chunk_frames,
        "dtype": config.latents.dtype,
        "scaled_decoding": config.latents.scaled_decoding,
    }


def _read_index(folder: Path, encoder: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the index of a cache and checks that the cache is complete and up to date.

    Args:
        folder: the cache.
        encoder: entry of ``encoders.json`` that made it: "text" or "vae".
        settings: settings that it must have been made with, by name.

    Raises:
        MagicDriveError: the cache is missing, incomplete or stale.
    """
    index: dict[str, Any] = read_json(folder / INDEX, HINT)
    again = f"delete {folder} and {HINT}"
    if index.get("format") != FORMAT:
        raise MagicDriveError(f"{folder} was written by another version of this project", again)
    for name, size in index["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise MagicDriveError(f"{path} is missing or incomplete", again)
    encoders = folder.parent / "encoders/encoders.json"
    if encoders.is_file() and read_json(encoders)[encoder]["digest"] != index["encoder"]:
        raise MagicDriveError(f"{folder} is stale: {encoders} now names another encoder", HINT)
    infos = folder.parent / "infos"
    if infos.is_dir() and infos_digest(infos) != index["infos"]:
        raise MagicDriveError(f"{folder} is stale: {infos} has changed since it was made", HINT)
    for name, value in settings.items():
        if index.get(name) != value:
            raise MagicDriveError(f"{folder} is stale: made with {name} {index.get(name)}, now {value} is set", HINT)
    return index


class LiveText:
    """Encodes captions when they are needed, and keeps their features; has the interface of ``TextCache``.

    Args:
        config: settings of the text encoder.
        project: folder of the project.

    Raises:
        MagicDriveError: the text encoder is missing.
    """

    def __init__(self, config: Config, project: Path) -> None:
        from magicdrive_core.encoders.text import TextEncoder  # imports transformers, which takes seconds

        made = read_json(project / "artifacts/encoders/encoders.json", ENCODERS_HINT)["text"]
        device = this_device()
        self._encoder = TextEncoder.load(project / made["path"], config.text.max_tokens, device)
        self._known: dict[str, Tensor] = {}

    def features(self, caption: str) -> Tensor:
        """Encodes a caption, or returns the features that were kept of it.

        Args:
            caption: the text; cut to ``text.max_tokens`` tokens.

        Returns:
            (l, D) in float32 on the CPU for the caption's l tokens.
        """
        if caption not in self._known:
            self._known[caption] = self._encoder.encode([caption])[0]
        return self._known[caption]


def open_text(config: Config, project: Path) -> TextCache | LiveText:
    """Opens the source of text features that ``text.live`` chooses.

    Args:
        config: settings.
        project: folder of the project.

    Returns:
        The cache in ``artifacts/text``, or the live encoder.

    Raises:
        MagicDriveError: the cache is missing or stale, or the text encoder is missing.
    """
    return LiveText(config, project) if config.text.live else TextCache(project / "artifacts/text", config)


class LiveLatents:
    """Encodes clips when they are needed, view by view; has the interface of ``LatentCache``.

    Args:
        config: settings of the VAE and the pictures.
        project: folder of the project.
        scenes: all scenes by token.

    Raises:
        MagicDriveError: the VAE is missing.
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
        """Encodes the posterior mean and log-variance of a clip.

        Args:
            size: height and width of the video, such as "224x400".
            clip: the clip.
            views: views that are encoded; the moments of the others are zeros.

        Returns:
            (V, 2C, T, h, w) in the dtype of the cache.

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
