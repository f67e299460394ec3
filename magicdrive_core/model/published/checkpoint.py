"""Import of released weights: read without running code that a file may hold, checked, written as safetensors."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.model.build import build_network
from magicdrive_core.model.config import NetworkConfig
from magicdrive_core.utils.files import atomic_folder, read_json, sha256_file, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from magicdrive_core.config.schema import Stage

PUBLISHED_XL = NetworkConfig(
    width=1152,
    depth=28,
    heads=16,
    control_depth=13,
    ego_heads=8,
    box_heads=8,
    box_widths=(1152, 512, 512),
    map_channels=(16, 32, 96, 256),
    latent_channels=16,
    text_width=4096,
    text_tokens=300,
    temporal=True,
    instance_latent=True,
    mean_over_frames=False,
    published=True,
)
TEXT = "y_embedder.y_embedding"
DERIVED = ("pos_embed", "pos_embed_temporal")  # tables that old checkpoints hold and the network computes
HINT = "pass ema.pt, a safetensors file, or a folder of shards with their index, and the --stage that it belongs to"


def published_xl(stage: Stage) -> NetworkConfig:
    """Describes the published network of a stage; stages 2 and 3 have the same one.

    Args:
        stage: training stage; stage 1 has neither temporal blocks nor instance latents.

    Returns:
        The sizes.
    """
    first = stage == "stage1"
    return replace(PUBLISHED_XL, temporal=not first, instance_latent=not first, mean_over_frames=first)


def import_checkpoint(path: Path | str, out: Path | str, stage: Stage, config: NetworkConfig) -> int:
    """Reads published weights, checks every name and shape, and writes them as a finished run of ``stage``.

    ``out`` then holds what training leaves: ``ema.safetensors``, and ``run.json`` with its digest and the mark
    ``published``. ``generate.weights`` in params.yaml names that folder.
    The null text is cut, or its last row repeated, to the network's number of text tokens (model card, "checkpoint").

    Args:
        path: a file (``.pt``, ``.bin``, ``.safetensors``) or a folder of such shards with an ``*.index.json``.
        out: the folder to write; one that exists is replaced when all is there.
        stage: the stage that the weights belong to.
        config: the network that the weights belong to.

    Returns:
        The number of tensors.

    Raises:
        MagicDriveError: the file is missing, is not readable as plain tensors, or belongs to another network.
    """
    path = Path(path)
    weights = {name: tensor for name, tensor in read_weights(path).items() if name not in DERIVED}
    if TEXT in weights:
        weights[TEXT] = fit_text(weights[TEXT], config.text_tokens)
    with torch.device("meta"):
        wanted = build_network(config).state_dict()
    check_names(weights, wanted, path)
    with atomic_folder(out) as folder:
        file = folder / "ema.safetensors"
        save_file({name: weights[name].contiguous() for name in wanted}, file, metadata={"format": "pt"})
        facts = {
            "stage": stage,
            "published": config.published,
            "source": path.name,
            "weights_sha256": sha256_file(file),
        }
        write_json(folder / "run.json", facts)
    return len(wanted)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a file, or of all shards of a folder.

    Args:
        path: the file or folder.

    Returns:
        The tensors by name, on the CPU; those of a ``.pt`` or ``.bin`` file are mapped from the disk.

    Raises:
        MagicDriveError: a file is missing, damaged, or a pickle that holds more than tensors.
    """
    if path.is_dir():
        weights: dict[str, Tensor] = {}
        for shard in _shards(path):
            weights |= _read_file(shard)
        return weights
    return _read_file(path)


def fit_text(null_text: Tensor, tokens: int) -> Tensor:
    """Cuts the null text to the network's number of tokens, or repeats its last row.

    Args:
        null_text: (L, D).
        tokens: number of text tokens of the network.

    Returns:
        (tokens, D).
    """
    missing = max(0, tokens - len(null_text))
    return torch.cat([null_text[:tokens], null_text[-1:].expand(missing, -1)])


def check_names(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Compares names and shapes with the network's own.

    Args:
        weights: those of the file.
        wanted: the network's state dict.
        path: named in the message.

    Raises:
        MagicDriveError: a name or a shape differs.
    """
    faults = [f"lacks {name}" for name in wanted if name not in weights]
    faults += [f"holds the unknown {name}" for name in weights if name not in wanted]
    faults += [
        f"holds {name} of shape {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if faults:
        raise MagicDriveError(
            f"{path} {faults[0]} ({len(faults)} differences in all): these weights belong to another network", HINT
        )


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (FileNotFoundError, IsADirectoryError):
        raise MagicDriveError(f"{path} is missing", HINT) from None
    except pickle.UnpicklingError:
        raise MagicDriveError(
            f"{path} is refused: not a plain file of tensors (a pickle with code, or damaged)", HINT
        ) from None
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise MagicDriveError(f"{path} is not readable: {' '.join(str(error).split())[:200]}", HINT) from None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise MagicDriveError(f"{path} is not a plain dictionary of tensors", HINT)
    return weights


def _shards(folder: Path) -> list[Path]:
    """Lists the files that the folder's index names."""
    indices = sorted(folder.glob("[!.]*.index.json"))
    if len(indices) != 1:
        raise MagicDriveError(f"{folder} holds {len(indices)} files *.index.json instead of one", HINT)
    index = read_json(indices[0], HINT)
    files = index.get("weight_map") if isinstance(index, dict) else None
    names = list(files.values()) if isinstance(files, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name and "\0" not in name for name in names):
        raise MagicDriveError(f"{indices[0]} is not an index of shards in its folder: {json.dumps(names)[:200]}", HINT)
    return [folder / name for name in sorted(set(names))]
