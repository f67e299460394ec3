"""The training engine: ColossalAI's ZeRO stage 2 around the network and torch's fused AdamW, on GPUs, NPUs and CPUs.

ZeRO-2 shards gradients, fp32 master weights and Adam's moments over all ranks; the network itself runs in the working
precision on each. Everything that ColossalAI 0.5.0 is made to do differently is in this file
(docs/decisions/0001-environment.md has the choice of ColossalAI):

| override | why | test in tests/training |
| --- | --- | --- |
| ``GlooAccelerator`` | upstream's raises where a GPU synchronises or has streams | all on gloo ranks |
| ``_ZeroPlugin``, ``_sanity_checks`` | use ``ZeroOptimizer``; accept CPUs | all on gloo ranks |
| ``_add_to_bucket``, ``_reduce_grad`` | one order of buckets for all kinds of clips | test_engine: different layers |
| ``_update_partitoned_grad`` | passes add up in fp32; reductions are checked (#6091) | test_engine: fp32; test_guard |
| ``step`` | no weight decay on what no rank used | test_engine: unused parameters |
| ``_compute_grad_norm`` | upstream waits for the device twice in a step | test_accelerator: one synchronisation |
| ``_unscale_and_clip_grads`` | refuse an infinite norm; report it unscaled | test_guard: refuses; test_loss_scale |
| ``LossScale`` | upstream divides by a scale that has grown, and loses its counter | test_loss_scale |
| ``_copy_masters`` | upstream's masters come from weights rounded to bf16 | test_engine: masters start exact |
| ``meta_lib._destroy`` | upstream breaks torch's shapes of meta tensors (PyTorch 1.12) | test_engine: shape functions |
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from colossalai._analyzer._subclasses._meta_registration import meta_lib
from colossalai.accelerator import get_accelerator, set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator
from colossalai.amp.naive_amp.mixed_precision_mixin import MixedPrecisionMixin
from colossalai.booster import Booster
from colossalai.booster.plugin import LowLevelZeroPlugin
from colossalai.booster.plugin.low_level_zero_plugin import LowLevelZeroModel
from colossalai.zero.low_level import LowLevelZeroOptimizer
from torch import Tensor, nn
from torch.nn import functional

from magicdrive_core.config.schema import Training
from magicdrive_core.device import BACKENDS, take_device
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.parallel import control

logger = logging.getLogger(__name__)

meta_lib._destroy()  # at import ColossalAI registers its own shape functions, which torch.compile would use too

REDUCE_BUCKET_MILLIONS = 20  # elements of one reduce-scatter (golden notes, section 5)
MIN_LOSS_SCALE, MAX_LOSS_SCALE = 1.0, 2.0**24
GROWTH_INTERVAL = 1000  # good steps in a row after which the loss scale doubles


@dataclass
class Engine:
    """A network that all ranks train together.

    Attributes:
        network: the bare network in the working precision, on ``device``.
        optimizer: AdamW on this rank's shards of the fp32 master weights.
        device: this rank's device.
        fixed: frozen parameters and buffers by name, as they were before the working precision rounded them.
    """

    network: nn.Module
    optimizer: ZeroOptimizer
    device: torch.device
    fixed: dict[str, Tensor]

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.optimizer.optim.param_groups:
            group["lr"] = rate


def join_group(stall_seconds: float) -> torch.device:
    """Enter the process groups that the launcher described in the environment (``LOCAL_RANK``, ``MASTER_ADDR``, ...).

    Args:
        stall_seconds: time without a finished step after which the launcher ends all ranks.

    Returns:
        This rank's device; the CPU where there are no devices.

    Raises:
        MagicDriveError: this host has fewer devices than ranks.
    """
    device = take_device(int(os.environ["LOCAL_RANK"]))
    if device.type == "cpu" and not isinstance(get_accelerator(), GlooAccelerator):
        set_accelerator(GlooAccelerator())
    control.join(stall_seconds)
    return device


def build_engine(network: nn.Module, training: Training, device: torch.device, order: Sequence[str]) -> Engine:
    """Move the network to the device and precision, and shard gradients, masters and moments over all ranks.

    Args:
        network: in fp32 and equal on all ranks; parameters that do not require a gradient stay as they are.
        training: precision, AdamW's settings, clipping, overlap of communication.
        device: this rank's device, as ``join_group`` returned it.
        order: names of the trainable parameters in the order in which their gradients arrive, the same on all ranks
            (``parallel/gradient_order.py``).

    Returns:
        The engine. Its learning rate is 0 until ``set_learning_rate`` is called.
    """
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    fixed = {name: tensor.clone() for name, tensor in network.state_dict().items() if name not in trained}
    exact = {name: parameter.data for name, parameter in trained.items()}  # the cast to bf16 makes new tensors
    adamw = torch.optim.AdamW(
        [trained[name] for name in order],  # ``ZeroOptimizer`` takes the order of reductions from here
        lr=0.0,  # set before each step
        betas=training.betas,
        eps=training.eps,
        weight_decay=training.weight_decay,
        fused=True,
    )
    overlap = training.overlap_communication and device.type != "cpu"
    if overlap != training.overlap_communication:
        logger.warning("training.overlap_communication needs a device with streams: ignored on a CPU")
    plugin = _ZeroPlugin(
        stage=2,
        precision=training.precision,
        max_norm=training.max_grad_norm,
        reduce_bucket_size_in_m=REDUCE_BUCKET_MILLIONS,
        overlap_communication=overlap,
        cast_inputs=False,  # positions, poses and time lose their meaning in bf16
    )
    model, zero, *_ = Booster(plugin=plugin).boost(network, adamw)
    zero.names = list(order)
    _copy_masters(zero, [(trained[name], weight) for name, weight in exact.items()])
    return Engine(model.unwrap(), zero, device, fixed)


@torch.no_grad()
def _copy_masters(zero: ZeroOptimizer, weights: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Fill this rank's master weights from pairs (working parameter, its exact fp32 weight)."""
    masters = zero.get_working_to_master_map()
    for parameter, weight in weights:
        padded = functional.pad(weight.flatten(), (0, zero.get_param_padding_size(parameter)))
        masters[id(parameter)].copy_(padded.chunk(dist.get_world_size())[dist.get_rank()])


@dataclass
class LossScale(MixedPrecisionMixin):
    """fp16's loss scale: losses are multiplied by it, so that small gradients do not vanish in 16 bits.

    It halves when a gradient overflows and doubles after ``GROWTH_INTERVAL`` good steps. Whether a step overflowed is
    decided by the guard (guard.py), for all ranks together.

    Attributes:
        scale: factor of the losses, the same on all ranks.
        good: good steps since the scale changed or a gradient overflowed.
    """

    scale: float = 2.0**16
    good: int = 0

    def grow(self) -> None:
        """Count a good step, and double the scale after enough of them."""
        self.good += 1
        if self.good == GROWTH_INTERVAL:
            self.scale, self.good = min(MAX_LOSS_SCALE, 2 * self.scale), 0

    def back_off(self) -> None:
        """Halve the scale after a step whose gradients overflowed."""
        self.scale, self.good = max(MIN_LOSS_SCALE, self.scale / 2), 0

    @property
    def at_minimum(self) -> bool:
        """Whether the scale cannot be lowered: a gradient that overflows now has another cause."""
        return self.scale <= MIN_LOSS_SCALE

    def pre_backward(self, loss: Tensor) -> Tensor:
        """Scale a loss before its backward pass.

        Args:
            loss: (), unscaled.

        Returns:
            (), the loss times ``scale``.
        """
        return loss * self.scale

    def pre_backward_by_grad(self, tensor: Tensor, grad: Tensor) -> Tensor:
        """Refuse a backward pass that starts from a gradient; part of ColossalAI's interface.

        Args:
            tensor: result from which the pass would start.
            grad: its gradient.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("training starts backward passes from a loss")

    def should_skip_step(self) -> bool:
        """Return False: the loop does not call ``step`` for a step that is to be skipped."""
        return False

    def pre_zero_grad(self) -> None:
        """Do nothing; part of ColossalAI's interface."""

    def get_grad_div_scale(self) -> float:
        """Return the factor by which gradients have to be divided: the scale."""
        return self.scale


@dataclass(frozen=True)
class GradientCheck:
    """The gradients of a step, as one rank saw them.

    Attributes:
        faulty: names of parameters whose gradient from this rank's own clips is not finite, in reduction order.
        received_finite: whether all sums that this rank received from the reductions are finite.
        norm: of the gradient of all ranks, before clipping; with fp16's loss scale in it.
    """

    faulty: list[str]
    received_finite: bool
    norm: float


class ZeroOptimizer(LowLevelZeroOptimizer):
    """ZeRO-2 for ranks that may each train on clips of different lengths.

    Upstream puts gradients into reduce-scatter buckets in the order in which the backward pass produces them. That
    order, and which parameters take part at all, can differ between a rank with images and one with videos; their
    buckets would then hold different parameters. Here each rank fills its buckets in one fixed order, with zeros for a
    parameter that its own clips did not use. A gradient waits until all before it in the order have arrived, so the
    order has to be close to that of arrival (``parallel/gradient_order.py``).

    It also detects ColossalAI #6091, NaN that appear on 64 and more GPUs with communication overlap: every gradient is
    checked before it enters a reduction, and every shard that comes out, so that ``read_passes`` tells faults of this
    rank from faults that it received. The cause of #6091 is not known. With overlap, the host waits for each bucket's
    result as the known workaround does, which takes back most of what overlap gains; without, which is the default,
    the host waits once in a step: in ``read_passes``.

    Several backward passes before a step add up. Gradients travel in the working precision and are added in fp32.

    Args:
        optimizer: torch's optimizer over the parameters in the working precision, in the order of their reductions.
        **settings: arguments of ``LowLevelZeroOptimizer``, as ColossalAI's plugin makes them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, **settings: Any) -> None:
        super().__init__(optimizer, **settings)
        self._order = [(p, group) for group, ps in self._working_param_groups.items() for p in ps]
        self._position = {id(p): index for index, (p, _) in enumerate(self._order)}
        self.names = [""] * len(self._order)  # of the parameters in ``_order``, for messages
        self._own: list[tuple[int, Tensor]] = []  # position in the order and extremes of each own gradient
        self._received: list[Tensor] = []  # extremes of each shard that came out of a reduction
        self._used = [False] * len(self._order)  # by this rank's clips since ``zero_grad``
        self._norm: float | None = None  # of the gradients since ``zero_grad``, once it was read
        self.loss_scale = LossScale() if self._dtype is torch.float16 else None
        if self.loss_scale is not None:
            self.mixed_precision_mixin = self.loss_scale
        self._start_pass()

    def _start_pass(self) -> None:
        self._arrived = [False] * len(self._order)
        self._next = 0

    def _sanity_checks(self) -> None:
        for group in self.optim.param_groups:
            for parameter in group["params"]:
                assert parameter.dtype == self._dtype, (parameter.dtype, self._dtype)

    def _add_to_bucket(self, param: Tensor, group_id: int) -> None:  # noqa: ARG002
        """Note that a gradient has arrived, and fill the bucket as far as the fixed order allows."""
        self._arrived[self._position[id(param)]] = True
        while self._next < len(self._order) and self._arrived[self._next]:
            self._bucket_next()

    def _bucket_next(self) -> None:
        parameter, group = self._order[self._next]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        self._own.append((self._next, _extremes(parameter.grad)))
        super()._add_to_bucket(parameter, group)
        self._next += 1

    def _update_partitoned_grad(  # upstream's spelling
        self, bucket_store: Any, origin_grad_list: list[Tensor], flat_grad: Tensor, group_id: int, partition_num: int
    ) -> None:
        """Check the shard of a reduction, and add it in fp32 to that of earlier passes."""
        self._received.append(_extremes(flat_grad))
        if self._overlap_communication:
            self._received[-1].tolist()  # synchronises, see the class
        super()._update_partitoned_grad(bucket_store, origin_grad_list, flat_grad.float(), group_id, partition_num)

    def _reduce_grad(self, partition_grad: bool) -> None:
        """End a backward pass: bucket what no gradient arrived for, and reduce the last bucket."""
        while self._next < len(self._order):
            self._bucket_next()
        super()._reduce_grad(partition_grad)
        self._used = [before or now for before, now in zip(self._used, self._arrived, strict=True)]
        self._start_pass()

    def step(self, closure: Any = None) -> None:
        """Update the weights, except of parameters that no rank used in any pass. Collective.

        Args:
            closure: passed to upstream's ``step``, which accepts None only.

        Raises:
            MagicDriveError: the norm of the gradient is not finite; no weight was changed.
        """
        if self._norm is None:
            self.read_passes([])
        for (parameter, group), used in zip(self._order, control.any_rank(self._used), strict=True):
            if not used:
                store = self.pid_to_grad_store[id(parameter)]
                store._grads_of_params[group].pop(id(parameter))
        super().step(closure)
        if self.loss_scale is not None:
            self.loss_scale.grow()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients and what was found in them.

        Args:
            set_to_none: whether working gradients become None instead of zeros, as in torch.
        """
        super().zero_grad(set_to_none)
        self._own.clear()
        self._received.clear()
        self._used = [False] * len(self._order)
        self._norm = None

    def read_passes(self, losses: Sequence[Tensor]) -> tuple[list[list[float]], GradientCheck]:
        """Read from the device what the host needs of a step's passes: its one synchronisation. Collective.

        Called after the last backward pass of a step and before ``step``.

        Args:
            losses: (B) of each pass.

        Returns:
            For each pass the mean of its losses, then the losses; and the check of the gradients since ``zero_grad``.
        """
        shards = [shard for store in self.pg_to_grad_store.values() for shard in store.get_working_grads_by_group_id(0)]
        squares = torch.stack(torch._foreach_norm(shards, 2, dtype=torch.float64)).square().sum()[None]
        dist.all_reduce(squares)
        finite = torch.stack([extremes for _, extremes in self._own]).isfinite().all(dim=1)
        received = torch.stack(self._received).isfinite().all()[None]
        passes = [torch.cat([each.detach().mean()[None], each.detach()]) for each in losses]
        parts = [squares, received, finite, *passes]
        values = iter(read_from_device(torch.cat([part.double() for part in parts])))
        (square,), (received_finite,), own, *read = (list(islice(values, len(part))) for part in parts)
        faulty = {index for (index, _), good in zip(self._own, own, strict=True) if not good}
        self._norm = math.sqrt(square)
        return read, GradientCheck([self.names[index] for index in sorted(faulty)], bool(received_finite), self._norm)

    def _compute_grad_norm(self, *_: Any, **__: Any) -> float:
        assert self._norm is not None  # ``step`` has read it
        return self._norm

    def _unscale_and_clip_grads(self, grad_groups_flat: list[Tensor], total_norm: float) -> None:
        # Not finite: ``read_passes`` was ignored, or finite gradients overflow in their norm.
        if not math.isfinite(total_norm):
            raise MagicDriveError("the norm of the gradient is not finite", "lower the learning rate")
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        self._current_grad_norm = total_norm / scale
        divisor = scale * max(1.0, (self._current_grad_norm + 1e-6) / self._clip_grad_norm)
        torch._foreach_mul_(grad_groups_flat, 1.0 / divisor)


def read_from_device(values: Tensor) -> list[float]:
    """Read numbers from the device; the host waits until it has computed them.

    Args:
        values: (n).
    """
    return values.tolist()


def _extremes(gradient: Tensor) -> Tensor:
    """Return (2): the smallest and the largest element, both finite only where all are; one pass, not four."""
    return torch.stack(torch.aminmax(gradient))


class _ZeroPlugin(LowLevelZeroPlugin):
    """LowLevelZeroPlugin that also runs on CPUs and uses ``ZeroOptimizer``."""

    def supported_devices(self) -> list[str]:
        return list(BACKENDS)

    def configure(
        self,
        model: nn.Module,
        optimizer: Any = None,
        criterion: Any = None,
        dataloader: Any = None,
        lr_scheduler: Any = None,
    ) -> tuple[Any, Any, Any, Any, Any]:
        wrapped = LowLevelZeroModel(model, self.precision, cast_inputs=self.cast_inputs)
        zero = ZeroOptimizer(optimizer, **self.zero_optim_kwargs, backward_context=wrapped._hook_context)
        wrapped.update_master_params = MethodType(zero.update_master_params, wrapped)
        return wrapped, zero, criterion, dataloader, lr_scheduler


class _NullStream:
    def wait_stream(self, other: object) -> None: ...
    def synchronize(self) -> None: ...


class GlooAccelerator(CpuAccelerator):
    """A CPU as ColossalAI's accelerator: there is nothing to synchronise with, and one stream that does nothing."""

    def synchronize(self, *_: Any) -> None:
        """Do nothing: a CPU has computed already."""

    def device_count(self) -> int:
        """Return 1: all CPUs are one device."""
        return 1

    def Stream(self, *_: Any, **__: Any) -> _NullStream:  # noqa: N802
        """Return a stream that does nothing."""
        return _NullStream()

    def current_stream(self, *_: Any) -> _NullStream:
        """Return a stream that does nothing."""
        return _NullStream()

    def stream(self, *_: Any) -> AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return nullcontext()
