"""Micro-batches equal those recorded from the published sampler, and properties that hold for any buckets."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from magicdrive_core.data.buckets import BucketSampler, _TorchGenerator, idle_share, relative_cost
from magicdrive_core.errors import UsageError
from tests.conftest import PROJECT
from tests.golden.sets import COMPACT


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads((COMPACT / "golden_sampler.json").read_text())


def sampler_of(golden: dict[str, Any], rank: int, *, drop_last: bool = True, buckets: int = 3) -> BucketSampler:
    """The recorded runs use the first three buckets; one more run has the fourth, with batch size -1."""
    keys = list(golden["bucket_sizes"])[:buckets]
    counts, batches = ([golden[field][key] for key in keys] for field in ("bucket_sizes", "batch_size"))
    return BucketSampler(counts, batches, ranks=2, rank=rank, seed=42, drop_last=drop_last)


def named(golden: dict[str, Any], batches: list[tuple[int, list[int]]]) -> list[list[str]]:
    keys = list(golden["bucket_sizes"])
    return [[f"{clip}-{keys[bucket]}" for clip in clips] for bucket, clips in batches]


@pytest.mark.parametrize("run", range(8))
def test_batches_equal_the_recorded_ones(golden: dict[str, Any], run: int) -> None:
    recorded = golden["runs"][run]
    sampler = sampler_of(golden, recorded["rank"], drop_last=recorded["drop_last"])
    assert named(golden, sampler.epoch(recorded["epoch"])) == recorded["batches"]
    assert len(sampler) == recorded["length"]


def test_a_resumed_epoch_equals_the_recorded_one(golden: dict[str, Any]) -> None:
    sampler = sampler_of(golden, rank=1)
    resumed = list(islice(sampler.stream(4), len(sampler) - 2))
    assert named(golden, resumed) == golden["resume_after_2_steps_rank1"]


def test_recorded_batches_with_a_bucket_left_out(golden: dict[str, Any]) -> None:
    assert golden["batch_size"]["848-1600-12-9"] == -1
    sampler = sampler_of(golden, rank=0, buckets=4)
    assert named(golden, sampler.epoch(0)) == golden["with_disabled_bucket_rank0"]


@given(st.integers(0, 2**40), st.lists(st.integers(0, 300), min_size=1, max_size=4))
def test_permutations_equal_those_of_torch(seed: int, counts: list[int]) -> None:
    own, generator = _TorchGenerator(seed), torch.Generator().manual_seed(seed)
    for count in counts:
        np.testing.assert_array_equal(own.permutation(count), torch.randperm(count, generator=generator).numpy())


buckets = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 7)), min_size=1, max_size=4).filter(
    lambda buckets: any(count for count, _ in buckets)
)


@given(buckets, st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_holds_every_clip_and_ranks_take_equally_many_steps(
    buckets: list[tuple[int, int]], ranks: int, epoch: int
) -> None:
    counts, batches = zip(*buckets, strict=True)
    shares = [BucketSampler(counts, batches, ranks, rank, seed=1).epoch(epoch) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    seen = Counter((bucket, clip) for share in shares for bucket, clips in share for clip in clips)
    assert set(seen) == {(bucket, clip) for bucket, count in enumerate(counts) for clip in range(count)}
    for share in shares:
        assert all(len(clips) == batches[bucket] for bucket, clips in share)


@given(buckets, st.integers(1, 4))
def test_drop_last_repeats_no_clip(buckets: list[tuple[int, int]], ranks: int) -> None:
    counts, batches = zip(*buckets, strict=True)
    if sum(count // batch for count, batch in buckets) < ranks:
        with pytest.raises(UsageError):
            BucketSampler(counts, batches, ranks, 0, seed=1, drop_last=True)
        return
    shares = [BucketSampler(counts, batches, ranks, rank, seed=1, drop_last=True).epoch(0) for rank in range(ranks)]
    seen = Counter((bucket, clip) for share in shares for bucket, clips in share for clip in clips)
    assert max(seen.values()) == 1
    if sum(count // batch for count, batch in buckets) % ranks == 0:
        assert len(seen) == sum(count // batch * batch for count, batch in buckets)


@given(buckets, st.integers(0, 40))
def test_a_resumed_stream_continues_where_it_stopped(buckets: list[tuple[int, int]], start: int) -> None:
    counts, batches = zip(*buckets, strict=True)
    sampler = BucketSampler(counts, batches, ranks=2, rank=1, seed=3)
    assert list(islice(sampler.stream(2 * start), 5)) == list(islice(sampler.stream(), start, start + 5))


def dealt(samplers: list[BucketSampler], done: int, steps: int) -> list[Any]:
    """List the micro-batches that ranks work on in some steps, in the order in which they are dealt."""
    streams = [list(islice(sampler.stream(done), steps)) for sampler in samplers]
    return [stream[step] for step in range(steps) for stream in streams]


@given(buckets, st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(1, 5), st.integers(0, 12))
def test_another_number_of_ranks_continues_where_the_first_stopped(
    buckets: list[tuple[int, int]], group: int, ranks: int, others: int, steps: int
) -> None:
    counts, batches = zip(*buckets, strict=True)
    costs = [float(1 + bucket) for bucket in range(len(counts))]

    def of(ranks: int) -> list[BucketSampler]:
        return [BucketSampler(counts, batches, ranks, r, seed=5, costs=costs, group=group) for r in range(ranks)]

    done = ranks * steps
    single = dealt(of(1), 0, done + 3 * others)
    assert dealt(of(ranks), 0, steps) + dealt(of(others), done, 3) == single


@given(buckets, st.sampled_from([2, 4, 8]), st.integers(0, 3))
def test_groups_hold_similar_costs_and_every_clip(buckets: list[tuple[int, int]], group: int, epoch: int) -> None:
    counts, batches = zip(*buckets, strict=True)
    costs = [3.0**bucket for bucket in range(len(counts))]
    order = BucketSampler(counts, batches, 1, 0, seed=2, costs=costs, group=group).order(epoch)
    assert len(order) % group == 0
    assert {(bucket, clip) for bucket, clips in order for clip in clips} == {
        (bucket, clip) for bucket, count in enumerate(counts) for clip in range(count)
    }
    mixed = sum(
        len({bucket for bucket, _ in order[start : start + group]}) > 1 for start in range(0, len(order), group)
    )
    assert mixed <= len(counts)  # at most where two levels of cost meet


def test_groups_reduce_idle_time_on_the_published_buckets() -> None:
    """Stage 3 (golden notes, section 3), 70 scenes of 220 frames, eight data ranks."""
    stage = yaml.safe_load((PROJECT / "profiles/nuscenes.yaml").read_text())["training"]["stage3"]
    buckets = [(b["resolution"], b["frames"], b["batch"]) for b in stage["buckets"]]
    forty = [b["frames"] == 1 or b.get("whole", False) for b in stage["buckets"]]  # key frames, or repeats of a scene
    counts = [70 * (40 if few else 220 - frames) for few, (_, frames, _) in zip(forty, buckets, strict=True)]
    costs = [relative_cost(*bucket, width=1152, context=400) for bucket in buckets]
    shares = [
        idle_share(
            BucketSampler(counts, [b[2] for b in buckets], 8, 0, seed=1024, costs=costs, group=group).order(0), costs, 8
        )
        for group in (1, 8)
    ]
    assert shares[1] < 0.01
    assert shares[1] < shares[0] / 20


def test_idle_share_of_simple_orders() -> None:
    assert idle_share([(0, [0]), (1, [0])] * 3, [1.0, 1.0], 2) == 0
    assert idle_share([(0, [0]), (1, [0])] * 3, [1.0, 3.0], 2) == pytest.approx(1 / 3)
    assert idle_share([(0, [0]), (0, [1]), (1, [0])], [1.0, 3.0], 2) == 0


def test_buckets_with_too_few_clips_are_refused() -> None:
    with pytest.raises(UsageError, match="too few clips"):
        BucketSampler([0, 5], [2, -1], ranks=1, rank=0, seed=0)
