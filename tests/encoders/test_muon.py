"""Muon's update is orthogonal, and it finds the minimum of a badly scaled problem."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdrive_core.encoders.muon import Muon, orthogonalised


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


def test_it_learns_a_linear_map_with_scales_far_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -1, 8)  # the gradient's singular values lie 100 apart
    inputs = torch.randn(256, 8, generator=generator) * scales
    target = torch.randn(4, 8, generator=generator)
    weight = torch.zeros(4, 8, requires_grad=True)
    optimizer = Muon([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=150)
    for _ in range(150):
        loss = (inputs @ (weight - target).T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert weight.detach().sub(target).abs().max().item() == pytest.approx(0.0, abs=0.3)


def test_weights_without_a_gradient_stay() -> None:
    weight = torch.ones(3, 3, requires_grad=True)
    Muon([weight], lr=1.0).step()
    assert weight.eq(1.0).all()
