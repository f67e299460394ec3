"""What generation holds in memory: the trained network, the VAE, and the text features from their cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from magicdrive_core.config.schema import Config, Stage
from magicdrive_core.device import this_device
from magicdrive_core.encoders.caches import TextCache
from magicdrive_core.encoders.text import TextEncoder
from magicdrive_core.encoders.vae import Vae
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.model.build import build_stage_network
from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.parallel.parallelize import parallelize
from magicdrive_core.parallel.sequence_parallel import RankGroup
from magicdrive_core.utils.files import atomic_file, read_json, sha256_file, write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Models:
    """Ready to sample; weights are frozen."""

    network: MagicDrive
    vae: Vae
    text: TextCache
    encode_text: Callable[[str], Tensor]  # for captions that the cache has not: of edited scenes
    device: torch.device
    offload: bool  # what is not at work waits in main memory

    @classmethod
    def load(
        cls, config: Config, stage_folder: Path, project: Path = Path(), sequence_group: RankGroup | None = None
    ) -> Models:
        """Loads the EMA weights of a finished stage, and the project's encoders.

        The network has ``generate.precision``; where that is bf16 on a GPU, the VAE has it too, else fp32. With
        ``generate.offload`` the network waits in main memory.

        Raises:
            MagicDriveError: the stage is not finished, its weights were changed, or are of another model section, or
                imported ones meet ``published: false``.
        """
        device = this_device()
        as_trained = config.training.precision if device.type != "cpu" else "fp32"
        dtype = DTYPES[config.generate.precision or as_trained]
        encoders = read_json(project / "artifacts/encoders/encoders.json", "dvc repro encoders")
        network = _load_network(config, stage_folder, project)
        parallelize(network, sequence_group=sequence_group, compile_backend=config.generate.compile)
        vae = Vae.load(
            project / encoders["vae"]["path"],
            scaling_factor=encoders["vae"]["scaling_factor"],
            chunk_frames=config.vae.chunk_frames,
            device=device,
            dtype=dtype if dtype == torch.bfloat16 and device.type != "cpu" else torch.float32,
            stripe_rows=config.generate.stripe_rows,
        )

        def text_encoder() -> TextEncoder:
            if config.generate.offload:
                for model in (network, vae.model):
                    model.to("cpu")
            return TextEncoder.load(project / encoders["text"]["path"], config.text.max_tokens, device)

        load_text = text_encoder if config.generate.offload else cache(text_encoder)  # T5 is larger than the network
        return cls(
            network=network.to("cpu" if config.generate.offload else device, dtype),
            vae=vae,
            text=TextCache(project / "artifacts/text", config),
            encode_text=lambda caption: load_text().encode([caption])[0],
            device=device,
            offload=config.generate.offload,
        )

    def make_room_for(self, wanted: nn.Module) -> None:
        """With ``offload`` the device holds ``wanted``, network or VAE, and the other one waits."""
        if self.offload:
            waiting = self.vae.model if wanted is self.network else self.network
            waiting.to("cpu")
            wanted.to(self.device)

    def features(self, caption: str) -> Tensor:
        """(l, D) float32: the features of a caption's own tokens, from the cache or encoded now."""
        return self.text.features(caption) if caption in self.text else self.encode_text(caption)


def _load_network(config: Config, stage_folder: Path, project: Path) -> MagicDrive:
    run = read_json(stage_folder / "run.json", "train the stage first: magicdrive train")
    weights = stage_folder / "ema.safetensors"
    if not weights.is_file() or sha256_file(weights) != run["weights_sha256"]:
        raise MagicDriveError(
            f"{weights} is missing or not the file that training wrote", "delete the folder and train the stage again"
        )
    if run.get("published", config.published) != config.published:
        raise MagicDriveError(
            f"{weights} are imported weights, which need the published network's oddities",
            "set published: true in params.yaml, then dvc repro (docs/decisions/0003-published-switch.md)",
        )
    network = build_stage_network(config, run["stage"], project)
    try:
        network.load_state_dict(load_file(weights))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise MagicDriveError(
            f"{weights} does not fit the network of params.yaml: {reason}",
            "use the model section that the stage was trained with",
        ) from None
    return network.eval().requires_grad_(False)


# The network before its first step, in the place of a finished training: what generation makes without learning.


def write_untrained(config: Config, stage: Stage, folder: Path, project: Path = Path()) -> None:
    """Writes initial weights of a stage's network and their ``run.json``, as a finished training leaves them.

    Raises:
        MagicDriveError: the project's encoders are not made yet.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.stage(stage).seed)
        state = build_stage_network(config, stage, project).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "ema.safetensors") as partial:
        save_file(state, partial)
    facts = {"stage": stage, "published": config.published, "weights_sha256": sha256_file(folder / "ema.safetensors")}
    write_json(folder / "run.json", facts)
