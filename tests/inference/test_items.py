"""Which items are generated, and what decides their pixels."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from magicdrive_core.config import versions
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.inference.items import input_digests, item_fingerprint, item_seed, list_items
from magicdrive_core.utils.files import write_json
from tests.inference.project import small_config, small_scene

DIGESTS = {"model": "m", "versions": "v", "infos": "i"}


def test_there_is_one_item_for_each_validation_scene_and_generation() -> None:
    scenes = [small_scene(12), small_scene(12, "train", "scene-0002"), small_scene(30, "both", "scene-0003")]
    items = list_items(small_config(), scenes)
    assert [item.name for item in items] == [f"scene000{n}f0_gen{g}" for n in (1, 3) for g in range(2)]
    assert {(item.clip.start, item.clip.frames) for item in items} == {(0, 9)}


@pytest.mark.parametrize(
    ("length", "wanted", "frames", "kept"),
    [
        (30, 17, 17, 16),  # W-CODA
        (17, 17, 17, 16),
        (16, 17, 9, 9),  # the scene is too short: all that it allows
        (30, 9, 9, 9),
        (30, 25, 25, 25),  # a longer clip is written whole
        (1, 17, 1, 1),
        (8, 17, 1, 1),
    ],
)
def test_a_clip_is_as_long_as_the_scene_allows(length: int, wanted: int, frames: int, kept: int) -> None:
    config = small_config("submission.frames=16", f"generate.frames={wanted}")
    item = list_items(config, [small_scene(length)])[0]
    assert (item.clip.frames, item.kept) == (frames, kept)


def test_no_validation_scene_is_an_error() -> None:
    with pytest.raises(MagicDriveError, match="no scene is for validation"):
        list_items(small_config(), [small_scene(12, "train")])


def test_a_seed_depends_only_on_its_item() -> None:
    config = small_config("generate.generations=4")
    scenes = [small_scene(12, "val", f"scene-000{n}") for n in range(3)]
    seeds = {item.name: item_seed(config, item) for item in list_items(config, scenes)}
    fewer = small_config("generate.generations=2", "generate.workers=5")
    again = {item.name: item_seed(fewer, item) for item in list_items(fewer, scenes[:0:-1])}
    assert len(again) == 4
    assert again.items() <= seeds.items()
    assert len(set(seeds.values())) == 12
    assert 0 <= min(seeds.values()) < max(seeds.values()) < 2**63
    other = small_config("generate.seed=1")
    assert not {item_seed(other, item) for item in list_items(other, scenes)} & set(seeds.values())


def test_the_fingerprint_changes_with_what_decides_the_pixels_and_nothing_else() -> None:
    config = small_config()
    item = list_items(config, [small_scene()])[0]
    print_ = item_fingerprint(config, item, DIGESTS)
    for override in (
        "generate.steps=3",
        "generate.guidance=3",
        "generate.seed=5",
        "video.max_mbit_s=2",
        "video.fps=10",
    ):
        assert item_fingerprint(small_config(override), item, DIGESTS) != print_, override
    for override in ("generate.workers=9", "generate.generations=7", "submission.team=owls", "training.stage1.steps=7"):
        assert item_fingerprint(small_config(override), item, DIGESTS) == print_, override
    for name in DIGESTS:
        assert item_fingerprint(config, item, {**DIGESTS, name: "other"}) != print_
    assert item_fingerprint(config, replace(item, kept=1), DIGESTS) != print_


def test_a_raised_version_makes_other_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "run.json", {"weights_sha256": "m"})
    before = input_digests(small_config(), tmp_path, tmp_path)
    monkeypatch.setattr(versions, "SAMPLER_VERSION", versions.SAMPLER_VERSION + 1)
    after = input_digests(small_config(), tmp_path, tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"versions"}
    assert f"sampler {versions.SAMPLER_VERSION}," in after["versions"]


def test_planning_and_packing_need_no_torch() -> None:
    modules = "inference.items, wcoda.package, wcoda.validator, report.page, video.encoder, video.overlays"
    code = "import sys\n" + "".join(f"import magicdrive_core.{module}\n" for module in modules.split(", "))
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)
