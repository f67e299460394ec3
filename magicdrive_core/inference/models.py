"""What generation holds in memory: the trained network, the VAE, and the text features from their cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from magicdrive_core.config import Config
from magicdrive_core.encoders.caches import TextCache
from magicdrive_core.encoders.vae import Vae
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.files import read_json, sha256_file
from magicdrive_core.model.build import build_network
from magicdrive_core.model.network import MagicDrive


@dataclass(frozen=True)
class Models:
    """Ready to sample; weights are frozen."""

    network: MagicDrive
    vae: Vae
    text: TextCache
    device: torch.device

    @classmethod
    def load(cls, config: Config, stage_folder: Path, project: Path = Path()) -> Models:
        """Loads the EMA weights of a finished stage, and the project's encoders.

        On a GPU with ``training.precision: bf16`` the weights are bf16.

        Raises:
            MagicDriveError: the stage is not finished, its weights were changed, or are of another model section.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" and config.training.precision == "bf16" else torch.float32
        encoders = read_json(project / "artifacts/encoders/encoders.json", "dvc repro encoders")
        network = _load_network(config, stage_folder, project)
        vae = Vae.load(
            project / encoders["vae"]["path"],
            scaling_factor=encoders["vae"]["scaling_factor"],
            chunk_frames=config.vae.chunk_frames,
            device=device,
            dtype=dtype,
        )
        return cls(network.to(device, dtype), vae, TextCache(project / "artifacts/text"), device)


def _load_network(config: Config, stage_folder: Path, project: Path) -> MagicDrive:
    run = read_json(stage_folder / "run.json", "train the stage first: magicdrive train")
    weights = stage_folder / "ema.safetensors"
    if not weights.is_file() or sha256_file(weights) != run["weights_sha256"]:
        raise MagicDriveError(
            f"{weights} is missing or not the file that training wrote", "delete the folder and train the stage again"
        )
    network = build_network(config, run["stage"], project)
    try:
        network.load_state_dict(load_file(weights))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise MagicDriveError(
            f"{weights} does not fit the network of params.yaml: {reason}",
            "use the model section that the stage was trained with",
        ) from None
    return network.eval().requires_grad_(False)
