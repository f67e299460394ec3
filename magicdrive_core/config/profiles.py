"""Profiles: complete settings in ``profiles/``, copied to params.yaml with the user's overrides."""

from __future__ import annotations

import shlex
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

from magicdrive_core.config.load import apply_override, parse_config
from magicdrive_core.errors import UsageError
from magicdrive_core.utils.files import atomic_file

HEADER = "# Made by: magicdrive use "
_EDITOR = "# yaml-language-server: $schema="  # the line that tells an editor the schema, relative to the file


def use_profile(name: str, overrides: list[str], *, force: bool = False, project: Path = Path()) -> None:
    """Writes ``project/params.yaml`` from ``project/profiles/<name>.yaml``, comments and layout kept.

    Args:
        name: the profile.
        overrides: ``key.key=value`` texts that change the profile's values.
        force: replace a params.yaml that was changed by hand.
        project: the project's folder.

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
                "params.yaml was changed by hand, and this would overwrite the changes",
                "`make run` uses params.yaml as it is; --force or `git checkout params.yaml` drops the changes",
            )
    with atomic_file(params) as partial:
        partial.write_text(text, encoding="utf-8")


def _render(name: str, overrides: list[str], project: Path) -> str:
    """Returns the text of params.yaml: the profile's; with overrides, a first line says how it was made."""
    source = project / "profiles" / f"{name}.yaml"
    if not source.is_file():
        known = ", ".join(sorted(path.stem for path in source.parent.glob("*.yaml")))
        raise UsageError(f"there is no profile {name!r}", f"known: {known}" if known else "run in the project's folder")
    text = _profile_text(source)
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


def _profile_text(source: Path) -> str:
    """Returns a profile as it reads one folder higher: the schema's path is relative to the file."""
    return source.read_text(encoding="utf-8").replace(f"{_EDITOR}../", _EDITOR)


def _was_made_by_use(text: str, project: Path) -> bool:
    """Whether ``text`` can be made again, so that overwriting it loses nothing."""
    first = text.partition("\n")[0]
    if not first.startswith(HEADER):
        return any(text == _profile_text(path) for path in (project / "profiles").glob("*.yaml"))
    name, *words = shlex.split(first.removeprefix(HEADER))
    try:
        return text == _render(name, words[1::2], project)
    except UsageError:
        return False
