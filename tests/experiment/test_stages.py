"""What a stage's fingerprint depends on, and what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from magicdrive_core.config import versions
from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import STAGES
from magicdrive_core.experiment import stages as plan
from magicdrive_core.experiment.stages import feasibility, plan_stage
from tests.training.scenes import make_scene

PROFILE = Path(__file__).resolve().parents[2] / "profiles/demo.yaml"


def prints(project: Path, *overrides: str) -> list[str]:
    """Fingerprints of the three stages."""
    last = plan_stage(load_config(PROFILE, list(overrides)), "stage3", project)
    assert last.previous is not None
    assert last.previous.previous is not None
    return [last.previous.previous.fingerprint, last.previous.fingerprint, last.fingerprint]


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("training.stage1.steps=7", 1),
        ("training.stage2.learning_rate=1.0e-5", 2),
        ("training.stage3.mask_ratios={image_head: 0.5}", 3),
        ("training.betas=[0.9, 0.95]", 1),
        ("training.precision=bf16", 1),
        ("training.ema=0.5", 1),
        ("model.depth=5", 1),
        ("published=true", 1),
        ("conditions.map_cells={80x144: 100, 96x176: 200}", 1),
        ("vae.chunk_frames=16", 1),
        ("text.max_tokens=8", 1),
        ("latents.start_stride=2", 1),
        ("data.version=v1.0-mini", 1),
    ],
)
def test_what_decides_a_result_changes_its_stage_and_the_later_ones(tmp_path: Path, override: str, first: int) -> None:
    changed = [a != b for a, b in zip(prints(tmp_path), prints(tmp_path, override), strict=True)]
    assert changed == [stage >= first for stage in (1, 2, 3)]


@pytest.mark.parametrize(
    "override",
    [
        "profile=other",
        "cluster.ranks=4",
        "generate.steps=5",
        "submission.team=other",
        "video.fps=10",
        "tracking.experiment=other",
        "training.checkpoint_every=1",
        "training.preview_every=1",
        "training.keep_checkpoints=1",
        "training.log_every=2",
    ],
)
def test_what_decides_nothing_changes_no_fingerprint(tmp_path: Path, override: str) -> None:
    assert prints(tmp_path) == prints(tmp_path, override)


def test_a_raised_version_of_the_network_is_another_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = prints(tmp_path)
    monkeypatch.setattr(versions, "SAMPLER_VERSION", versions.SAMPLER_VERSION + 1)
    assert prints(tmp_path) == before
    monkeypatch.setattr(versions, "NETWORK_VERSION", versions.NETWORK_VERSION + 1)
    assert all(a != b for a, b in zip(before, prints(tmp_path), strict=True))


def test_other_data_is_another_training(tmp_path: Path) -> None:
    before = prints(tmp_path)
    index = tmp_path / "artifacts/latents/index.json"
    index.parent.mkdir(parents=True)
    index.write_text("{}")
    assert all(a != b for a, b in zip(before, prints(tmp_path), strict=True))


def test_folders_name_stage_and_fingerprint(tmp_path: Path) -> None:
    stage = plan_stage(load_config(PROFILE), "stage2", tmp_path)
    assert stage.folder == tmp_path / "runs" / f"stage2-{stage.fingerprint[:12]}"
    assert not stage.done
    assert stage.previous is not None
    assert stage.previous.previous is None


@pytest.mark.parametrize(
    ("frames", "possible", "empty"),
    [
        (1, ["stage1"], {"stage2": ["80x144-9"], "stage3": ["80x144-9", "80x144-17"]}),
        (9, ["stage1", "stage2", "stage3"], {"stage3": ["80x144-17"]}),
        (30, ["stage1", "stage2", "stage3"], {}),
    ],
)
def test_stages_need_clips_of_their_kind(
    monkeypatch: pytest.MonkeyPatch, frames: int, possible: list[str], empty: dict[str, list[str]]
) -> None:
    monkeypatch.setattr(plan, "read_scenes", lambda _: [make_scene("a", frames), make_scene("b", frames, "val")])
    clips = {stage: feasibility(load_config(PROFILE), stage) for stage in STAGES}
    assert [stage for stage in STAGES if clips[stage].possible] == possible
    assert {stage: clips[stage].empty for stage in STAGES if clips[stage].empty} == empty
    for stage, names in empty.items():
        assert clips[stage].warning == f"{stage}: no training clip for {', '.join(names)}: skipped"
    assert clips["stage1"].warning is None
