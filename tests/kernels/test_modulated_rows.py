"""Norms, linear maps and MLPs: results and gradients are those of the formulas in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from magicdrive_core.kernels import cpp_ops
from magicdrive_core.kernels.functions import modulate, modulated_linear, modulated_mlp
from tests.kernels import formulas
from tests.kernels.formulas import assert_as_in_fp64

few = settings(max_examples=25, deadline=None, derandomize=True)
SHAPES = [
    ((2, 1, 3, 5, 32), (1, 3, 1, 32)),
    ((2, 2, 3, 5, 32), (2, 1, 1, 32)),
    ((2, 2, 3, 5, 32), (2, 3, 1, 32)),
    ((1, 1, 1, 301, 48), (1, 1, 1, 48)),
    ((7, 3, 5, 32), (32,)),
    ((3, 16), (3, 16)),
    ((2, 4, 3, 5, 32), (2, 1, 3, 1, 32)),
    ((2, 4, 3, 5, 32), (2, 1, 1, 1, 32)),
    ((2, 4, 3, 5, 32), (1, 1, 3, 1, 32)),
]


def given_for(x: tuple[int, ...], modulation: tuple[int, ...]) -> list[torch.Tensor]:
    # As it comes from a table of several: not contiguous.
    shift, scale = torch.randn(*modulation[:-1], 2, modulation[-1]).unbind(-2)
    return [3 * torch.randn(x) + 1, shift, scale]


@pytest.mark.parametrize(("x", "modulation"), [*SHAPES, ((4, 21), (4, 21)), ((2, 3, 5), (5,))])
def test_norm_and_modulation(x: tuple[int, ...], modulation: tuple[int, ...]) -> None:
    assert_as_in_fp64(modulate, formulas.modulated, given_for(x, modulation))


@pytest.mark.parametrize(("x", "modulation"), SHAPES)
@pytest.mark.parametrize("biased", [True, False])
def test_linear_maps_of_modulated_rows(x: tuple[int, ...], modulation: tuple[int, ...], biased: bool) -> None:
    bias = [torch.randn(80)] if biased else []
    assert_as_in_fp64(
        lambda x, shift, scale, weight, *bias: modulated_linear(x, shift, scale, weight, *(bias or [None])),
        lambda x, shift, scale, weight, *bias: functional.linear(formulas.modulated(x, shift, scale), weight, *bias),
        [*given_for(x, modulation), torch.randn(80, x[-1]), *bias],
    )


@pytest.mark.parametrize(("x", "modulation"), SHAPES)
@pytest.mark.parametrize("hidden", [64, 400])
def test_mlps(x: tuple[int, ...], modulation: tuple[int, ...], hidden: int) -> None:
    width = x[-1]
    maps = torch.randn(hidden, width) / 3, torch.randn(hidden), torch.randn(width, hidden) / 9, torch.randn(width)

    def formula(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, *maps: torch.Tensor) -> torch.Tensor:
        inside = formulas.gelu(functional.linear(formulas.modulated(x, shift, scale), *maps[:2]))
        return functional.linear(inside, *maps[2:])

    assert_as_in_fp64(modulated_mlp, formula, [*given_for(x, modulation), *maps])
    with torch.no_grad():
        assert not cpp_ops.mlp(*given_for(x, modulation), *maps, keep=False)[1].numel()


def test_sizes_that_the_kernels_do_not_know_take_torchs() -> None:
    assert not cpp_ops._serves(torch.empty(24, 32))
    assert_as_in_fp64(
        modulated_linear,
        lambda x, shift, scale, *linear: functional.linear(formulas.modulated(x, shift, scale), *linear),
        [*given_for((4, 20), (20,)), torch.randn(12, 20), torch.randn(12)],
    )


@few
@given(st.integers(1, 70), st.floats(0.1, 60))
def test_gelu_and_its_slope(count: int, spread: float) -> None:
    torch.manual_seed(count)
    x, gradient = spread * torch.randn(count), torch.randn(count)
    exact = x.double().requires_grad_()
    expected = formulas.gelu(exact)
    (slope,) = torch.autograd.grad(expected, exact, gradient.double())
    got = gradient.clone()
    value, got = cpp_ops.gelu_backward(x, got)
    formulas.close(value, expected, 1e-6)
    formulas.close(got, slope, 1e-6)


def test_other_broadcasts_of_a_modulation_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot broadcast a modulation"):
        cpp_ops.modulate(torch.randn(2, 3, 2, 5, 3, 16), *torch.randn(2, 2, 1, 2, 1, 3, 16))


def test_no_rows_at_all() -> None:
    nothing, zero = torch.randn(3, 0, 16), torch.zeros(16)
    maps = torch.randn(32, 16), torch.randn(32), torch.randn(16, 32), torch.randn(16)
    assert cpp_ops.modulate(nothing, zero, zero).shape == (3, 0, 16)
    assert cpp_ops.linear(nothing, zero, zero, *maps[:2]).shape == (3, 0, 32)
    assert cpp_ops.mlp(nothing, zero, zero, *maps, keep=True)[0].shape == (3, 0, 16)
    assert cpp_ops.gelu_backward(nothing, nothing)[0].shape == (3, 0, 16)


def test_nan_stays_in_its_row() -> None:
    x = torch.randn(5, 32)
    x[2, 3] = float("nan")
    out = cpp_ops.linear(x, torch.zeros(32), torch.zeros(32), torch.randn(48, 32), None)
    assert out.isnan().all(-1).tolist() == [False, False, True, False, False]


def test_they_are_operations_as_torch_wants_them() -> None:
    x, shift, scale = (each.requires_grad_() for each in given_for((2, 3, 16), (3, 16)))
    torch.library.opcheck(cpp_ops.modulate, (x, shift, scale))
    modulation = [each.detach() for each in (x, shift, scale)]
    torch.library.opcheck(cpp_ops._linear, (*modulation, torch.randn(32, 16), torch.randn(32)))
    maps = torch.randn(32, 16), torch.randn(32), torch.randn(16, 32), torch.randn(16)
    for keep in (True, False):
        torch.library.opcheck(cpp_ops._mlp, (*modulation, *maps, keep))
    torch.library.opcheck(cpp_ops._gelu_backward, (torch.randn(20), torch.randn(20)))
