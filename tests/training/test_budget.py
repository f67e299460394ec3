"""The memory of micro-batches: the plan equals the measurement, and what cannot fit is refused."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.training import loader
from magicdrive_core.training.budget import plan_budget
from magicdrive_core.training.loader_speed import batch_nbytes, measure_loader
from magicdrive_core.utils.files import write_json
from tests.training.scenes import FakeLatents, FakeMaps, FakeText, make_scene
from tests.training.test_loader import settings

MADE = {"vae": {"scaling_factor": 2.0, "latent_channels": 4}, "text": {"width": 5}}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_json(tmp_path / "artifacts/encoders/encoders.json", MADE)
    return tmp_path


def test_a_run_that_cannot_fit_is_refused_with_its_figures(project: Path) -> None:
    config = settings()
    budget = plan_budget(config, "stage2", project, left=10**9)
    assert budget.left == 10**9 // config.cluster.ranks
    assert budget.waiting == budget.left // 10
    plan_budget(config, "stage2", project, left=budget.needed * config.cluster.ranks)
    with pytest.raises(MagicDriveError, match=r"a micro-batch of 16x32-33 takes .* GB .* left for each of 2 ranks"):
        plan_budget(config, "stage2", project, left=budget.needed * config.cluster.ranks - 2)
    training = config.training.model_copy(update={"prefetch_mbytes": 3})
    assert plan_budget(config.model_copy(update={"training": training}), "stage2", project).waiting == 3 << 20


def test_planned_bytes_are_those_of_real_batches(project: Path) -> None:
    scenes = [make_scene("a", 60), make_scene("b", 48)]
    fakes = {"read_scenes": lambda _: scenes, "BevMaps": FakeMaps, "open_text": FakeText, "LatentCache": FakeLatents}
    config = settings()
    with mock.patch.multiple(loader, **fakes), mock.patch("magicdrive_core.training.budget.SLOTS", 2):
        planned = plan_budget(config, "stage2", project).batches
        with loader.Loader(config, "stage2", project) as source:
            source.start(0, groups=1, group=0)
            shares = []
            for _ in range(8):
                batch = source.next()
                shares.append(batch_nbytes(batch) / planned[f"16x32-{batch.shape[0]}"])
                assert shares[-1] <= 1.03  # less where no clip has both objects
            assert max(shares) >= 0.97
        speed = measure_loader(config, "stage2", seconds=0.2, project=project)
    assert speed.clips > 0
    assert any("clips/s" in line for line in speed.lines())
    assert all(name in "\n".join(speed.lines()) for name in planned)
