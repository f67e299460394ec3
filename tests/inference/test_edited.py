"""Generation from an edited scene uses the edited text, boxes and maps, and is repeated when the edits change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from magicdrive_core.data.infos import read_scenes
from magicdrive_core.encoders.text import TextEncoder
from magicdrive_core.inference.generate import generate_items
from magicdrive_core.inference.items import list_items
from magicdrive_core.video.item_record import ItemRecord
from tests.inference.project import STAGE, make_project, small_config, small_scene

EDITS = """
weather: night
objects: [{add: bus, points: [{at: [-4, 10]}]}]
ego: [{at: [0, 0]}, {at: [2, 3], second: 0.5}]
"""
BARE_MAP = '{"version": "1.3", "node": [], "polygon": [], "line": []}'


class Encoder:
    """Replaces T5: five random tokens, seeded by the length of the caption."""

    def encode(self, captions: list[str]) -> list[torch.Tensor]:
        return [torch.randn(5, 16, generator=torch.Generator().manual_seed(len(text))) for text in captions]


def test_an_edited_scene_is_generated_again_when_its_edits_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, edited = (
        small_config("generate.generations=1"),
        small_config("generate.generations=1", "generate.edits=edits.yaml", "data.root=root"),
    )
    make_project(tmp_path, plain, small_scene())
    (tmp_path / "root/maps/expansion").mkdir(parents=True)
    (tmp_path / "root/maps/expansion/singapore-onenorth.json").write_text(BARE_MAP)
    (tmp_path / "edits.yaml").write_text(EDITS)
    monkeypatch.setattr(TextEncoder, "load", lambda *_: Encoder())
    (item,) = list_items(plain, read_scenes(tmp_path / "artifacts/infos"))

    def generate(config: object) -> tuple[list[str], ItemRecord]:
        summary = generate_items(config, [item], tmp_path / STAGE, tmp_path / "out", project=tmp_path)
        return summary.made, ItemRecord.read(tmp_path / "out" / item.name)

    _, before = generate(plain)
    made, after = generate(edited)
    assert made == [item.name]
    assert after.caption == "A driving scene image at singapore-onenorth. Night. Fog."
    assert not {v.sha256 for v in after.views.values()} & {v.sha256 for v in before.views.values()}
    assert generate(edited)[0] == []  # done
    (tmp_path / "edits.yaml").write_text(EDITS.replace("bus", "truck"))
    made, again = generate(edited)
    assert made == [item.name]
    assert again.lineage["edits"] != after.lineage["edits"]
