"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): W + alpha / rank * B A, with W as it is.

``peft`` chooses their initial values, holds them and defines their file. What is different here: a linear map with an
adapter shows W + alpha / rank * B A as its ``weight``, because blocks hand the weights of their maps to fused functions
(kernels/functions.py), and sequence parallelism takes a part of them. So an adapter counts wherever a weight is read,
and training computes what generation computes with the merged weights.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from safetensors.torch import save_file
from torch import Tensor, nn

from magicdrive_core.config.schema import Lora
from magicdrive_core.training.trainable import linear_maps, matching
from magicdrive_core.utils.files import atomic_folder, read_json, write_json

logger = logging.getLogger(__name__)

ADAPTER = "default"  # peft's name for a model's only adapter
WEIGHTS, CONFIG, TRAINED = "adapter_model.safetensors", "adapter_config.json", "trained.safetensors"
_A, _B, _BASE = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight", ".base_layer"


class _ChannelDropout(nn.Module):
    """Leaves out the same input channels for all tokens of a micro-batch; without gradients none.

    A mask of channels, unlike one of tokens and channels, can be part of a weight.
    """

    scale: Tensor | None = None  # (input channels), 0 or 1 / (1 - dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.scale is None or not torch.is_grad_enabled() else x * self.scale


class AdaptedLinear(Linear):
    """peft's linear map with an adapter, whose ``weight`` is the one that it computes with."""

    @property
    def weight(self) -> Tensor:
        """(D, C): the frozen weight and its adapter together."""
        return self.base_layer.weight + self.lora_dropout[ADAPTER](self.get_delta_weight(ADAPTER))


def add_adapters(network: nn.Module, lora: Lora) -> None:
    """Give the targets adapters that change nothing yet: B is zero.

    Args:
        network: changed in place; targets whose weights are trained get no adapter.
        lora: rank, alpha, targets, dropout.
    """
    names = [
        name
        for name in matching(lora.targets, linear_maps(network))
        if not network.get_submodule(name).weight.requires_grad
    ]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if names:
        config = _peft_config(lora, names)
        config._register_custom_module({nn.Linear: AdaptedLinear})
        inject_adapter_in_model(config, network, ADAPTER)  # freezes all but the adapters
    for parameter in trained:
        parameter.requires_grad_(True)
    for module in _adapted(network):
        module.lora_dropout[ADAPTER] = _ChannelDropout()
    small = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    logger.info("lora: %d adapters of rank %d, %d numbers to train", len(names), lora.rank, small)


def draw_dropout(network: nn.Module, dropout: float, generator: torch.Generator) -> None:
    """Choose the input channels that adapters leave out until the next call.

    Args:
        network: with adapters.
        dropout: share of the channels.
        generator: of a micro-batch, on the CPU; the ranks that share its tokens draw the same.
    """
    for module in _adapted(network):
        weight = module.base_layer.weight
        assert isinstance(weight, Tensor)
        kept = torch.rand(weight.shape[1], generator=generator) >= dropout
        module.lora_dropout[ADAPTER].scale = (kept / (1 - dropout)).to(weight)


def merge(state: dict[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """Add the adapters to the weights that they belong to.

    Args:
        state: state dict of a network with adapters, in fp32.
        lora: rank and alpha.

    Returns:
        State dict of the network without adapters, in the same order.
    """
    merged: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module = name.removesuffix(f"{_BASE}.weight")
        if name.endswith((_A, _B)):
            continue
        if module != name:
            tensor = tensor + lora.alpha / lora.rank * state[module + _B] @ state[module + _A]
        merged[name.replace(f"{_BASE}.", ".")] = tensor
    return merged


def write_adapters(state: dict[str, Tensor], trained: list[str], lora: Lora, folder: Path) -> None:
    """Write the adapters as peft's files, and beside them what was trained in full.

    Args:
        state: state dict of a network with adapters.
        trained: names of all trained parameters.
        lora: rank, alpha, targets.
        folder: folder to write.
    """
    adapters = {name.removesuffix(_A): name for name in state if name.endswith(_A)}
    tensors = {}
    for module in adapters:
        for suffix in (_A, _B):
            tensors[f"base_model.model.{module}{suffix.replace(f'.{ADAPTER}', '')}"] = state[module + suffix]
    full = {name: state[name] for name in trained if not name.endswith((_A, _B))}
    with atomic_folder(folder) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        if full:
            save_file({name.replace(f"{_BASE}.", "."): tensor for name, tensor in full.items()}, partial / TRAINED)
        _peft_config(lora, list(adapters)).save_pretrained(str(partial))
        config = read_json(partial / CONFIG)
        write_json(partial / CONFIG, config | {"target_modules": sorted(adapters)})  # peft holds a set, in any order


def _peft_config(lora: Lora, targets: list[str]) -> LoraConfig:
    # peft divides alpha by the rank, and takes fractions although its annotation says int.
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)  # type: ignore[arg-type]


def _adapted(network: nn.Module) -> list[AdaptedLinear]:
    return [module for module in network.modules() if isinstance(module, AdaptedLinear)]
