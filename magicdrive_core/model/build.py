"""Builds the network: the class that its configuration asks for, or the one of a training stage of a project."""

from __future__ import annotations

from pathlib import Path

from magicdrive_core.config.schema import Config, Stage
from magicdrive_core.model.config import NetworkConfig
from magicdrive_core.model.published.transformer import PublishedMagicDrive
from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.utils.files import read_json


def build_network(config: NetworkConfig) -> MagicDrive:
    """Builds the network that ``config`` describes, initialised from torch's generator.

    Args:
        config: sizes and variants; ``published`` chooses ``PublishedMagicDrive``.

    Returns:
        The network in training mode, in torch's default dtype and on its default device.
    """
    return (PublishedMagicDrive if config.published else MagicDrive)(config)


def build_stage_network(config: Config, stage: Stage, project: Path = Path()) -> MagicDrive:
    """Builds the network of a training stage, sized by the settings and by the project's encoders.

    Args:
        config: settings; sections ``model`` and ``text`` and the setting ``published`` are read.
        stage: training stage; stage 1 has no temporal blocks.
        project: folder of the project, which holds ``artifacts/encoders/encoders.json``.

    Returns:
        The network, initialised from torch's generator.

    Raises:
        MagicDriveError: the project's encoders do not exist yet.
    """
    encoders = read_json(project / "artifacts/encoders/encoders.json", "dvc repro encoders")
    return build_network(
        NetworkConfig.from_settings(
            config.model,
            latent_channels=encoders["vae"]["latent_channels"],
            text_width=encoders["text"]["width"],
            text_tokens=config.text.max_tokens,
            stage=stage,
            published=config.published,
        )
    )
