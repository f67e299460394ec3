"""Attention's kernels: results and gradients are those of the formulas in fp64, at sizes that fill no vector, too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdrive_core.kernels import cpp_ops
from magicdrive_core.kernels.cpp_ops import attend_context, attend_neighbours, attend_packed
from tests.kernels import formulas
from tests.kernels.formulas import assert_as_in_fp64

sizes = st.integers(1, 40)
few = settings(max_examples=25, deadline=None, derandomize=True)


def angles_of(tokens: int, d: int) -> torch.Tensor:
    angles = 6 * torch.rand(tokens, d // 2)
    return torch.stack([angles.cos(), angles.sin()], -1)


@few
@given(st.integers(1, 3), st.integers(1, 4), sizes, st.integers(1, 3), st.integers(1, 20), st.booleans(), st.data())
def test_among_the_tokens_of_a_sequence(
    outer: int, inner: int, tokens: int, heads: int, half: int, rotary: bool, data: st.DataObject
) -> None:
    torch.manual_seed(tokens)
    count, across = data.draw(st.integers(1, tokens)), data.draw(st.booleans())
    packed, norm = torch.randn(outer, inner, tokens, 3, heads, 2 * half), torch.rand(2, 2 * half) + 0.5
    angles = angles_of(tokens, 2 * half) if rotary else None
    if across:  # memory holds the sequences one within the other
        packed = packed.transpose(1, 2).contiguous().transpose(1, 2)
    assert_as_in_fp64(
        lambda packed, norm: attend_packed(packed, norm, count, angles),
        lambda packed, norm: formulas.packed(packed, norm, count, None if angles is None else angles.double()),
        (packed, norm),
    )


@pytest.mark.parametrize(("tokens", "d"), [(350, 64), (700, 72), (1500, 8)])
def test_many_tokens_go_in_blocks(tokens: int, d: int) -> None:
    packed, norm = torch.randn(1, 1, tokens, 3, 2, d), torch.ones(2, d)
    assert_as_in_fp64(
        lambda packed, norm: attend_packed(packed, norm, tokens, None),
        lambda packed, norm: formulas.packed(packed, norm, tokens, None),
        (packed, norm),
    )


def test_the_result_lies_as_the_tokens_do() -> None:
    packed = torch.randn(2, 5, 7, 3, 2, 8)
    assert attend_packed(packed, torch.ones(2, 8), 7, None).is_contiguous()
    across = attend_packed(packed.transpose(1, 2), torch.ones(2, 8), 5, None)
    assert across.transpose(1, 2).is_contiguous()


@few
@given(sizes, st.integers(1, 3), st.integers(1, 20), st.data())
def test_of_views_to_their_neighbours(tokens: int, heads: int, d: int, data: st.DataObject) -> None:
    torch.manual_seed(tokens)
    count = data.draw(st.integers(1, tokens))
    neighbours = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=4, max_size=4))
    packed = torch.randn(2, 4, 3, tokens, 3, heads, d)

    def formula(norm: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        views = packed.unbind(1)
        q, k = ([formulas.normed(view[..., i, :, :], norm[i]) for view in views] for i in range(2))
        pairs = [
            [formulas.attention(q[view], k[other][:, :, :count], views[other][:, :, :count, 2]) for other in others]
            for view, others in enumerate(neighbours)
        ]
        return torch.stack([sum(outs[1:], outs[0]) for outs in pairs], dim=1)

    assert_as_in_fp64(
        lambda norm, packed: attend_neighbours(packed, norm, count, neighbours),
        formula,
        (torch.rand(2, d) + 0.5, packed),
    )


@few
@given(sizes, sizes, st.integers(1, 3), st.integers(1, 20), st.booleans())
def test_to_the_context(tokens: int, length: int, heads: int, d: int, hides: bool) -> None:
    torch.manual_seed(tokens)
    q, kv = torch.randn(3, tokens, heads, d), torch.randn(3, length, 2, heads, d)
    bias = None
    if hides:
        hidden = torch.rand(3, length) < 0.5
        hidden[:, length // 2] = False
        bias = torch.zeros(3, length).masked_fill(hidden, float("-inf"))
    assert_as_in_fp64(
        lambda q, kv: attend_context(q, kv, bias),
        lambda q, kv: formulas.attention(q, *kv.unbind(2), bias),
        (q, kv),
    )


def test_what_is_hidden_has_no_part() -> None:
    q, kv = torch.randn(1, 5, 1, 16), torch.randn(1, 9, 2, 1, 16)
    bias = torch.zeros(1, 9).index_fill(1, torch.tensor([8]), float("-inf"))
    without = attend_context(q, kv, bias)
    kv[:, 8] = 1e6
    assert torch.equal(attend_context(q, kv, bias), without)
    kv.requires_grad_()
    attend_context(q, kv, bias).sum().backward()
    assert not kv.grad[:, 8].any()
    assert attend_context(q, kv.detach(), torch.full((1, 9), float("-inf"))).isnan().all()  # as torch has it


def test_no_sequences_and_no_keys() -> None:
    norm = torch.ones(2, 16)
    assert attend_packed(torch.randn(0, 2, 5, 3, 2, 16), norm, 5, None).shape == (0, 2, 5, 2, 16)
    q = torch.randn(1, 0, 2, 16, requires_grad=True)
    attend_context(q, torch.randn(1, 3, 2, 2, 16), None).sum().backward()
    with pytest.raises(ValueError, match="attention needs at least one key"):
        attend_context(torch.randn(1, 3, 2, 16), torch.randn(1, 0, 2, 2, 16), None)


def test_large_scores_and_nan() -> None:
    q, kv = 1e3 * torch.randn(1, 3, 1, 16), torch.randn(1, 9, 2, 1, 16)
    formulas.close(attend_context(q, kv, None), formulas.attention(q.double(), *kv.double().unbind(2)), 1e-4)
    q[0, 1, 0, 3] = float("nan")
    assert attend_context(q, kv, None).isnan().all(-1).flatten().tolist() == [False, True, False]


def test_any_number_of_threads_gives_one_result() -> None:
    packed, norm = torch.randn(1, 1, 350, 3, 2, 16), torch.ones(2, 16)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(attend_packed(packed, norm, 350, None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_they_are_operations_as_torch_wants_them() -> None:
    packed, norm = torch.randn(2, 3, 4, 3, 2, 8, requires_grad=True), torch.ones(2, 8, requires_grad=True)
    q, kv = torch.randn(2, 4, 2, 8, requires_grad=True), torch.randn(2, 5, 2, 2, 8, requires_grad=True)
    torch.library.opcheck(attend_packed, (packed, norm, 3, angles_of(4, 8)))
    torch.library.opcheck(attend_packed, (packed.transpose(1, 2), norm, 3, None))
    views = torch.randn(1, 2, 3, 4, 3, 2, 8, requires_grad=True)
    torch.library.opcheck(cpp_ops._attend_neighbours, (views, norm, 4, [1, 0]))
    torch.library.opcheck(attend_context, (q, kv, torch.zeros(2, 5)))
