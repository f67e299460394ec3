"""fp16's loss scale: losses are multiplied by it, so that small gradients do not vanish in 16 bits.

It halves when a gradient overflows and doubles after many good steps. ColossalAI's own is not used: it grows its scale
before it divides the gradients of that step by it, and does not save how many good steps there were.
"""

from __future__ import annotations

from dataclasses import dataclass

from colossalai.amp.naive_amp.mixed_precision_mixin import MixedPrecisionMixin
from torch import Tensor

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
