"""The caches hold what the encoders compute, and are refused when they are stale or incomplete."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from magicdrive_core.config.schema import Bucket
from magicdrive_core.data.clips import caption
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.data.map_cache import write_map
from magicdrive_core.data.pictures import read_clip
from magicdrive_core.data.records import CLASSES, Clip
from magicdrive_core.encoders import encode_latents as encode
from magicdrive_core.encoders.build_encoders import build_encoders
from magicdrive_core.encoders.caches import (
    LatentCache,
    LiveLatents,
    TextCache,
    open_text,
    write_latent_cache,
    write_text_cache,
)
from magicdrive_core.encoders.encode_latents import EncoderSettings, SceneWork, is_prefix, plan_scenes
from magicdrive_core.encoders.text import TextEncoder
from magicdrive_core.encoders.vae import Vae, to_video
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.training.loader import Batch, Loader
from tests.encoders.conftest import Project, make_config, make_scene, write_infos

TRAIN = "token-scene-1"


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """Clips are encoded in this process: others would spend seconds on their imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda pid: {0})
        yield


@pytest.fixture(scope="module")
def project(source: Project, one_core: None) -> Project:
    """Encoders and caches, made once in the layout of ``artifacts/``."""
    build_encoders(source.config, source.infos, source.encoders)
    write_text_cache(source.config, source.infos, source.encoders, source.artifacts / "text")
    write_latent_cache(source.config, source.infos, source.encoders, source.artifacts / "latents")
    return source


@pytest.fixture
def copy(project: Project, tmp_path: Path) -> Path:
    """A copy of the artifacts that a test may damage."""
    shutil.copytree(project.artifacts, tmp_path / "artifacts")
    return tmp_path / "artifacts"


def facts(project: Project) -> dict:
    return json.loads((project.encoders / "encoders.json").read_text())


def test_text_features_are_the_encoders(project) -> None:
    cache = TextCache(project.artifacts / "text", project.config)
    encoder = TextEncoder.load(project.encoders / "text", project.config.text.max_tokens)
    assert cache.width == facts(project)["text"]["width"] == encoder.width
    for scene in read_scenes(project.infos):
        text = caption(scene)
        torch.testing.assert_close(cache.features(text), encoder.encode([text])[0], atol=1e-5, rtol=0)
    expected = torch.stack([encoder.encode([name])[0].mean(dim=0) for name in CLASSES])
    torch.testing.assert_close(cache.class_features, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(cache.base_feature, encoder.encode([""])[0][0], atol=1e-5, rtol=0)
    with pytest.raises(MagicDriveError, match="no features of the caption 'A new one'"):
        cache.features("A new one")


def test_moments_are_the_encoders(project) -> None:
    cache = LatentCache(project.artifacts / "latents", project.config)
    scene = read_scenes(project.infos)[0]
    made = facts(project)["vae"]
    vae = Vae.load(project.encoders / "vae", scaling_factor=made["scaling_factor"])
    for size, frames, starts, shape in (
        ("56x104", 1, [0, 6, 12, 18], (6, 8, 1, 7, 13)),
        ("56x104", 9, [0, 2, 4, 6, 8, 10], (6, 8, 3, 7, 13)),
        ("56x104", 17, [0, 2], (6, 8, 5, 7, 13)),
        ("112x200", 1, [0, 6, 12, 18], (6, 8, 1, 14, 25)),
    ):
        assert cache.starts(size, frames, TRAIN) == starts
        for start in (starts[0], starts[-1]):
            clip = Clip(TRAIN, start, frames)
            moments = cache.moments(size, clip)
            assert moments.shape == shape
            assert moments.dtype == torch.float16
            expected = vae.moments(to_video(read_clip(project.root, scene, clip, size)))
            torch.testing.assert_close(moments.float(), expected, atol=2e-3, rtol=2e-3)
    assert cache.starts("56x104", 9, "token-scene-2") == []  # validation scenes are not trained on


def test_clips_encoded_live_are_those_of_the_cache(project, tmp_path) -> None:
    (tmp_path / "artifacts").symlink_to(project.artifacts)
    scenes = {scene.token: scene for scene in read_scenes(project.infos)}
    cache = LatentCache(project.artifacts / "latents", project.config)
    live = LiveLatents(project.config, tmp_path, scenes)
    for size, frames, start in (("56x104", 1, 6), ("56x104", 9, 4), ("56x104", 17, 2), ("112x200", 1, 12)):
        clip = Clip(TRAIN, start, frames)
        moments = live.moments(size, clip)
        torch.testing.assert_close(moments, cache.moments(size, clip), atol=2e-3, rtol=2e-3)
    some = live.moments(size, clip, [1, 4])
    assert torch.equal(some[[1, 4]], moments[[1, 4]])
    assert not some[[0, 2, 3, 5]].any()
    latents = project.config.latents.model_copy(update={"live": True})
    write_latent_cache(
        project.config.model_copy(update={"latents": latents}), project.infos, project.encoders, tmp_path / "latents"
    )
    assert [path.name for path in (tmp_path / "latents").iterdir()] == ["index.json"]


def test_captions_encoded_live_are_those_of_the_cache(project, tmp_path) -> None:
    (tmp_path / "artifacts").symlink_to(project.artifacts)
    live = make_config(project.root, text={"live": True})
    assert isinstance(open_text(project.config, tmp_path), TextCache)
    cache, encoded = TextCache(project.artifacts / "text", project.config), open_text(live, tmp_path)
    for scene in read_scenes(project.infos):
        text = caption(scene)
        torch.testing.assert_close(encoded.features(text), cache.features(text), atol=1e-5, rtol=0)
        assert encoded.features(text) is encoded.features(text)
    write_text_cache(live, project.infos, project.encoders, tmp_path / "text")
    names = TextCache(tmp_path / "text")
    assert all(caption(scene) not in names for scene in read_scenes(project.infos))
    torch.testing.assert_close(names.class_features, cache.class_features, atol=1e-5, rtol=0)


def test_training_gets_equal_batches_from_caches_and_live_encoding(project, tmp_path) -> None:
    """Posterior samples, masks, conditions and text are equal to rounding."""
    (tmp_path / "artifacts").mkdir()
    for name in ("infos", "encoders", "text", "latents"):
        (tmp_path / "artifacts" / name).symlink_to(project.artifacts / name)
    for scene in read_scenes(project.infos):
        bits = np.random.default_rng(0).integers(0, 256, (len(scene), 200, 200), dtype=np.uint8)
        for cells in (100, 200):
            path = tmp_path / f"artifacts/conditions/bev/{cells}/{scene.token}.npz"
            write_map(path, bits[:, :cells, :cells])
    cached = project.config
    live = make_config(project.root, text={"live": True}, latents={"live": True})
    drawn: list[list[Batch]] = []
    for config in (cached, live):
        with Loader(config, "stage2", tmp_path) as loader:
            loader.start(0, groups=1, group=0, limit=5)
            drawn.append([loader.next() for _ in range(5)])
    assert {batch.shape[0] for batch in drawn[0]} == {1, 9}
    for one, other in zip(*drawn, strict=True):
        torch.testing.assert_close(one.latents, other.latents, atol=6e-3, rtol=6e-3)
        assert torch.equal(one.generator.get_state(), other.generator.get_state())
        for field in fields(one.conditions):
            ours, theirs = getattr(one.conditions, field.name), getattr(other.conditions, field.name)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_size_and_duration_are_announced_before_the_work(project, tmp_path, capsys, monkeypatch) -> None:
    errors: list[str] = []
    seen: list[int] = []
    encode_texts = TextEncoder.encode

    def watched(self, captions: list[str], batch: int = 8) -> list[torch.Tensor]:
        errors.append(capsys.readouterr().err)
        seen.append(len(captions))
        return encode_texts(self, captions, batch)

    monkeypatch.setattr(TextEncoder, "encode", watched)
    write_text_cache(project.config, project.infos, project.encoders, tmp_path / "text")
    assert seen == [7, 7, 14]  # every second text as a sample, twice; then all
    assert not any("texts" in line for line in errors[:2])
    assert re.search(r"text: 14 texts, 0\.\d MB, about 0\.\d minutes", errors[2])
    full_disk = shutil._ntuple_diskusage(100, 99, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: full_disk)
        with pytest.raises(MagicDriveError, match=r"text features need .* GB"):
            write_text_cache(project.config, project.infos, project.encoders, tmp_path / "other")
    assert len(seen) == 3
    write_latent_cache(project.config, project.infos, project.encoders, tmp_path / "latents")
    assert re.search(r"latents: \d+ frames of 1 scenes, [\d.]+ MB, about [\d.]+ minutes", capsys.readouterr().err)


def test_the_index_holds_the_deviation_of_scaled_latents(project) -> None:
    index = json.loads((project.artifacts / "latents/index.json").read_text())
    assert set(index["scaled_std"]) == {"56x104-1", "56x104-9", "56x104-17", "112x200-1"}
    cache = LatentCache(project.artifacts / "latents", project.config)
    mean, log_variance = torch.stack(
        [cache.moments("56x104", Clip(TRAIN, start, 9)) for start in cache.starts("56x104", 9, TRAIN)]
    ).double().chunk(2, dim=2)  # fmt: skip
    variance = mean.var(unbiased=False) + log_variance.exp().mean()
    expected = facts(project)["vae"]["scaling_factor"] * variance.sqrt().item()
    assert index["scaled_std"]["56x104-9"] == pytest.approx(expected, rel=1e-6)


def test_a_clip_that_is_not_cached_is_named(project) -> None:
    cache = LatentCache(project.artifacts / "latents", project.config)
    with pytest.raises(MagicDriveError, match=f"no latents of 56x104-9 from frame 1 of scene {TRAIN}") as caught:
        cache.moments("56x104", Clip(TRAIN, 1, 9))
    assert "dvc repro" in caught.value.hint


@pytest.mark.parametrize(("cache", "reader"), [("text", TextCache), ("latents", LatentCache)])
def test_stale_caches_are_refused(copy, cache, reader, project) -> None:
    reader(copy / cache, project.config)  # a copy is accepted
    encoders = copy / "encoders/encoders.json"
    whole = encoders.read_text()
    encoders.write_text(whole.replace('"digest": "', '"digest": "0'))
    with pytest.raises(MagicDriveError, match=r"stale: .*encoders\.json now names another encoder") as caught:
        reader(copy / cache, project.config)
    assert "dvc repro" in caught.value.hint
    encoders.write_text(whole)
    write_infos(copy / "infos", [make_scene("scene-1", "train", "Another scene", 0)])
    with pytest.raises(MagicDriveError, match=r"stale: .*infos has changed since it was made"):
        reader(copy / cache, project.config)


@pytest.mark.parametrize(
    ("cache", "reader", "changes", "message"),
    [
        ("text", TextCache, {"text": {"max_tokens": 7}}, "max_tokens 16, now 7 is set"),
        ("latents", LatentCache, {"vae": {"chunk_frames": None}}, "chunk_frames 8, now None is set"),
        ("latents", LatentCache, {"latents": {"dtype": "float32"}}, "dtype float16, now float32 is set"),
        ("latents", LatentCache, {"latents": {"scaled_decoding": True}}, "scaled_decoding False, now True is set"),
    ],
)
def test_caches_of_other_settings_are_refused(project, cache, reader, changes, message) -> None:
    config = make_config(project.root, **changes)
    with pytest.raises(MagicDriveError, match=f"{cache} is stale: made with {message}") as caught:
        reader(project.artifacts / cache, config)
    assert "dvc repro" in caught.value.hint


@pytest.mark.parametrize(
    ("cache", "reader", "file"),
    [
        ("text", TextCache, "features.safetensors"),
        ("latents", LatentCache, f"56x104-9/{TRAIN}.safetensors"),
    ],
)
def test_incomplete_caches_are_refused(copy, cache, reader, file, project) -> None:
    path = copy / cache / file
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(MagicDriveError, match="missing or incomplete") as caught:
        reader(copy / cache, project.config)
    assert "dvc repro" in caught.value.hint
    path.unlink()
    with pytest.raises(MagicDriveError, match="missing or incomplete"):
        reader(copy / cache, project.config)
    (copy / cache / "index.json").unlink()
    with pytest.raises(MagicDriveError, match=r"index\.json is missing"):
        reader(copy / cache, project.config)


def test_a_broken_picture_stops_the_work_and_the_next_run_resumes(project, tmp_path, monkeypatch) -> None:
    root = tmp_path / "root"
    shutil.copytree(project.root, root)
    whole = (root / "samples/3.jpg").read_bytes()
    (root / "samples/3.jpg").write_bytes(whole[:2000])
    with pytest.raises(MagicDriveError, match=r"3\.jpg is not a complete picture"):
        write_latent_cache(make_config(root), project.infos, project.encoders, tmp_path / "latents")
    assert not (tmp_path / "latents").exists()
    (partial,) = tmp_path.glob(".latents.*.resumable")
    (root / "samples/3.jpg").write_bytes(whole)
    done = {path.relative_to(partial) for path in partial.rglob("*.safetensors")}
    made: list[str] = []
    encode_view = encode._encode_view
    monkeypatch.setattr(encode, "_encode_view", lambda work, read: made.append(work.size) or encode_view(work, read))
    write_latent_cache(make_config(root), project.infos, project.encoders, tmp_path / "latents")
    assert set(made) == {"56x104", "112x200"} - {path.parts[0].rsplit("-", 1)[0] for path in done}
    assert not list(tmp_path.glob(".latents*"))
    for path in (project.artifacts / "latents").rglob("*.safetensors"):
        assert (
            tmp_path / "latents" / path.relative_to(project.artifacts / "latents")
        ).read_bytes() == path.read_bytes()
    spread = [
        json.loads((folder / "index.json").read_text())["scaled_std"]
        for folder in (tmp_path / "latents", project.artifacts / "latents")
    ]
    assert spread[0] == spread[1]


@pytest.mark.slow
def test_a_broken_picture_stops_the_other_processes(project, tmp_path, monkeypatch) -> None:
    """The long scene takes a minute or more: if the run waited for it, its file would exist."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    broken = tmp_path / "broken.jpg"
    broken.write_bytes((project.root / "samples/0.jpg").read_bytes()[:2000])
    works = [
        SceneWork("long", [[project.root / "samples/0.jpg"]] * 3000, "56x104", {17: list(range(2900))}),
        SceneWork("broken", [[broken]], "56x104", {1: [0]}),
    ]
    settings = EncoderSettings(str(project.encoders / "vae"), 1.0, 4, 8, "float16")
    with pytest.raises(MagicDriveError, match=r"broken\.jpg is not a complete picture"):
        encode.encode_scenes(works, settings, tmp_path / "latents")
    assert not list((tmp_path / "latents").rglob("*.safetensors"))
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_processes_give_the_same_files(project, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    write_latent_cache(project.config, project.infos, project.encoders, tmp_path / "latents")
    for path in (project.artifacts / "latents").rglob("*.safetensors"):
        other = tmp_path / "latents" / path.relative_to(project.artifacts / "latents")
        for name, tensor in load_file(path).items():
            torch.testing.assert_close(load_file(other)[name], tensor, atol=2e-3, rtol=2e-3)


def test_a_full_disk_is_reported_before_the_work(project, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(MagicDriveError, match=r"latents need .* GB"):
        write_latent_cache(project.config, project.infos, project.encoders, tmp_path / "latents")


def test_a_bucket_longer_than_every_scene_is_left_out(project) -> None:
    scenes = read_scenes(project.infos)
    long, short = (Bucket(resolution="56x104", frames=frames, batch=1) for frames in (33, 9))
    works = plan_scenes(scenes, project.root, [long, short], 1)
    assert [sorted(work.starts) for work in works] == [[9]]
    with pytest.raises(MagicDriveError, match="no training scene is long enough for any bucket"):
        plan_scenes(scenes, project.root, [long], 1)


def test_whole_scenes_are_encoded_once_beside_clips_of_their_length(project) -> None:
    """19 frames give a whole clip of 17 from frame 0, which the bucket of 17 frames has too."""
    scenes = read_scenes(project.infos)
    clips = Bucket(resolution="56x104", frames=17, batch=1)
    whole = Bucket(resolution="56x104", frames=241, batch=1, whole=True, repeat=40)
    assert [work.starts for work in plan_scenes(scenes, project.root, [whole], 1)] == [{17: [0]}]
    assert [work.starts for work in plan_scenes(scenes, project.root, [clips, whole], 1)] == [{17: [0, 1, 2]}]


def test_the_planned_size_is_the_written_size(project) -> None:
    kinds = (("56x104", 1), ("56x104", 9), ("56x104", 17), ("112x200", 1))
    buckets = [Bucket(resolution=size, frames=frames, batch=1) for size, frames in kinds]
    works = plan_scenes(read_scenes(project.infos), project.root, buckets, 2)
    settings = EncoderSettings(str(project.encoders / "vae"), 1.0, 4, 8, "float16")
    written = sum(path.stat().st_size for path in (project.artifacts / "latents").rglob("*.safetensors"))
    assert sum(work.bytes(settings) for work in works) == pytest.approx(written, rel=0.05)
    # The clips of 9 frames from frames 0 and 2 are prefixes of those of 17.
    assert sum(work.frames(8) for work in works) == 6 * (4 + 4 * 9 + 2 * 17 + 4)
    assert sum(work.frames(None) for work in works) == 6 * (4 + 6 * 9 + 2 * 17 + 4)


@pytest.mark.parametrize("chunk", [8, 16, None])
@pytest.mark.parametrize(("frames", "longer"), [(1, 9), (9, 17), (9, 25), (17, 33), (9, 33), (8, 17)])
def test_a_clip_is_a_prefix_exactly_if_the_encoder_gives_equal_moments(project, chunk, frames, longer) -> None:
    vae = Vae.load(project.encoders / "vae", scaling_factor=1.0, chunk_frames=chunk)
    video = torch.rand((1, 3, longer, 16, 16), generator=torch.Generator().manual_seed(3)) * 2 - 1
    short = vae.moments(video[:, :, :frames])
    same = torch.equal(vae.moments(video)[:, :, : short.shape[2]], short)
    assert is_prefix(frames, longer, chunk) == same
