"""The published profile has the settings that were found in the published system (golden notes, sections 3 and 4)."""

from __future__ import annotations

from pathlib import Path

import pytest

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Stage

CONFIG = load_config(Path(__file__).resolve().parents[2] / "profiles/nuscenes.yaml")
MASKS = {"random": 0.01, "quarter_head": 0.002, "quarter_tail": 0.002, "image_head": 0.22, "image_tail": 0.005}

# Clips in a micro-batch by size and frames; "full" ones are whole scenes, of 241 frames at most.
BATCHES: dict[Stage, dict[str, dict[int, int]]] = {
    "stage1": {"224x400": {1: 4}},
    "stage2": {"224x400": {1: 10, 9: 8, 17: 4, 33: 2, 65: 1}, "424x800": {1: 10, 9: 2, 17: 1, 33: 1}},
    "stage3": {
        "224x400": {1: 10, 17: 10, 241: 1},
        "424x800": {1: 10, 17: 6, 33: 4, 65: 2, 129: 1},
        "848x1600": {1: 10, 9: 3, 17: 2, 33: 1},
    },
}


def test_the_settings_that_all_stages_share_are_the_published_ones() -> None:
    training = CONFIG.training
    assert training.betas == (0.9, 0.999)
    assert (training.eps, training.weight_decay, training.max_grad_norm) == (1e-15, 1e-2, 1.0)
    assert (training.precision, training.ema) == ("bf16", 0.99)
    assert (training.drop_condition, training.drop_frame) == (0.15, 0.4)
    assert (training.add_boxes, training.hide_boxes) == (0.1, 0.4)
    assert CONFIG.flow.base_size == "512x512"


@pytest.mark.parametrize(
    ("stage", "steps", "warmup", "seed"),
    [("stage1", 80_000, 3000, 42), ("stage2", 40_000, 3000, 42), ("stage3", 40_000, 100, 1024)],
)
def test_the_settings_of_each_stage_are_the_published_ones(stage: Stage, steps: int, warmup: int, seed: int) -> None:
    settings = CONFIG.training.stage(stage)
    assert (settings.steps, settings.learning_rate, settings.warmup, settings.seed) == (steps, 8e-5, warmup, seed)
    later = stage != "stage1"
    assert (settings.freeze_text, settings.checkpoint_blocks) == (later, later)
    assert settings.balance == (stage == "stage3")
    buckets = {(bucket.resolution, bucket.frames): bucket.batch for bucket in settings.buckets}
    assert buckets == {(size, frames): n for size, by in BATCHES[stage].items() for frames, n in by.items()}


@pytest.mark.parametrize(
    ("stage", "own"),
    [
        ("stage2", {"interpolate": 0.002, "quarter_random": 0.002, "quarter_head_tail": 0.002}),
        ("stage3", {"interpolate": 0.005, "quarter_head_tail": 0.001}),
    ],
)
def test_conditioning_frames(stage: Stage, own: dict[str, float]) -> None:
    assert CONFIG.training.stage(stage).mask_ratios == MASKS | {"image_head_tail": 0.005} | own
    assert sum(CONFIG.training.stage(stage).mask_ratios.values()) == pytest.approx(0.251, abs=0.002)
    assert CONFIG.training.stage1.mask_ratios == {}
