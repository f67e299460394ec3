"""What generation will need of a GPU's memory, planned without one: the real network and VAE run on fake tensors.

These are torch's meta tensors: every operation gives storages of the right size that hold nothing. The network takes
the same paths on them as on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from magicdrive_core.config import parse_size
from magicdrive_core.encoders.vae import PUBLISHED_SCALING, Vae, latent_shape
from magicdrive_core.errors import UsageError
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.inference.live_memory import FusedAttention, LiveMemory
from magicdrive_core.model.importing import PUBLISHED_XL
from magicdrive_core.model.inputs import Conditions
from magicdrive_core.model.network import SLICE_TOKENS, MagicDrive, NetworkConfig
from magicdrive_core.model.parallel import DeviceGroup, OneDevice
from magicdrive_core.rectified_flow import guide

GIB = 1 << 30
BLOCKS = 2  # of each kind that are passed: later ones take the same storages again. Weights, keys, values count of all
GROUPS = 3  # of latent frames that are decoded: all later ones repeat the third


@dataclass(frozen=True)
class Peaks:
    """Most bytes of tensors on one device."""

    encoding: int  # of the conditions, with and without guidance's null state
    sampling: int  # one guided step
    decoding: int  # one view


@dataclass(frozen=True)
class Setting:
    """How generation runs.

    Attributes:
        slots: boxes of a clip; every instance of it has one.
        sp: devices that share the tokens of a clip.
        offload: whether the model that is not at work waits in main memory.
        slice_tokens: ``MagicDrive.slice_tokens``.
        map_cells: BEV cells a side.
        stripe_rows: ``Vae.stripe_rows``; what waits in main memory is not counted.
    """

    slots: int = 100
    sp: int = 1
    offload: bool = True
    slice_tokens: int | None = SLICE_TOKENS
    map_cells: int = 400
    stripe_rows: int | None = None


class Planner:
    """Holds the models, so that many sizes can be planned with them.

    Args:
        config: the network; it is planned with attention masks, which published weights do without.
        vae: settings of diffusers' ``AutoencoderKLCogVideoX``; None: its defaults, which are CogVideoX-2b's.
        device: "meta"; any other really runs.
        dtype: of weights and activations.
    """

    def __init__(
        self,
        config: NetworkConfig = PUBLISHED_XL,
        vae: dict[str, Any] | None = None,
        device: str = "meta",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        from diffusers import AutoencoderKLCogVideoX  # takes seconds to import

        self._device, self._dtype = torch.device(device), dtype
        with self._device:
            self._network = MagicDrive(replace(config, published=False)).to(device, dtype).requires_grad_(False)
            model: Any = AutoencoderKLCogVideoX(**vae or {})
            model = nn.Module.to(model, device, dtype)
            self._vae = Vae(model, scaling_factor=PUBLISHED_SCALING)

    def peaks(self, size: str, frames: int, setting: Setting) -> Peaks:
        """Plans one clip of six views.

        With ``sp`` devices each has its share of the places of every frame; what they send each other counts too.

        Raises:
            UsageError: ``sp`` does not divide the network's heads.
        """
        if self._network.config.heads % setting.sp:
            raise UsageError(
                f"{setting.sp} devices cannot share {self._network.config.heads} heads", "choose a divisor"
            )
        self._network.devices = _ImaginedGroup(setting.sp) if setting.sp > 1 else OneDevice()
        self._network.slice_tokens = setting.slice_tokens
        self._network.config = replace(self._network.config, depth=min(BLOCKS, self._network.config.depth))
        shape = latent_shape(frames, *parse_size(size))
        network, vae = self._network, self._vae.model
        other = [] if setting.offload else [network, vae]
        with self._tracked([network, *other]) as memory:
            conditions = self._conditions(frames, setting)
            wanted, unwanted = (network.encode(told, shape) for told in (conditions, conditions.dropped()))
            encoding, memory.peak = memory.peak, memory.live
            x = torch.zeros(1, len(VIEWS), network.config.latent_channels, *shape, device=self._device)
            t = torch.zeros(1, device=self._device)
            x = x + 0.1 * guide(network.denoise(x, t, wanted), network.denoise(x, t, unwanted), 2.0)
            del x
            sampling = memory.peak
        with self._tracked([vae, *other]) as memory:
            self._vae.stripe_rows = setting.stripe_rows
            latents = torch.zeros(1, self._vae.latent_channels, *shape, device=self._device)
            for _ in islice(self._vae.decode_groups(latents), GROUPS):
                pass
            decoding = memory.peak
        return Peaks(encoding, sampling, decoding)

    @contextmanager
    def _tracked(self, models: list[nn.Module]) -> Iterator[LiveMemory]:
        memory = LiveMemory(self._device.type)
        for model in models:
            memory.hold([*model.parameters(), *model.buffers()])
        with torch.no_grad(), FusedAttention(), memory:
            yield memory

    def _conditions(self, frames: int, setting: Setting) -> Conditions:
        config, cells = self._network.config, setting.map_cells
        V, N, L = len(VIEWS), setting.slots, config.text_tokens

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        return Conditions(
            text=empty(1, L, config.text_width),
            text_mask=empty(1, L, dtype=torch.bool),
            cameras=empty(1, V, frames, 3, 7),
            ego_motion=empty(1, frames, 4, 4),
            box_corners=empty(1, V, frames, N, 8, 3),
            box_classes=empty(1, V, frames, N, dtype=torch.int64),
            box_masks=empty(1, V, frames, N, dtype=torch.int64),
            bev_map=empty(1, frames, config.map_layers, cells, cells),
            height=empty(1),
            width=empty(1),
            fps=empty(1),
            keep=empty(1, dtype=torch.bool),
            keep_frame=empty(1, frames, dtype=torch.bool),
            box_latent=empty(1, N, config.class_width or config.width),
        )


class _ImaginedGroup(DeviceGroup):
    """One device of a group whose others are not there: what they would send is made up."""

    def __init__(self, size: int) -> None:
        self.size, self.rank = size, 0

    def exchange(self, x: Tensor) -> Tensor:
        return torch.empty_like(x.contiguous())

    def collect(self, x: Tensor) -> Tensor:
        return x.new_empty(self.size, *x.shape)
