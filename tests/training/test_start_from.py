"""Starting from a model: what fits, what is new, what is left over, what is refused; which weights each stage gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.experiment.run_paths import find_run_paths
from magicdrive_core.experiment.stages import plan_stage, read_job, write_job
from magicdrive_core.model.build import build_stage_network
from magicdrive_core.training.check_start import check_start
from magicdrive_core.training.stage import first_network
from tests.training.start_models import config, filled, plan_of, project, write_run

__all__ = ["project"]
ADDED = ("base_blocks_t.", "control_blocks_t.", "bbox_embedder.mean_var")


def test_stage_1_takes_all_that_it_has_and_leaves_the_temporal_blocks_out(project: Path) -> None:
    state = first_network(config(), plan_of(project, "stage1"), project).state_dict()
    assert not any(name.startswith(ADDED) for name in state)
    assert all((tensor == 3).all() for tensor in state.values())


def test_what_a_stage_adds_comes_from_the_model_and_the_rest_from_the_stage_before(project: Path) -> None:
    plan = plan_of(project, "stage2")
    assert plan.previous is not None
    write_run(plan.previous.folder, filled(project, "stage1", 1.0), "stage1")
    for name, tensor in first_network(config(), plan, project).state_dict().items():
        assert (tensor == (3 if name.startswith(ADDED) else 1)).all(), name


def test_training_may_start_at_a_later_stage(project: Path) -> None:
    settings = config("training.first_stage=stage3")
    plan = plan_stage(settings, "stage3", project)
    assert plan.previous is None
    assert all((tensor == 3).all() for tensor in first_network(settings, plan, project).state_dict().values())
    for stage in ("stage1", "stage2"):
        with pytest.raises(UsageError, match=f"{stage} comes before training.first_stage, which is stage3"):
            plan_stage(settings, stage, project)
        with pytest.raises(UsageError, match="comes before"):
            find_run_paths(settings, stage, project)


def test_a_first_stage_after_stage_1_needs_a_model() -> None:
    with pytest.raises(UsageError, match="first_stage stage2 needs start_from"):
        config("training.first_stage=stage2", "training.start_from=null")


def test_temporal_blocks_are_new_when_a_model_of_stage_1_starts_stage_3(project: Path) -> None:
    write_run(project / "model", filled(project, "stage1", 1.0), "stage1")
    settings = config("training.first_stage=stage3")
    plan = plan_stage(settings, "stage3", project)
    torch.manual_seed(settings.training.stage3.seed)
    fresh = build_stage_network(settings, "stage3", project).state_dict()
    for name, tensor in first_network(settings, plan, project).state_dict().items():
        assert torch.equal(tensor, fresh[name] if name.startswith(ADDED) else torch.ones_like(tensor)), name


def test_the_weights_and_not_their_path_decide_the_fingerprint(project: Path) -> None:
    plain = plan_stage(config("training.start_from=null"), "stage1", project).fingerprint
    before = plan_of(project, "stage3").fingerprint
    (project / "other").symlink_to("model")
    assert plan_of(project, "stage3", "training.start_from=other").fingerprint == before
    write_run(project / "model", filled(project, "stage3", 4.0), "stage3")
    assert len({plain, before, plan_of(project, "stage3").fingerprint}) == 3


def test_jobs_hold_the_model(project: Path) -> None:
    plan = plan_of(project, "stage2")
    write_job(plan, config())
    assert read_job(plan.folder) == (config(), plan)


def test_changed_weights_are_refused_when_they_are_checked_and_when_they_are_read(project: Path) -> None:
    plan = plan_of(project, "stage1")
    with plan.start.weights.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    for check in (check_start, first_network):
        with pytest.raises(MagicDriveError, match="another digest than its run recorded"):
            check(config(), plan, project)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("before_proj.weight"), r"lacks before_proj\.weight"),
        (lambda state: state.update(more=torch.zeros(1)), "has the unknown more"),
        (
            lambda state: state.update(base_token=torch.zeros(3)),
            r"has another shape for base_token: \[3\], not \[32\] \(1 in all\): it belongs to another network",
        ),
        (lambda state: state.pop("bbox_embedder.mean_var"), r"lacks bbox_embedder\.mean_var"),
    ],
)
def test_a_model_of_another_network_is_refused_in_one_line(project: Path, change: object, message: str) -> None:
    state = filled(project, "stage3", 3.0)
    change(state)  # type: ignore[operator]
    write_run(project / "model", state, "stage3")
    settings = config("training.first_stage=stage3")
    plan = plan_stage(settings, "stage3", project)
    for check in (check_start, first_network):
        with pytest.raises(MagicDriveError, match=message) as raised:
            check(settings, plan, project)
        assert "\n" not in str(raised.value)


def test_imported_weights_do_not_start_a_network_without_the_oddities(project: Path) -> None:
    write_run(project / "model", filled(project, "stage3", 3.0), "stage3", published=True)
    with pytest.raises(MagicDriveError, match="published: true"):
        check_start(config(), plan_of(project, "stage1"), project)


def test_a_folder_without_a_model_is_refused(project: Path) -> None:
    with pytest.raises(MagicDriveError, match=r"nowhere/run\.json is missing") as raised:
        plan_of(project, "stage1", "training.start_from=nowhere")
    assert "models:/NAME@ALIAS" in raised.value.hint


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({}, None),
        ({"vae": {"digest": "other", "scaling_factor": 1.0}}, "another VAE"),
        ({"vae": {"digest": "v", "scaling_factor": 0.7}}, "another scaling factor"),
        ({"text": {"digest": "other"}}, "another text encoder"),
    ],
)
def test_a_model_of_other_encoders_is_warned_of(
    project: Path, change: dict[str, object], warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    encoders = {"vae": {"digest": "v", "scaling_factor": 1.0}, "text": {"digest": "t"}} | change
    write_run(project / "model", filled(project, "stage3", 3.0), "stage3", encoders=encoders)
    check_start(config(), plan_of(project, "stage1"), project)
    found = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(found) == (warning is not None)
    assert warning is None or warning in found[0]
