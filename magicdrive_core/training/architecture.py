"""Whether a file of weights is of the network that params.yaml describes, from its header alone. No torch."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from magicdrive_core.config import Model
from magicdrive_core.errors import MagicDriveError


def check_architecture(path: Path, model: Model) -> None:
    """Compares the widths and depths that a safetensors file shows with the model section.

    Raises:
        MagicDriveError: they differ, or it is no such file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise MagicDriveError(f"{path} is no file of weights: {error}", "move its folder away to start anew") from None
    found = {
        "width": shapes.get("before_proj.weight", (0,))[0],
        "depth": _blocks(shapes, "base_blocks_s"),
        "control_depth": _blocks(shapes, "control_blocks_s"),
    }
    for name, value in found.items():
        wanted = getattr(model, name)
        if value != wanted:
            raise MagicDriveError(
                f"{path} is of another network: model.{name} is {wanted} in params.yaml, {value} in the file",
                f"set model.{name} back, or move the file's folder away to start anew",
            )


def _blocks(shapes: dict[str, tuple[int, ...]], group: str) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith(f"{group}.")})
