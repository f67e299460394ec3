"""A generated data root: equal bytes every time, resumed after an interruption, never written over other data."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from magicdrive_core.config.schema import Synth
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.synthetic.dataset import MANIFEST, STAMP, synthesize
from magicdrive_core.utils.files import sha256_file, sha256_folder

TINY = Synth(seed=3, scenes=1, seconds=0.1)
VERSION = "v1.0-tiny"


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny") / "data"
    synthesize(TINY, root, VERSION, workers=1)
    return root


def test_pictures_tables_and_maps_have_their_known_digests(synthetic_root: Path) -> None:
    """Equal on every machine. If a digest changes, raise CITY_VERSION and update data.dvc."""
    digests = {
        "manifest": sha256_file(synthetic_root / MANIFEST),
        "tables": sha256_folder(synthetic_root / "v1.0-demo"),
        "maps": sha256_folder(synthetic_root / "maps"),
    }
    assert digests == DIGESTS


DIGESTS = {
    "manifest": "15d70a6b1125d09663d4e16d17bd789f1b6174310dbe07ff10686857dc37ef67",
    "tables": "a4da120bd4aae116f942ac6738689dc27d9cd5e8412430ee0a5ed2f472713289",
    "maps": "09f38b2699eba95b9bf40e0d432a00a78c7959ad18083b7b6e037335b4d1185e",
}


def test_an_interrupted_run_is_completed_with_any_number_of_processes(tiny_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_root, root)
    for path in sorted(root.glob("samples/CAM_*/*"))[::2]:
        path.unlink()
    (root / "samples" / "CAM_BACK" / ".half.jpg.1.partial").write_bytes(b"half")
    stamp = json.loads((root / STAMP).read_text())
    (root / STAMP).write_text(json.dumps({**stamp, "complete": False}))
    synthesize(TINY, root, VERSION, workers=2)
    assert sha256_folder(root) == sha256_folder(tiny_root)


def test_a_missing_picture_is_noticed_and_rendered_again(tiny_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_root, root)
    victim = next(root.glob("samples/CAM_FRONT/*"))
    victim.unlink()
    synthesize(TINY, root, VERSION, workers=1)
    assert sha256_folder(root) == sha256_folder(tiny_root)


def test_the_manifest_lists_every_file_with_its_digest(tiny_root: Path) -> None:
    with (tiny_root / MANIFEST).open(newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    files = [path for kind in ("samples", "sweeps") for path in (tiny_root / kind).rglob("*") if path.is_file()]
    assert sorted(rows) == sorted(path.relative_to(tiny_root).as_posix() for path in files)
    for path in files:
        row = rows[path.relative_to(tiny_root).as_posix()]
        assert (int(row["bytes"]), row["sha256"]) == (
            path.stat().st_size,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )


def test_a_second_run_writes_nothing(tiny_root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_root.rglob("*")}
    synthesize(TINY, tiny_root, VERSION)
    assert {path: path.stat().st_mtime_ns for path in tiny_root.rglob("*")} == before


def test_data_generated_with_other_settings_are_replaced(tiny_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_root / "v1.0-tiny", root / "v1.0-old")
    (root / "samples" / "CAM_FRONT").mkdir(parents=True)
    (root / "samples" / "CAM_FRONT" / "old.jpg").write_bytes(b"old")
    stamp = json.loads((tiny_root / STAMP).read_text())
    (root / STAMP).write_text(json.dumps({**stamp, "seed": 99, "version": "v1.0-old"}))
    synthesize(TINY, root, VERSION, workers=1)
    assert sha256_folder(root) == sha256_folder(tiny_root)


def test_a_folder_with_other_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    with pytest.raises(MagicDriveError, match="was not generated"):
        synthesize(TINY, tmp_path, VERSION)
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]
