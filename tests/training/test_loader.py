"""Micro-batches depend on the seed and their index alone, and hold what the settings say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Bucket, Config
from magicdrive_core.config.schema import Conditions as ConditionSettings
from magicdrive_core.utils.files import write_json
from tests.training.gloo_ranks import run_distributed

PROFILE = Path(__file__).resolve().parents[2] / "profiles/demo.yaml"


def settings(share: int = 1, live: bool = False) -> Config:
    """Return settings for ranks that share clips in groups of ``share``."""
    config = load_config(PROFILE, ["text.max_tokens=6", f"latents.live={live}"])
    cluster = config.cluster.model_copy(update={"ranks": 2, "sequence_parallel": share})
    buckets = [Bucket(resolution="16x32", frames=frames, batch=batch) for frames, batch in ((1, 3), (33, 2), (65, 1))]
    changes = {"buckets": buckets, "mask_ratios": {"image_head": 0.5}, "simulate_sizes": [1, 2, 8][: 3 * share - 3]}
    stage = config.training.stage2.model_copy(update=changes)
    training = config.training.model_copy(update={"stage2": stage, "stage1": stage, "drop_condition": 0.5})
    conditions = ConditionSettings.model_construct(map_cells={"16x32": 4})
    return config.model_copy(update={"training": training, "conditions": conditions, "cluster": cluster})


def batches(project: Path, stage: Any, start: int, count: int, share: int = 1, live: bool = False) -> list[Any]:
    """Load micro-batches on this rank; return them, then its buckets' frames and the number of views it encoded."""
    from unittest import mock

    from magicdrive_core.parallel.mesh import Mesh
    from magicdrive_core.training import loader
    from tests.training.scenes import FakeLatents, FakeLive, FakeMaps, FakeText, make_scene

    FakeLive.encoded = 0
    scenes = [make_scene("a", 60), make_scene("b", 48)]
    fakes = {
        "read_scenes": lambda _: scenes,
        "BevMaps": FakeMaps,
        "open_text": FakeText,
        "LatentCache": FakeLatents,
        "LiveLatents": FakeLive,
    }
    with mock.patch.multiple(loader, **fakes), loader.Loader(settings(share, live), stage, project) as source:
        mesh = Mesh.of(share)
        source.start(start, mesh.groups, mesh.group, count, mesh.sequence_group)
        return [plain(source.next()) for _ in range(count)] + [[b.frames for b in source.buckets], FakeLive.encoded]


def plain(batch: Any) -> dict[str, Any]:
    """Turn a batch into NumPy arrays, so that it can leave the rank."""
    import dataclasses

    import torch

    conditions = {k: v.numpy() if torch.is_tensor(v) else v for k, v in dataclasses.asdict(batch.conditions).items()}
    return conditions | {
        "bucket": batch.bucket,
        "shape": batch.shape,
        "latents": batch.latents.numpy(),
        "x_mask": None if batch.mask is None else batch.mask.numpy(),
        "pad_patches": batch.conditions.pad_patches,
        "noise": batch.noise.numpy(),
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    import numpy as np

    return all(np.array_equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_json(
        folder / "artifacts/encoders/encoders.json",
        {"vae": {"scaling_factor": 2.0, "latent_channels": 4}, "text": {"width": 5}},
    )
    return folder


@pytest.fixture(scope="module")
def drawn(cached: Path) -> list[list[dict[str, Any]]]:
    """Load twelve micro-batches on both ranks."""
    results = run_distributed(batches, 2, cached, "stage2", 0, 12)
    assert [rank[12:] for rank in results] == [[[1, 33], 0]] * 2  # no scene has 65 frames
    return [rank[:12] for rank in results]


def test_a_later_start_resumes_with_the_same_batches(cached: Path, drawn: list[list[dict[str, Any]]]) -> None:
    later = run_distributed(batches, 2, cached, "stage2", 14, 5)
    for rank in range(2):
        assert all(same(a, b) for a, b in zip(later[rank][:5], drawn[rank][7:], strict=True))


def test_no_two_micro_batches_draw_the_same(drawn: list[list[dict[str, Any]]]) -> None:
    noise = [batch["noise"].tobytes() for rank in drawn for batch in rank]
    assert len(set(noise)) == len(noise)


def test_ranks_that_share_a_clip_draw_the_same(cached: Path, drawn: list[list[dict[str, Any]]]) -> None:
    """A group draws all that two single ranks draw, and padding sizes that are not below the real one."""
    first, second = run_distributed(batches, 2, cached, "stage2", 0, 24, 2)
    assert all(same(a, b) for a, b in zip(first[:24], second[:24], strict=True))
    assert {batch["pad_patches"] for batch in first[:24]} == {2, 8}
    apart = [batch for pair in zip(*drawn, strict=True) for batch in pair]
    assert {batch.pop("pad_patches") for batch in apart} == {None}
    assert all(same(a, b) for a, b in zip(apart, first[:24], strict=True))


def test_ranks_that_share_a_clip_each_encode_some_views(cached: Path) -> None:
    """The results equal those of one rank that encodes all."""
    expected = run_distributed(batches, 2, cached, "stage2", 0, 6, 2)
    for rank, drawn in enumerate(run_distributed(batches, 2, cached, "stage2", 0, 6, 2, True)):
        assert all(same(a, b) for a, b in zip(drawn[:6], expected[rank][:6], strict=True))
        assert drawn[7] == sum(3 * len(batch["latents"]) for batch in drawn[:6])


def test_batches_have_the_shapes_and_the_scale_of_latents(drawn: list[list[dict[str, Any]]]) -> None:
    sizes = {(batch["shape"], batch["latents"].shape) for rank in drawn for batch in rank}
    assert sizes == {((1, 16, 32), (3, 6, 4, 1, 2, 4)), ((33, 16, 32), (2, 6, 4, 9, 2, 4))}
    for batch in (batch for rank in drawn for batch in rank):
        B = len(batch["latents"])
        starts = batch["latents"].mean(axis=(1, 2, 3, 4, 5)) / 2  # the fake's mean is the clip's start
        assert (abs(starts - starts.round()) < 0.4).all()
        assert batch["latents"].std(axis=(1, 2, 3, 4, 5)) == pytest.approx([2.0] * B, abs=0.3)
        assert batch["bev_map"].shape == (B, batch["shape"][0], 4, 4)
        assert batch["text_mask"].sum(1).tolist() == [4] * B
        assert batch["box_latent"].shape == (B, batch["box_classes"].shape[-1], 128)


def test_conditions_are_dropped_and_masked_as_configured(drawn: list[list[dict[str, Any]]]) -> None:
    everything = [batch for rank in drawn for batch in rank]
    keep = [bool(flag) for batch in everything for flag in batch["keep"]]
    assert 0.2 < sum(keep) / len(keep) < 0.8
    videos = [batch for batch in everything if batch["shape"][0] == 33]
    assert {row.sum() for batch in videos for row in batch["keep_frame"]} == {33 - int(0.4 * 31)}
    masks = [row for batch in videos if batch["x_mask"] is not None for row in batch["x_mask"]]
    assert any(not row[0] for row in masks)
    assert all(row[1:].all() for row in masks)
    assert all(batch["x_mask"] is None for batch in everything if batch["shape"][0] == 1)
    hidden = [(batch["box_masks"] == -1).any() for batch in videos]
    assert any(hidden)


def test_stage_1_has_no_box_latents_and_other_draws(cached: Path, drawn: list[list[dict[str, Any]]]) -> None:
    first = run_distributed(batches, 2, cached, "stage1", 0, 1)
    assert first[0][0]["box_latent"] is None
    assert first[0][0]["noise"].tobytes() != drawn[0][0]["noise"].tobytes()
