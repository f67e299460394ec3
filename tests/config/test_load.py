"""params.yaml: every fault is one line that names the key, its value and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import fingerprint, parse_size
from magicdrive_core.errors import UsageError

DEMO = Path(__file__).resolve().parents[2] / "profiles" / "demo.yaml"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.stage9=3", "training.stage9 is not a known key; known here: stage1"),
        ("training.stage1.stepz=3", "training.stage1.stepz is not a known key; known here: buckets"),
        ("vae.build.sped=3", "vae.build.sped is not a known key; known here: block_out_channels"),
        ("synth.seed=-1", "synth.seed is -1: Input should be greater than or equal to 0"),
        ("training.stage1.steps=many", "training.stage1.steps is 'many': Input should be a valid integer"),
        ("generate.frames=16", "generate.frames is 16: a clip has 8n+1 frames"),
        (
            "generate.resolution=100x200",
            "generate.resolution is '100x200': height and width must be positive multiples of 8",
        ),
        ("generate.resolution=848x1600", "conditions.map_cells has no entry for 848x1600"),
        ("data.val_scenes=3", "data.val_scenes is 3: write auto, or a list of scene names"),
        ("model.heads=3", "width 128 must split into heads (3)"),
        ("submission.team=a/b", "submission.team is 'a/b'"),
    ],
)
def test_fault_is_one_clear_line(override: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(DEMO, [override])
    assert said in caught.value.message
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["training", "=3", "nowhere.key=3", "profile.deeper=1", "synth.seed=[1"])
def test_malformed_override_is_named(override: str) -> None:
    with pytest.raises(UsageError, match=r"-S "):
        load_config(DEMO, [override])


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is missing"):
        load_config(tmp_path / "params.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(UsageError, match="not valid YAML"):
        load_config(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not valid YAML"):
        load_config(broken)
    broken.write_text("- 1")
    with pytest.raises(UsageError, match="mapping of sections"):
        load_config(broken)


def test_missing_section_is_named(tmp_path: Path) -> None:
    values = yaml.safe_load(DEMO.read_text())
    del values["training"]["stage2"]
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError, match=r"training\.stage2 is missing"):
        load_config(path)


def test_override_changes_only_its_section() -> None:
    before, after = load_config(DEMO), load_config(DEMO, ["model.depth=5"])
    assert fingerprint(before.model) != fingerprint(after.model)
    assert fingerprint(before.training) == fingerprint(after.training)
    assert after.model.depth == 5


def test_fingerprint_ignores_key_order() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


@given(st.integers(1, 200), st.integers(1, 200))
def test_sizes_round_trip(rows: int, columns: int) -> None:
    assert parse_size(f"{8 * rows}x{8 * columns}") == (8 * rows, 8 * columns)


def test_the_published_network_has_no_rays() -> None:
    with pytest.raises(UsageError, match=r"model\.rays needs published: false"):
        load_config(DEMO, ["model.rays=8", "published=true"])
