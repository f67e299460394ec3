"""The command line for its user: exit codes, one line and a hint, no traceback."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from magicdrive_core.cli.main import app, main
from tests.conftest import PROJECT

MAGICDRIVE = str(Path(sys.executable).with_name("magicdrive"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(PROJECT / "profiles/demo.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, list[str]]:
    """Exit code, standard output, lines of standard error."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main(list(words))
    finally:
        signal.signal(signal.SIGTERM, before)
    out, err = capsys.readouterr()
    code = ended.value.code
    assert isinstance(code, int)
    return code, out, err.splitlines()


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from magicdrive_core.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'numpy', 'pydantic', 'mlflow', 'av'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for verb in (
        "synth",
        "use",
        "infos",
        "latents",
        "train",
        "generate",
        "package",
        "validate",
        "report",
        "golden",
        "memory",
    ):
        assert f"  {verb} " in done.stdout


def verbs(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the words that call each verb, and the verb."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):  # a group
            yield from verbs(command, (*words, name))
        else:
            yield (*words, name), command


VERBS = dict(verbs(get_command(app)))


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_the_help_of_every_verb_has_an_example_that_parses(words: tuple[str, ...]) -> None:
    command = VERBS[words]
    example = next(line for line in command.help.splitlines() if line.startswith("Example: "))
    program, *arguments = shlex.split(example.removeprefix("Example: "))
    assert (program, *arguments[: len(words)]) == ("magicdrive", *words)
    command.make_context(words[-1], arguments[len(words) :])  # raises where an option is unknown or a value is wrong


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("data.rot=/x", ["data.rot", "not a known key", "root"]),
        ("training.stage1.steps=many", ["training.stage1.steps", "'many'", "integer"]),
        ("generate.frames=16", ["generate.frames", "16", "8n+1"]),
        ("generate.resolution=100x100", ["generate.resolution", "'100x100'", "multiples of 8"]),
        ("model.width=130", ["model", "130", "heads"]),
        ("submission.team=../x", ["submission.team", "'../x'"]),
    ],
)
def test_bad_settings_are_one_line_and_exit_2(
    project: Path, capsys: pytest.CaptureFixture[str], change: str, says: list[str]
) -> None:
    code, out, err = run("infos", "-S", change, capsys=capsys)
    assert (code, out, len(err)) == (2, "", 1)
    assert all(word in err[0] for word in ["error: params.yaml", *says]), err[0]


def test_missing_settings_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run("infos", "--params", str(tmp_path / "none.yaml"), capsys=capsys)
    assert code == 2
    assert err[0].endswith("none.yaml is missing")
    assert err[1].startswith(" hint: ")


def test_a_wrong_command_line_exits_2(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["flyy"], ["train"], ["train", "stage4"], ["generate", "--shard", "3/2"], ["use", "demos"]):
        code, out, err = run(*words, capsys=capsys)
        assert (code, out) == (2, ""), words
        assert not any("Traceback" in line for line in err)


def test_a_data_root_without_tables_is_one_line_and_exit_1(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("infos", "-S", f"data.root={project / 'nowhere'}", capsys=capsys)
    assert (code, out, len(err)) == (1, "", 2)
    assert "nowhere" in err[0]
    assert not (project / "artifacts").exists()


def test_a_full_disk_is_explained(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "/some/file")

    monkeypatch.setattr("magicdrive_core.data.infos.build_infos", full)
    code, _, err = run("infos", capsys=capsys)
    assert code == 1
    assert "No space left on device" in err[0]
    assert "/some/file" in err[0]


def test_debug_shows_the_traceback(project: Path) -> None:
    words = [MAGICDRIVE, "--debug", "infos", "-S", "data.rot=1"]
    done = subprocess.run(words, cwd=project, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_verb_leaves_no_half_written_file(project: Path, number: signal.Signals, code: int) -> None:
    program = (
        "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from magicdrive_core.cli.main import main\n"
        "from magicdrive_core.utils import files\n"
        "import magicdrive_core.data.infos as infos\n"
        "def slow(config, out):\n"
        "    with files.atomic_folder(out) as folder:\n"
        "        (folder / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)\n"
        "infos.build_infos = slow\n"
        "main(['infos'])"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=project, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(number)
        assert child.wait(20) == code
    assert list((project / "artifacts").iterdir()) == []
