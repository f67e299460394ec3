"""Every shell command in the documents is understood by the program that it names; those that need nothing are run.

CONTRIBUTING.md says what this promises.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from magicdrive_core.cli.main import app
from magicdrive_core.config.load import load_config
from magicdrive_core.errors import UsageError
from tests.conftest import PROJECT
from tests.docs.documents import Block, blocks, documents
from tests.projects import copy_project, run

PROFILES = sorted((PROJECT / "profiles").glob("*.yaml"))
PREFECT = {
    ("deployment", "run"),
    ("flow-run", "cancel"),
    ("work-pool", "create"),
    ("deploy", "--all"),
    ("worker", "start"),
}
SHELL = {"source", "export"}
INLINE = re.compile(r"(?<!`)`((?:magicdrive|make|python) [^`\n]+)`(?!`)")

# Commands that need nothing but are not run here: they are this test suite, or run it, or take minutes.
RUN_ELSEWHERE = {
    "make setup": "the environment that this test runs in",
    "make check": "the first part of `make test`",
    "make test": "this test suite",
    "make drills": "the long part of this test suite",
    "make demo": "its flows: tests/flows, with small settings",
    "python -m flows.pipeline": "its flows: tests/flows, with small settings",
    "python -m flows.prepare": "tests/flows/test_prepare.py",
    "OMP_NUM_THREADS=1 pytest": "this test suite",
    "source": "a shell's own",
}
EDITS = "objects:\n  - {add: truck, points: [{at: [4, 10], heading: 90}]}\n"


def shell_blocks() -> list[Block]:
    return [block for block in blocks() if block.language == "bash"]


def test_every_block_names_its_language() -> None:
    unknown = [block.where for block in blocks() if block.language not in {"bash", "text", "yaml", "python", "json"}]
    assert unknown == []


def test_no_block_of_text_hides_a_command() -> None:
    hidden = [
        block.where
        for block in blocks()
        if block.language == "text" and re.search(r"^(magicdrive|make|python|dvc|prefect|pip) ", block.text, re.M)
    ]
    assert hidden == []


@pytest.mark.parametrize("block", shell_blocks(), ids=lambda block: block.where)
def test_every_command_is_understood(block: Block, tmp_path: Path) -> None:
    for words in block.commands():
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        understand(words, tmp_path)


@pytest.mark.parametrize("file", documents(), ids=lambda file: str(file.relative_to(PROJECT)))
def test_commands_inside_sentences_exist(file: Path) -> None:
    """Verbs, options, targets and modules; arguments may be placeholders there."""
    for code in INLINE.findall(file.read_text(encoding="utf-8")):
        match code.split():
            case ["magicdrive", *rest]:
                command, rest = find_verb(rest)
                options = {
                    name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)
                }
                named = {word for word in rest if re.match(r"-(-[a-z]|[A-Za-z]$)", word)}
                assert named <= options | {"--help"}, code
            case ["make", target, *_] if target.islower():
                understand_target([target])
            case ["python", "-m", module, *_] if module.startswith("flows") and module.islower():
                assert (PROJECT / f"{module.replace('.', '/')}.py").is_file(), code


def understand(words: list[str], folder: Path) -> None:
    """Fail with a reason unless the program that ``words`` names would accept them."""
    match words:
        case ["magicdrive", *rest]:
            understand_verb(rest)
        case ["make", *rest]:
            understand_target(rest)
        case ["python", "-m", module, *rest]:
            understand_module(module, rest, folder)
        case ["python", script, *rest]:
            source = (PROJECT / script).read_text(encoding="utf-8")
            assert all(word in source for word in rest if word.startswith("-") and word != "--help"), words
        case ["dvc", "status" | "repro" | "commit" | "push" | "pull", *rest]:
            stages = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
            assert [word for word in rest if not word.startswith("-") and word not in stages] == []
        case ["prefect", first, second, *rest]:
            assert (first, second) in PREFECT, words
            if first == "deployment":
                assert rest[0] in deployments(), words
        case ["mlflow" | "pip", *_]:
            pass
        case ["pytest", *rest]:
            assert all((PROJECT / word).exists() for word in rest if not word.startswith("-")), words
        case [program, *_]:
            assert program in SHELL, f"{program}: say in tests/docs/test_commands.py how to check it"


def understand_verb(words: list[str]) -> None:
    command, rest = find_verb(words)
    if "--help" in rest:
        return
    parameters = command.make_context(command.name, list(rest)).params
    profiles = [PROJECT / f"profiles/{parameters['profile']}.yaml"] if command.name == "use" else PROFILES
    check_overrides(parameters.get("overrides") or [], profiles)


def find_verb(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command that the first words name and the words after it."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and words[0] not in {"--help", "--debug", "VERB"}:
        assert words[0] in command.commands, f"magicdrive has no verb {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def understand_target(words: list[str]) -> None:
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, equals, _ = word.partition("=")
        pattern = rf"\$\({name}\)|\$\(abspath {name}\)|^{name} \?=" if equals else rf"^{name}:"
        assert re.search(pattern, makefile, re.M), f"the Makefile knows no {name}"


def understand_module(module: str, words: list[str], folder: Path) -> None:
    assert (PROJECT / f"{module.replace('.', '/')}.py").is_file(), module
    options = [word.partition("=")[0] for word in words if word.startswith("-")]
    known = module_help(module, folder) if options else ""
    assert [option for option in options if option not in known] == []
    check_overrides([words[i + 1] for i, word in enumerate(words) if word == "-S"], PROFILES)


def check_overrides(overrides: list[str], profiles: list[Path]) -> None:
    """Fail unless the settings of one of the profiles accept all overrides."""
    refusals = []
    for profile in profiles:
        try:
            load_config(profile, overrides)
        except UsageError as error:
            refusals.append(f"{profile.name}: {error}")
    assert len(refusals) < len(profiles), refusals


@cache
def module_help(module: str, folder: Path) -> str:
    server = {"PREFECT_API_URL": "http://127.0.0.1:9/api"}  # named, so that none is started for a help text
    environment = os.environ | server | {"PYTHONPATH": str(PROJECT), "COLUMNS": "200"}
    command = [sys.executable, "-m", module, "--help"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


@cache
def deployments() -> set[str]:
    found = set()
    for entry in yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]:
        file, _, function = entry["entrypoint"].partition(":")
        source = (PROJECT / file).read_text(encoding="utf-8")
        name = re.search(rf'@flow\(name="([\w-]+)"[^\n]*\)\ndef {function}\b', source)
        assert name, entry
        found.add(f"{name[1]}/{entry['name']}")
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first one waits for `dvc repro`
def test_commands_that_need_nothing_run(reproduced_project: Path, tmp_path: Path) -> None:
    """In a small generated project, in the order of the documents, each block from the same state."""
    project = copy_project(reproduced_project, tmp_path / "project")
    (project / "benchmarks").symlink_to(PROJECT / "benchmarks")
    (project / "docs/reference").mkdir(parents=True)
    (project / "edits.yaml").write_text(EDITS)
    shutil.copytree(first_frames(project), project / "frames/CAM_FRONT")
    params = (project / "params.yaml").read_text()
    scene = yaml.safe_load(run(project, sys.executable, "-c", SCENE))
    ran = 0
    for block in shell_blocks():
        if block.needs is not None:
            continue
        for words in block.commands():
            line = " ".join(words)
            if any(line.startswith(start) for start in RUN_ELSEWHERE):
                continue
            run(project, *[scene if word.startswith("scene-") else word for word in words])
            ran += 1
        (project / "params.yaml").write_text(params)
    assert ran > 10


SCENE = "from magicdrive_core.data.infos import read_scenes; print(read_scenes('artifacts/infos')[0].name)"


def first_frames(project: Path) -> Path:
    """Return a folder of PNG frames of one size, numbered."""
    from PIL import Image

    folder = project.parent / "frames"
    folder.mkdir()
    pictures = sorted((project / "data/samples/CAM_FRONT").iterdir())
    for number in range(3):
        Image.open(pictures[number % len(pictures)]).resize((160, 90)).save(folder / f"{number:04}.png")
    return folder


def test_what_is_run_elsewhere_is_still_in_the_documents() -> None:
    lines = [" ".join(words) for block in shell_blocks() if block.needs is None for words in block.commands()]
    assert [start for start in RUN_ELSEWHERE if not any(line.startswith(start) for line in lines)] == []
