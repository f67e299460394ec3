"""The descriptions of the settings: complete, true, and the files that are generated from them are current."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from magicdrive_core.config.describe import (
    current_value,
    find_setting,
    json_schema,
    list_settings,
    reference_page,
    show_settings,
)
from magicdrive_core.config.load import load_config
from magicdrive_core.errors import UsageError
from tests.conftest import PROJECT

CORE = PROJECT / "magicdrive_core"
SETTINGS = list(list_settings())
# Read through a property of the section.
READ_AS = {"flow.base_size": "base_pixels", "generate.guidance_parallel": "devices"}


def test_every_setting_says_what_it_means_in_whole_sentences() -> None:
    assert len(SETTINGS) > 150
    for setting in SETTINGS:
        assert setting.meaning.endswith(".") or "such as: " in setting.meaning, setting.key
        assert len(setting.meaning.split()) >= 2, setting.key


def test_every_setting_names_a_module_that_reads_it() -> None:
    wrong = []
    for setting in SETTINGS:
        name = READ_AS.get(setting.key, setting.key.rpartition(".")[2])
        if not setting.used_in and setting.section is None:
            wrong.append(setting.key)
        for path in filter(None, setting.used_in.split(", ")):
            file = CORE / path
            if not (file.is_file() and re.search(rf"\b{name}\b", file.read_text())):
                wrong.append(f"{setting.key}: {path}")
    assert not wrong


def test_an_explanation_names_type_bounds_default_unit_and_source() -> None:
    text = "\n".join(find_setting("generate.guidance").lines())
    assert "classifier-free guidance" in text
    assert "number >= 1" in text
    assert "default: 2.0" in text
    assert "published configuration" in text
    assert "magicdrive_core/inference/" in text
    assert "  unit:    frames at 12 Hz" in find_setting("training.stage2.buckets.0.frames").lines()
    assert "  type:    HEIGHTxWIDTH" in find_setting("generate.resolution").lines()
    assert "  default: none, params.yaml must set it" in find_setting("data.root").lines()


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("generate.gudance", "generate.guidance"),
        ("guidance", "generate.guidance"),
        ("training.step", "training.stage1.steps"),
        ("benchmark.team", "submission.team"),
        ("generate.first_frames", "generate.initial_frames"),
    ],
)
def test_a_misspelt_key_gets_a_suggestion(misspelt: str, meant: str) -> None:
    with pytest.raises(UsageError, match="is not a setting") as raised:
        find_setting(misspelt)
    assert "did you mean" in raised.value.hint
    assert meant in raised.value.hint


def test_show_lists_key_value_and_whether_it_is_the_default() -> None:
    config = load_config(PROJECT / "profiles/demo.yaml", ["generate.steps=7"])
    rows = {line.split()[0]: line.split()[1:3] for line in show_settings(config, "generate")}
    assert rows["generate.steps"] == ["7", "set"]
    assert rows["generate.weights"] == ["null", "default"]
    assert all(key.startswith("generate.") for key in rows)
    everything = [line.split()[0] for line in show_settings(config)]
    assert {"profile", "training.stage3.steps", "vae.build.crop", "cluster.slurm"} <= set(everything)
    assert "cluster.slurm.time" not in everything  # the section is null
    with pytest.raises(UsageError, match=r"generate\.steps is one setting"):
        show_settings(config, "generate.steps")


def test_the_current_value_is_that_of_the_file() -> None:
    config = load_config(PROJECT / "profiles/demo.yaml", ["generate.steps=7"])
    assert current_value(config, find_setting("generate.steps")) == "7"
    assert current_value(config, find_setting("cluster.slurm.time")) == ""


@pytest.mark.parametrize(
    ("file", "text", "command"),
    [
        ("params.schema.json", json_schema(), "magicdrive config schema --out params.schema.json"),
        (
            "docs/reference/settings.md",
            reference_page(),
            "magicdrive config reference --out docs/reference/settings.md",
        ),
    ],
)
def test_generated_files_are_current(file: str, text: str, command: str) -> None:
    assert (PROJECT / file).read_text() == text, f"run: {command}"


@pytest.mark.parametrize("path", [PROJECT / "params.yaml", *sorted((PROJECT / "profiles").glob("*.yaml"))])
def test_editors_find_the_schema_and_it_knows_every_key(path: Path) -> None:
    first = path.read_text().partition("\n")[0]
    schema = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / schema).resolve() == PROJECT / "params.schema.json"
    json_schema = json.loads((path.parent / schema).read_text())
    values = yaml.safe_load(path.read_text())
    jsonschema.validate(values, json_schema)
    values["generate"]["gudance"] = 2.0
    with pytest.raises(jsonschema.ValidationError, match="gudance"):
        jsonschema.validate(values, json_schema)
