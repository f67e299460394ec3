"""The lock file against what is installed, and what pip reports about it."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

from tests.conftest import PROJECT

# ColossalAI's pins, and what only its command line needs: docs/decisions/0001-environment.md.
KNOWN = {
    "contexttimer, which is not installed",
    "diffusers==0.29.0",
    "fabric, which is not installed",
    "google, which is not installed",
    "peft<=0.13.2,>=0.7.1",
    "pre-commit, which is not installed",
    "ray, which is not installed",
    "rpyc, which is not installed",
    "torch<=2.5.1,>=2.2.0",
    "transformers==4.51.3",
    "uvicorn==0.29.0",
}
# Torch is a build for the machine; every virtual environment has the others.
OUTSIDE = {"torch", "setuptools", "pip"}


def _name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def _locked() -> dict[str, str]:
    lines = (PROJECT / "requirements.lock").read_text().split()
    pairs = [line.partition("==")[::2] for line in lines]
    return {_name(name): version for name, version in pairs}


def test_pip_reports_conflicts_with_colossalais_pins_only() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    complaints = set()
    for line in done.stdout.splitlines():
        match = re.fullmatch(r"colossalai 0\.5\.0 (?:requires|has requirement) (.*?)(?:, but you have .*)?\.?", line)
        assert match, line
        complaints.add(match[1])
    assert complaints == KNOWN


def test_the_lock_is_installed_and_names_no_address() -> None:
    locked = _locked()
    assert "://" not in (PROJECT / "requirements.lock").read_text()
    assert "torch" not in locked
    wrong = {name: (want, metadata.version(name)) for name, want in locked.items() if metadata.version(name) != want}
    assert not wrong


@pytest.mark.parametrize("python", ["3.11.0", "3.11.2", "3.11.99"])
def test_the_lock_is_complete_for_every_python_3_11(python: str) -> None:
    """Python 3.11.2 needs a backport that later versions do not need, so a test on those would not miss it."""
    here = {**default_environment(), "python_full_version": python, "extra": ""}
    locked = _locked()
    missing = {
        (package, requirement.name)
        for package in locked.keys() - {"colossalai"}  # what it lacks is in KNOWN
        for requirement in map(Requirement, metadata.requires(package) or [])
        if (requirement.marker is None or requirement.marker.evaluate(here))
        and _name(requirement.name) not in locked.keys() | OUTSIDE
    }
    assert not missing
