"""fp16's loss scale: losses are multiplied by it, so that small gradients do not vanish in 16 bits.

It halves when a gradient overflows and doubles after many good steps. ColossalAI's own is not used: it grows its scale
before it divides the gradients of that step by it, and does not save how many good steps there were.
"""

from __future__ import annotations

import logging
import math
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator, set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator
from colossalai.amp.naive_amp.mixed_precision_mixin import MixedPrecisionMixin
from colossalai.booster import Booster
from colossalai.booster.plugin import LowLevelZeroPlugin
from colossalai.booster.plugin.low_level_zero_plugin import LowLevelZeroModel
from colossalai.kernel.extensions.base_extension import _Extension
from colossalai.kernel.kernel_loader import CPUAdamLoader
from colossalai.nn.optimizer import HybridAdam
from colossalai.zero.low_level import LowLevelZeroOptimizer
from torch import Tensor, nn

from magicdrive_core.config.schema import Training
from magicdrive_core.device import BACKENDS, backend, take_device
from magicdrive_core.errors import MagicDriveError

LEAST, MOST = 1.0, 2.0**24
GROWTH_INTERVAL = 1000  # good steps in a row


@dataclass
class LossScale(MixedPrecisionMixin):
    """Where the optimizer asks for it; whether a step overflowed is the guard's question (guard.py).

    Attributes:
        scale: of the losses, the same on all ranks.
        good: steps since it changed or a gradient overflowed.
    """

    scale: float = 2.0**16
    good: int = 0

    def grow(self) -> None:
        """After a good step."""
        self.good += 1
        if self.good == GROWTH_INTERVAL:
            self.scale, self.good = min(MOST, 2 * self.scale), 0

    def back_off(self) -> None:
        """After a step whose gradients overflowed."""
        self.scale, self.good = max(LEAST, self.scale / 2), 0

    @property
    def least(self) -> bool:
        """Whether it cannot be lower: what is not finite now is no matter of the scale."""
        return self.scale <= LEAST

    def pre_backward(self, loss: Tensor) -> Tensor:
        return loss * self.scale

    def pre_backward_by_grad(self, tensor: Tensor, grad: Tensor) -> Tensor:
        raise NotImplementedError("training starts backward passes from a loss")

    def should_skip_step(self) -> bool:
        return False  # the loop does not call for a step that is to be skipped

    def pre_zero_grad(self) -> None: ...

    def get_grad_div_scale(self) -> float:
        return self.scale


# How the network is trained on many devices: ColossalAI's Booster with ZeRO stage 2, on GPUs, NPUs and CPUs.
#
# ColossalAI 0.5.0 has every part of this path but three that a CPU needs: an accelerator without streams, an Adam
# kernel that needs no compiler, and an optimizer that accepts the device. They are added here through its extension
# points, so that tests and the demo run what a cluster runs (docs/decisions/0001-environment.md).

REDUCE_BUCKET_MILLIONS = 20  # elements a reduce-scatter (golden notes, section 5)


class _NullStream:
    def wait_stream(self, other: object) -> None: ...
    def synchronize(self) -> None: ...


class _GlooAccelerator(CpuAccelerator):
    """The stock accelerator raises wherever a GPU would synchronise; on a CPU there is nothing to wait for."""

    def synchronize(self, *_: Any) -> None: ...

    def device_count(self) -> int:
        return 1

    def Stream(self, *_: Any, **__: Any) -> _NullStream:  # noqa: N802
        return _NullStream()

    def current_stream(self, *_: Any) -> _NullStream:
        return _NullStream()

    def stream(self, *_: Any) -> AbstractContextManager[None]:
        return nullcontext()


class _TorchAdam:
    """Colossalai's interface to a compiled Adam step, computed by torch's fused CPU kernel."""

    def __init__(self, *settings: Any) -> None:
        *_, self.decoupled = settings  # lr, beta1, beta2, eps, weight decay, AdamW instead of Adam

    @torch.no_grad()
    def step(
        self,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        bias_correction: bool,
        parameter: Tensor,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
        scale: float = -1.0,
    ) -> None:
        assert bias_correction, "torch's kernel always corrects the bias"
        kernel = torch._fused_adamw_ if self.decoupled else torch._fused_adam_
        kernel(
            [parameter],
            [gradient / scale if scale > 0 else gradient],
            [mean],
            [square],
            [],
            [torch.tensor(float(step))],
            lr=float(lr),
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )


class _TorchAdamExtension(_Extension):
    class _Kernel:
        CPUAdamOptimizer = _TorchAdam

    def __init__(self) -> None:
        super().__init__("torch_cpu_adam", support_aot=False, support_jit=False)

    def is_available(self) -> bool:
        return True

    def assert_compatible(self) -> None: ...

    def build_aot(self) -> None:
        raise NotImplementedError

    def build_jit(self) -> None:
        raise NotImplementedError

    def load(self) -> type[_Kernel]:
        return self._Kernel


@dataclass(frozen=True)
class GradientCheck:
    """What one rank found in the gradients of a pass."""

    faulty: list[str]  # parameters whose own gradient is not finite, in the order of the backward pass
    received_finite: bool  # what came out of the reductions over the ranks


class ZeroOptimizer(LowLevelZeroOptimizer):
    """ZeRO-2 for ranks that may each train on clips of another length.

    Upstream puts gradients into reduce-scatter buckets in the order in which the backward pass makes them. That order,
    and which parameters take part at all, can differ between a rank with pictures and one with videos; their buckets
    would then hold different parameters. Here each rank fills its buckets in one fixed order, with zeros for a
    parameter that its own clips did not use. Parameters that no rank used are left alone by the optimizer.

    It is also the guard against ColossalAI #6091, NaN that appear on 64 and more GPUs with communication overlap: every
    gradient is looked at before it enters a reduction, and every shard that comes out, so that ``check_gradients``
    tells what this rank made from what it received. What causes #6091 is not known. With overlap, the host here waits
    for each bucket's result as the known workaround does, which takes back most of what overlap gains; without, which
    is the default, a pass is looked at once, at its end.

    Several passes before a step add up. Gradients travel in the working precision, and are added in fp32.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, **settings: Any) -> None:
        super().__init__(optimizer, **settings)
        # Backward passes reach the last layers first: close to the order of arrival, so that little waits.
        self._order = [(p, group) for group, ps in self._working_param_groups.items() for p in reversed(ps)]
        self._position = {id(p): index for index, (p, _) in enumerate(self._order)}
        self.names = [""] * len(self._order)  # of these parameters, for messages
        self._own: list[tuple[int, Tensor]] = []  # by that order, extremes of this rank's own gradients, pass by pass
        self._received: list[Tensor] = []  # of each shard that came out of a reduction: likewise
        self._used = [False] * len(self._order)  # by this rank since ``zero_grad``
        self.loss_scale = LossScale() if self._dtype is torch.float16 else None
        if self.loss_scale is not None:
            self.mixed_precision_mixin = self.loss_scale
        self._start_pass()

    def _start_pass(self) -> None:
        self._arrived = [False] * len(self._order)
        self._next = 0

    def _sanity_checks(self) -> None:
        """Upstream's, without its refusal of CPUs."""
        for group in self.optim.param_groups:
            for parameter in group["params"]:
                assert parameter.dtype == self._dtype, (parameter.dtype, self._dtype)

    def _add_to_bucket(self, param: Tensor, group_id: int) -> None:  # noqa: ARG002
        """A gradient has arrived: what is next in the fixed order goes into the bucket."""
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

    def _update_partitoned_grad(
        self, bucket_store: Any, origin_grad_list: list[Tensor], flat_grad: Tensor, group_id: int, partition_num: int
    ) -> None:
        """Upstream's (and its spelling) in fp32, after a look at the shard that a reduction gave this rank."""
        self._received.append(_extremes(flat_grad))
        if self._overlap_communication:
            self._received[-1].tolist()  # waits
        super()._update_partitoned_grad(bucket_store, origin_grad_list, flat_grad.float(), group_id, partition_num)

    def _reduce_grad(self, partition_grad: bool) -> None:
        while self._next < len(self._order):
            self._bucket_next()
        super()._reduce_grad(partition_grad)
        self._used = [before or now for before, now in zip(self._used, self._arrived, strict=True)]
        self._start_pass()

    def step(self, closure: Any = None) -> None:
        """Upstream's, which leaves alone what has no gradient: here, what no rank used in any pass. Collective."""
        used = torch.tensor(self._used, dtype=torch.uint8, device=get_accelerator().get_current_device())
        dist.all_reduce(used, op=dist.ReduceOp.MAX)
        for (parameter, group), by_any in zip(self._order, used.tolist(), strict=True):
            if not by_any:
                store = self.pid_to_grad_store[id(parameter)]
                store._grads_of_params[group].pop(id(parameter))
        super().step(closure)
        if self.loss_scale is not None:
            self.loss_scale.grow()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients."""
        super().zero_grad(set_to_none)
        self._own.clear()
        self._received.clear()
        self._used = [False] * len(self._order)

    def check_gradients(self) -> GradientCheck:
        """What is not finite in the gradients since ``zero_grad``, as this rank saw them. Waits for the device."""
        finite = torch.stack([extremes for _, extremes in self._own]).isfinite().all(dim=1).tolist()
        wrong = {index for (index, _), good in zip(self._own, finite, strict=True) if not good}
        received = bool(torch.stack(self._received).isfinite().all())
        return GradientCheck([self.names[index] for index in sorted(wrong)], received)

    def _unscale_and_clip_grads(self, grad_groups_flat: list[Tensor], total_norm: float) -> None:
        """Upstream's, unless the norm over all ranks is not finite: then it raises, before any weight is touched."""
        if not math.isfinite(total_norm):  # ``check_gradients`` was not heeded, or finite gradients overflow together
            raise MagicDriveError("the norm of the gradient is not finite", "lower the learning rate")
        if self.loss_scale is not None:
            self._current_grad_norm = total_norm / self.loss_scale.scale  # upstream reports that of the scaled ones
        super()._unscale_and_clip_grads(grad_groups_flat, total_norm)


def _extremes(gradient: Tensor) -> Tensor:
    """(2): the least and the greatest element, both finite only where all are. One pass; ``isfinite`` takes four."""
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


@dataclass
class Engine:
    """A network ready to be trained by all ranks."""

    network: nn.Module  # the bare network, in the working precision, on ``device``
    optimizer: ZeroOptimizer
    device: torch.device
    fixed: dict[str, Tensor]  # frozen parameters and buffers as they were before the working precision rounded them

    def set_learning_rate(self, rate: float) -> None:
        """Of the next step."""
        for group in self.optimizer.optim.param_groups:
            group["lr"] = rate


def join_group() -> torch.device:
    """Enters the process group that torchrun started, and returns this rank's device."""
    device = take_device(int(os.environ["LOCAL_RANK"]))
    if device.type == "cpu" and not isinstance(get_accelerator(), _GlooAccelerator):
        set_accelerator(_GlooAccelerator())
    if _TorchAdamExtension not in CPUAdamLoader.REGISTRY:
        CPUAdamLoader.REGISTRY = [_TorchAdamExtension]
    dist.init_process_group(backend())
    return device


def build_engine(network: nn.Module, training: Training, device: torch.device) -> Engine:
    """Moves the network to the device and precision, and shards gradients, masters and moments over all ranks."""
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    fixed = {name: tensor.clone() for name, tensor in network.state_dict().items() if name not in trained}
    optimizer = HybridAdam(
        list(trained.values()),
        lr=0.0,  # set before each step
        betas=training.betas,
        eps=training.eps,
        weight_decay=training.weight_decay,
        adamw_mode=True,
    )
    overlap = training.overlap_communication and device.type != "cpu"
    if overlap != training.overlap_communication:
        logging.getLogger(__name__).warning("training.overlap_communication is for devices with streams: left off")
    plugin = _ZeroPlugin(
        stage=2,
        precision=training.precision,
        max_norm=training.max_grad_norm,
        reduce_bucket_size_in_m=REDUCE_BUCKET_MILLIONS,
        overlap_communication=overlap,
        cast_inputs=False,  # positions, poses and time lose their meaning in bf16
    )
    model, zero, *_ = Booster(plugin=plugin).boost(network, optimizer)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    zero.names = [names[id(parameter)] for parameter, _ in zero._order]
    return Engine(model.unwrap(), zero, device, fixed)
