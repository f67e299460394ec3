"""The network of a training stage, sized by params.yaml and by the encoders of the project."""

from __future__ import annotations

from pathlib import Path

from magicdrive_core.config.schema import Config, Stage
from magicdrive_core.model.transformer import MagicDrive, NetworkConfig
from magicdrive_core.utils.files import read_json


def build_network(config: Config, stage: Stage, project: Path = Path()) -> MagicDrive:
    """The network, initialised from torch's generator.

    Raises:
        MagicDriveError: the project's encoders are not made yet.
    """
    encoders = read_json(project / "artifacts/encoders/encoders.json", "dvc repro encoders")
    return MagicDrive(
        NetworkConfig.of(
            config.model,
            latent_channels=encoders["vae"]["latent_channels"],
            text_width=encoders["text"]["width"],
            text_tokens=config.text.max_tokens,
            stage=stage,
            published=config.published,
        )
    )
