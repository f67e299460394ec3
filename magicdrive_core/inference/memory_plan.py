"""The GPU memory that generation needs, planned without a GPU.

The real network and VAE run on torch's meta tensors: every operation returns tensors of the right size that hold
nothing, on the paths that a GPU takes. ``LiveMemory`` counts the bytes of all tensors in memory after each operation;
``Planner`` runs the phases of generation under it; ``table_lines`` puts the plan next to the published system's table.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from magicdrive_core.config.schema import parse_size
from magicdrive_core.diffusion.guidance import guide
from magicdrive_core.encoders.vae import PUBLISHED_SCALING, Vae, latent_shape
from magicdrive_core.errors import UsageError
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.model.build import build_network
from magicdrive_core.model.config import NetworkConfig
from magicdrive_core.model.inputs import blank_conditions
from magicdrive_core.model.published.checkpoint import PUBLISHED_XL
from magicdrive_core.parallel.parallelize import parallelize
from magicdrive_core.parallel.sequence_parallel import RankGroup

GIB = 1 << 30
BLOCKS = 2  # blocks of each kind that run: later ones use the same memory again; weights, keys and values count of all
GROUPS = 3  # groups of latent frames that are decoded: all later ones repeat the third
SP_SIZES = (1, 2, 4, 8)
FULL = 241  # frames of a whole scene

# GiB by (size, frames): encoding of the conditions and sampling with CPU offload, at each of SP_SIZES; then decoding.
# Measured by the published system's authors on a GPU of 96 GB (its FAQ, question 2.1). None: out of memory.
PUBLISHED: dict[tuple[str, int], tuple[tuple[float | None, ...], float]] = {
    ("224x400", 17): ((17.91, 17.91, 17.91, 17.91), 3.87),
    ("224x400", FULL): ((21.93, 18.51, 18.51, 18.51), 4.82),
    ("424x800", 17): ((17.97, 17.97, 17.97, 17.97), 12.43),
    ("424x800", FULL): ((40.69, 25.70, 19.80, 19.80), 16.24),
    ("848x1600", 17): ((18.08, 18.08, 18.08, 18.08), 51.33),
    ("848x1600", 33): ((24.89, 18.33, 18.33, 18.33), 52.08),
    ("848x1600", 65): ((43.62, 26.67, 18.83, 18.83), 53.59),
    ("848x1600", 129): ((81.14, 48.24, 29.66, 23.83), 56.84),
    ("848x1600", FULL): ((None, 83.40, 50.19, 39.76), 58.20),
}


class LiveMemory(TorchDispatchMode):
    """While active, follows every storage that an operation returns until it is freed.

    A storage counts once, whatever views of it there are. Memory that an operation allocates and frees inside itself,
    such as a convolution's workspace, is not counted.

    Args:
        device: type of the devices whose storages count; None: all.

    Attributes:
        live: bytes in memory now.
        peak: most bytes in memory so far.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self._device = device
        self.live = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were made before, such as weights and inputs.

        Args:
            tensors: whose storages count from now on until they are freed; those that are counted already do not count
                twice.
        """
        for tensor in tensors:
            self._count(tensor)

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        if self._device not in (None, tensor.device.type):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = weakref.ref(storage, partial(self._freed, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int, size: int, _storage: object) -> None:
        del self._alive[key]
        self.live -= size


@contextmanager
def fused_attention() -> Iterator[None]:
    """Computes attention of meta tensors as a GPU does, without the matrix of scores, even if torch has no CUDA.

    Such a build would choose the plain form for meta tensors, which materialises the scores. The function is replaced
    and not intercepted by a mode, because activation checkpointing calls it again outside of modes.
    """
    plain = functional.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
        if not q.is_meta:
            return plain(q, k, v, attn_mask, **settings)
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
        gradients = torch.is_grad_enabled()
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, gradients)[0]

    with patch.object(functional, "scaled_dot_product_attention", attend):
        yield


@dataclass(frozen=True)
class Peaks:
    """Most bytes of tensors on one device, by phase.

    Attributes:
        encoding: while the conditions and the unconditional state of guidance are encoded.
        sampling: during one guided step.
        decoding: while one view is decoded.
    """

    encoding: int
    sampling: int
    decoding: int


@dataclass(frozen=True)
class Setting:
    """How generation runs.

    Attributes:
        slots: box slots N of a clip, one for each object in it.
        sp: devices that share the tokens of a clip.
        offload: whether the model that is not at work waits in main memory.
        slice_tokens: tokens of a slice, see ``parallelize``.
        map_cells: BEV map cells on a side.
        stripe_rows: pixel rows of a stripe, see ``Vae``; memory in the host is not counted.
    """

    slots: int = 100
    sp: int = 1
    offload: bool = True
    slice_tokens: int | None = None
    map_cells: int = 400
    stripe_rows: int | None = None


class Planner:
    """Plans clips of any size with one network and one VAE.

    Args:
        config: the network; it is planned with attention masks, which published weights do without.
        vae: settings of diffusers' ``AutoencoderKLCogVideoX``; None: its defaults, which are CogVideoX-2b's.
        device: "meta"; on any other device the models really run.
        dtype: precision of weights and activations.
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
            self._network = build_network(replace(config, published=False)).to(device, dtype).requires_grad_(False)
            model: Any = AutoencoderKLCogVideoX(**vae or {})
            model = nn.Module.to(model, device, dtype)
            self._vae = Vae(model, scaling_factor=PUBLISHED_SCALING)

    def peaks(self, size: str, frames: int, setting: Setting) -> Peaks:
        """Plans one clip of six views, on one of the devices that share it; their messages count too.

        Args:
            size: height and width of the video in pixels, such as "224x400".
            frames: frames of the clip, 8n+1.
            setting: how generation runs.

        Returns:
            The most bytes in memory in each phase.

        Raises:
            UsageError: ``setting.sp`` does not divide the network's heads.
        """
        if self._network.config.heads % setting.sp:
            raise UsageError(
                f"{setting.sp} devices cannot share {self._network.config.heads} heads", "choose a divisor"
            )
        group = _SimulatedGroup(setting.sp) if setting.sp > 1 else None
        parallelize(self._network, sequence_group=group, slice_tokens=setting.slice_tokens)
        self._network.config = replace(self._network.config, depth=min(BLOCKS, self._network.config.depth))
        shape = latent_shape(frames, *parse_size(size))
        network, vae = self._network, self._vae.model
        other = [] if setting.offload else [network, vae]
        with self._tracked([network, *other]) as memory:
            conditions = blank_conditions(
                network.config, frames, slots=setting.slots, cells=setting.map_cells, device=self._device
            )
            states = conditions, conditions.dropped()
            conditional, unconditional = (network.encode(state, shape) for state in states)
            encoding, memory.peak = memory.peak, memory.live
            x = torch.zeros(1, len(VIEWS), network.config.latent_channels, *shape, device=self._device)
            t = torch.zeros(1, device=self._device)
            x = x + 0.1 * guide(network.denoise(x, t, conditional), network.denoise(x, t, unconditional), 2.0)
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
        """Counts memory, starting with the weights of ``models``."""
        memory = LiveMemory(self._device.type)
        for model in models:
            memory.hold([*model.parameters(), *model.buffers()])
        with torch.no_grad(), fused_attention(), memory:
            yield memory


class _SimulatedGroup(RankGroup):
    """One rank of a group without the others: what they would send has the right shape and no contents."""

    def __init__(self, size: int) -> None:
        self.size, self.rank = size, 0

    def all_to_all(self, x: Tensor) -> Tensor:
        return torch.empty_like(x.contiguous())

    def all_gather(self, x: Tensor) -> Tensor:
        return x.new_empty(self.size, *x.shape)


def table_lines(planner: Planner, setting: Setting) -> Iterator[str]:
    """Yields the lines of the table as they are planned, each cell "planned / published" in GiB.

    Args:
        planner: plans the clips.
        setting: how generation runs; ``sp`` is replaced by each of ``SP_SIZES``.

    Yields:
        Two lines of headings, then one line for each clip of ``PUBLISHED``.
    """
    yield "GiB, planned / published (its FAQ, question 2.1). Text features come from their cache: no T5 here."
    heads = ["no sp", *(f"sp={sp}" for sp in SP_SIZES[1:]), "decoding"]
    yield f"{'clip':14}" + "".join(f"{head:>16}" for head in heads)
    for (size, frames), (sampling, decoding) in PUBLISHED.items():
        peaks = [planner.peaks(size, frames, replace(setting, sp=sp)) for sp in SP_SIZES]
        cells = [_cell(max(mine.encoding, mine.sampling), theirs) for mine, theirs in zip(peaks, sampling, strict=True)]
        yield f"{size} {frames:4} " + "".join(f"{cell:>16}" for cell in [*cells, _cell(peaks[0].decoding, decoding)])


def cell_lines(planner: Planner, size: str, frames: int, setting: Setting) -> Iterator[str]:
    """Yields a line for each phase of one clip, in GiB.

    Args:
        planner: plans the clip.
        size: height and width of the video in pixels, such as "224x400".
        frames: frames of the clip, 8n+1.
        setting: how generation runs.

    Yields:
        The lines of encoding, sampling and decoding.
    """
    peaks = planner.peaks(size, frames, setting)
    for name in ("encoding", "sampling", "decoding"):
        yield f"{name:10} {getattr(peaks, name) / GIB:7.2f} GiB"


def _cell(planned: int, published: float | None) -> str:
    return f"{planned / GIB:.2f} / {'> 96' if published is None else f'{published:.2f}'}"
