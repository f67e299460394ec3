"""Muon's update is orthogonal, and it finds the minimum of a badly scaled problem."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdrive_core.encoders.small_vae import Muon, orthogonalised


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 1000))
def test_singular_values_come_near_one(rows, columns, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.3, 1.0, min(rows, columns))
    u, _ = torch.linalg.qr(torch.randn(rows, len(spread), generator=generator))
    v, _ = torch.linalg.qr(torch.randn(columns, len(spread), generator=generator))
    values = torch.linalg.svdvals(orthogonalised(u * spread @ v.T))
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(4, 2, 1, 3, 3), (16, 2), (6, 6)])
def test_a_step_has_the_size_of_the_learning_rate_whatever_the_gradients(shape) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    steps = []
    for scale in (1.0, 1e4):
        weight = torch.zeros(shape, requires_grad=True)
        weight.grad = scale * gradient
        Muon([weight], lr=0.1).step()
        steps.append(-weight.detach())
    torch.testing.assert_close(steps[0], steps[1], atol=1e-5, rtol=1e-4)
    rows, columns = steps[0].flatten(1).shape
    expected = 0.1 * max(1.0, rows / columns) ** 0.5
    assert torch.linalg.svdvals(steps[0].flatten(1)).median() == pytest.approx(expected, rel=0.4)
    assert (steps[0] * gradient).sum() > 0  # downhill


def test_it_learns_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 8, generator=generator) * torch.logspace(0, -1, 8)
    target = torch.randn(4, 8, generator=generator)
    weight = torch.zeros(4, 8, requires_grad=True)
    optimizer = Muon([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=100)
    losses = []
    for _ in range(100):
        loss = (inputs @ (weight - target).T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


def test_weights_without_a_gradient_do_not_change() -> None:
    weight = torch.ones(3, 3, requires_grad=True)
    Muon([weight], lr=1.0).step()
    assert weight.eq(1.0).all()
