"""A worker of two processes generates the items that a single process generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magicdrive_core.data.infos import read_scenes
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.inference.generate import generate_items
from magicdrive_core.inference.items import input_digests, is_done, item_fingerprint, list_items
from magicdrive_core.inference.worker import generate_in_group
from magicdrive_core.video.frames import read_view
from magicdrive_core.video.item_record import ItemRecord
from tests.conftest import PROJECT
from tests.inference.project import STAGE, make_project, small_config, small_scene


def frames(folder: Path) -> np.ndarray:
    record = ItemRecord.read(folder)
    return np.stack([list(read_view(folder / record.views[view].file)) for view in VIEWS]).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "frames_made", "frames_kept", "apart"),
    [
        ({"sequence_parallel": 2}, 9, 2, 1),  # token shards are rounded differently
        ({"guidance_parallel": True}, 17, 10, 0),  # in windows, whose conditioning frames the leader encodes
    ],
)
def test_two_processes_generate_what_a_single_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], frames_made: int, frames_kept: int, apart: int
) -> None:
    config = small_config(
        "generate.window=9",
        f"generate.frames={frames_made}",
        f"submission.frames={frames_kept}",
        "generate.generations=1",
        "video.format=png",  # H.264 would amplify the rounding of a pixel
    )
    make_project(tmp_path, config, small_scene(18))
    items = list_items(config, read_scenes(tmp_path / "artifacts/infos"))
    generate_items(config, items, tmp_path / STAGE, tmp_path / "one", project=tmp_path)
    shared = config.model_copy(update={"generate": config.generate.model_copy(update=how)})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    generate_in_group(shared, Path(STAGE), Path("two"), (0, 1))
    digests = input_digests(shared, Path(STAGE))
    for item in items:
        assert is_done(Path("two") / item.name, item_fingerprint(config, item, digests))
        assert abs(frames(tmp_path / "one" / item.name) - frames(tmp_path / "two" / item.name)).max() <= apart
