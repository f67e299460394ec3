"""A bundle: a trained network with its VAE, its text encoder and its model card, in one folder that explains itself.

``bundle.json`` has the digest of every other file, so that a bundle that was changed or cut off is refused wherever it
is read. ``network`` has the form of a finished training run; ``vae`` and ``text`` are from_pretrained folders. So the
settings name the parts of a bundle like any other: ``training.start_from``, ``generate.weights``, ``vae.path`` and
``text.path``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import read_json, sha256_file

BUNDLE, CARD = "bundle.json", "model_card.md"
NETWORK, VAE, TEXT = "network", "vae", "text"  # folders of a bundle
FORMAT = 1  # of bundle.json
HINT = "get the bundle again: git checkout restores one that the repository holds"


def read_bundle(folder: Path) -> dict[str, Any]:
    """Read what a bundle says of itself, without the digests of its files.

    Args:
        folder: the bundle's folder.

    Returns:
        The content of ``bundle.json``.

    Raises:
        MagicDriveError: it is missing or damaged, or has another format.
    """
    facts = read_json(folder / BUNDLE, "make one with: magicdrive bundle write")
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or not isinstance(facts.get("files"), dict):
        raise MagicDriveError(f"{folder / BUNDLE} is not a bundle of format {FORMAT}", HINT)
    return facts


def verify_bundle(folder: Path, part: str = "") -> dict[str, Any]:
    """Compare the files of a bundle with their recorded digests.

    Args:
        folder: the bundle's folder.
        part: one of its folders, to compare only the files in it; empty: all files.

    Returns:
        The content of ``bundle.json``.

    Raises:
        MagicDriveError: a file is missing, is not listed, or has another digest.
    """
    facts = read_bundle(folder)
    prefix = f"{part}/" if part else ""
    wanted = {name: digest for name, digest in facts["files"].items() if name.startswith(prefix)}
    found = {file.relative_to(folder).as_posix(): file for file in (folder / part).rglob("*") if file.is_file()}
    for name in sorted(wanted.keys() | found.keys() - {BUNDLE}):
        if name not in found:
            raise MagicDriveError(f"{folder}: the file {name} of the bundle is missing", HINT)
        if name not in wanted:
            raise MagicDriveError(f"{folder}: the file {name} does not belong to the bundle", "move it elsewhere")
        if sha256_file(found[name]) != wanted[name]:
            raise MagicDriveError(f"{folder}: the file {name} has another digest than {BUNDLE} recorded", HINT)
    return facts


def verify_encoder(folder: Path) -> None:
    """Compare the files of an encoder with their digests, where it belongs to a bundle.

    Args:
        folder: from_pretrained folder of an encoder.

    Raises:
        MagicDriveError: it belongs to a bundle and differs from what was recorded there.
    """
    if folder.name in (VAE, TEXT) and (folder.parent / BUNDLE).is_file():
        verify_bundle(folder.parent, folder.name)
