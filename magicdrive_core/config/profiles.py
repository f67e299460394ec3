"""Profiles: ready settings in ``profiles/``, copied to params.yaml with the user's overrides."""

from __future__ import annotations

import shlex
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

from magicdrive_core.config.load import apply_override, parse_config
from magicdrive_core.errors import UsageError
from magicdrive_core.utils.files import atomic_file

HEADER = "# Made by: magicdrive use "


def use_profile(name: str, overrides: list[str], *, force: bool = False, project: Path = Path()) -> None:
    """Writes ``project/params.yaml`` from ``project/profiles/<name>.yaml``, comments and layout kept.

    Raises:
        UsageError: no such profile, an impossible value, or a params.yaml that was changed by hand (unless ``force``).
    """
    text = _render(name, overrides, project)
    params = project / "params.yaml"
    if params.exists():
        old = params.read_text(encoding="utf-8")
        if old == text:
            return
        if not force and not _was_made_by_use(old, project):
            raise UsageError(
                "params.yaml holds changes of yours, which this would overwrite",
                "`make run` works with it as it stands; `git checkout params.yaml`, or --force, gives them up",
            )
    with atomic_file(params) as partial:
        partial.write_text(text, encoding="utf-8")


def _render(name: str, overrides: list[str], project: Path) -> str:
    """The text of params.yaml: the profile's own, or with overrides a first line that says how it was made."""
    source = project / "profiles" / f"{name}.yaml"
    if not source.is_file():
        known = ", ".join(sorted(path.stem for path in source.parent.glob("*.yaml")))
        raise UsageError(f"there is no profile {name!r}", f"known: {known}" if known else "run in the project's folder")
    text = source.read_text(encoding="utf-8")
    yaml = YAML()
    yaml.width = 4096  # never fold a line
    yaml.indent(mapping=2, sequence=4, offset=2)
    values = yaml.load(text)
    for override in overrides:
        apply_override(values, override)
    parse_config(values, source=str(source))
    if not overrides:
        return text
    out = StringIO()
    yaml.dump(values, out)
    command = shlex.join([name, *(part for override in overrides for part in ("-S", override))])
    return f"{HEADER}{command}\n{out.getvalue()}"


def _was_made_by_use(text: str, project: Path) -> bool:
    """Whether ``text`` can be made again, so that overwriting it loses nothing."""
    first = text.partition("\n")[0]
    if not first.startswith(HEADER):
        return any(text == path.read_text(encoding="utf-8") for path in (project / "profiles").glob("*.yaml"))
    name, *words = shlex.split(first.removeprefix(HEADER))
    try:
        return text == _render(name, words[1::2], project)
    except UsageError:
        return False
