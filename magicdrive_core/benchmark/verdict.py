"""What the validator said of a package, kept beside it: each package is decoded once, and the report repeats it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from magicdrive_core.benchmark.submission import Expected
from magicdrive_core.benchmark.validate import validate
from magicdrive_core.files import read_json, sha256_file, write_json

VERDICT = "validation.json"


def judge(zip_path: Path, expected: Expected) -> list[str]:
    """Faults of the zip, from ``validation.json`` beside it where that is of this very zip, else found and saved there.

    Raises:
        MagicDriveError: the folder cannot be written.
    """
    if not zip_path.is_file():
        return validate(zip_path, expected)
    path = zip_path.with_name(VERDICT)
    question = {"zip_sha256": sha256_file(zip_path), "expected": asdict(expected)}
    if path.is_file():
        verdict = read_json(path)
        if {key: verdict[key] for key in question} == question:
            return list(verdict["faults"])
    faults = validate(zip_path, expected)
    write_json(path, {**question, "faults": faults})
    return faults
