"""The models of generation: the trained network, the VAE and the text features, and which one is on the device."""

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
    """Models with frozen weights, ready to sample.

    Attributes:
        network: the diffusion transformer.
        vae: encodes frames to latents and decodes them.
        text: cached features of the captions of all scenes.
        encode_text: encodes captions that the cache does not hold: those of edited scenes.
        device: where models work.
        offload: whether the model that is not at work waits in main memory.
    """

    network: MagicDrive
    vae: Vae
    text: TextCache
    encode_text: Callable[[str], Tensor]
    device: torch.device
    offload: bool

    @classmethod
    def load(
        cls, config: Config, stage_folder: Path, project: Path = Path(), sequence_group: RankGroup | None = None
    ) -> Models:
        """Loads the EMA weights of a finished stage, and the project's encoders.

        The network has the precision ``generate.precision``. The VAE has it too if it is bf16 on a GPU, else fp32. With
        ``generate.offload`` the network waits in main memory at first.

        Args:
            config: settings; sections ``generate``, ``model``, ``vae`` and ``text`` are read.
            stage_folder: the finished training run.
            project: folder of the project.
            sequence_group: ranks that share the tokens of every frame; None: this process has all of them.

        Returns:
            The models; no weight requires a gradient.

        Raises:
            MagicDriveError: the stage is not finished; its weights have changed since, or belong to another model
                section; or imported weights meet ``published: false``.
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

    def move_to_device(self, wanted: nn.Module) -> None:
        """With ``offload``, moves the other model to main memory, then the wanted one to the device; else does nothing.

        Args:
            wanted: ``network``, or the module of the VAE, ``vae.model``.
        """
        if self.offload:
            waiting = self.vae.model if wanted is self.network else self.network
            waiting.to("cpu")
            wanted.to(self.device)

    def features(self, caption: str) -> Tensor:
        """Returns the text features of a caption, from the cache or encoded now.

        Args:
            caption: a scene's caption, edited or not.

        Returns:
            (l, D) in fp32, one row for each of the caption's l tokens.
        """
        return self.text.features(caption) if caption in self.text else self.encode_text(caption)


def _load_network(config: Config, stage_folder: Path, project: Path) -> MagicDrive:
    """Builds the network of a finished stage and loads its EMA weights, after checks of both."""
    run = read_json(stage_folder / "run.json", "train the stage first: magicdrive train")
    weights = stage_folder / "ema.safetensors"
    if not weights.is_file() or sha256_file(weights) != run["weights_sha256"]:
        raise MagicDriveError(
            f"{weights} is missing or is not the file that training wrote",
            "delete the folder and train the stage again",
        )
    if run.get("published", config.published) != config.published:
        raise MagicDriveError(
            f"{weights} holds imported weights, which need the published network's oddities",
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


def write_untrained(config: Config, stage: Stage, folder: Path, project: Path = Path()) -> None:
    """Writes a stage's network with its initial weights in the form of a finished training run.

    Generation with it shows what comes out without any learning, the lower bound of scores.

    Args:
        config: settings.
        stage: whose network and seed.
        folder: folder of the run, made if missing; holds ``ema.safetensors`` and ``run.json`` afterwards.
        project: folder of the project.

    Raises:
        MagicDriveError: the project's encoders are not built yet.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.stage(stage).seed)
        state = build_stage_network(config, stage, project).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "ema.safetensors") as partial:
        save_file(state, partial)
    facts = {"stage": stage, "published": config.published, "weights_sha256": sha256_file(folder / "ema.safetensors")}
    write_json(folder / "run.json", facts)
