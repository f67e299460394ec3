"""The scheduler against the published system's figures (golden_scheduler.npz), and against closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from magicdrive_core.diffusion.guidance import guide
from magicdrive_core.diffusion.rectified_flow import RectifiedFlow, VideoShape, restore_conditioning_frames
from magicdrive_core.diffusion.solvers import EulerSolver
from tests.golden.sets import read_arrays

Golden = dict[str, Tensor]


@pytest.fixture(scope="module")
def golden(golden_set: Path) -> Golden:
    arrays = read_arrays(golden_set / "golden_scheduler.npz")
    return {name: torch.from_numpy(array) for name, array in arrays.items() if "meta" not in name}


def shapes(golden: Golden) -> list[VideoShape]:
    return [(frames, height, width) for height, width, frames in golden["transform/shapes_hwf"].tolist()]


@pytest.mark.parametrize("style", ["cog_style", "not_cog_style"])
def test_shift_equals_the_published_transform(golden: Golden, style: str) -> None:
    flow = RectifiedFlow(latent_frames=style == "cog_style")
    for shape, expected in zip(shapes(golden), golden[f"transform/t_out_{style}"], strict=True):
        if expected.isnan().any():
            with pytest.raises(ValueError, match="frames count as none"):
                flow.shift(golden["transform/t_in"], shape)
        else:
            assert torch.equal(flow.shift(golden["transform/t_in"], shape), expected)


def test_sizes_in_fp32_differ_from_the_published_bf16_ones(golden: Golden) -> None:
    exact = torch.stack([RectifiedFlow().shift(golden["transform/t_in"], shape) for shape in shapes(golden)])
    rounded = golden["transform/t_out_cog_style_bf16_size_inputs"]
    assert 1.0 < (exact - rounded).abs().max() < 2.0


def test_sampling_times_equal_the_published_ones(golden: Golden) -> None:
    for shape, expected in zip(shapes(golden), golden["infer/timesteps_30"], strict=True):
        assert torch.equal(RectifiedFlow().timesteps(30, shape), expected)


def test_training_draws_equal_the_published_ones(golden: Golden) -> None:
    unit = (1, 512, 512)
    t = RectifiedFlow().draw_timesteps(torch.Generator().manual_seed(7), 64, unit)
    torch.testing.assert_close(t / 1000, golden["train/logit_normal_seed7_t01"])
    many = RectifiedFlow().draw_timesteps(torch.Generator().manual_seed(1), 200_000, unit).double() / 1000
    quantiles = torch.quantile(many, golden["train/quantile_levels"])
    torch.testing.assert_close(quantiles, golden["train/logit_normal_quantiles_t01"], rtol=0, atol=5e-3)


def fake_network(golden: Golden, x: Tensor, t: Tensor) -> Tensor:
    a, b = golden["fake/a_b"].tolist()
    return a * x + b * t.view(-1, *[1] * (x.ndim - 1)) / 1000


def test_loss_equals_the_published_one(golden: Golden) -> None:
    x_0, noise, t, mask = (golden[f"loss/{name}"] for name in ("x_start", "noise", "t", "mask"))
    x_t = RectifiedFlow.add_noise(x_0, noise, t)
    torch.testing.assert_close(x_t, golden["loss/x_t"])
    torch.testing.assert_close(RectifiedFlow.loss(fake_network(golden, x_t, t), x_0, noise), golden["loss/loss_nomask"])
    partly = restore_conditioning_frames(x_t, x_0, mask)
    torch.testing.assert_close(partly, golden["loss/model_input_mask"])
    torch.testing.assert_close(
        RectifiedFlow.loss(fake_network(golden, partly, t), x_0, noise, mask), golden["loss/loss_mask"]
    )


def test_a_training_draw_equals_the_published_one(golden: Golden) -> None:
    generator = torch.Generator().manual_seed(77)
    x_0 = golden["loss/x_start"]
    t = RectifiedFlow().draw_timesteps(generator, 3, (17, 848, 1600))
    noise = torch.randn(x_0.shape, generator=generator)
    assert torch.equal(t, golden["loss/seed77_t"])
    torch.testing.assert_close(noise, golden["loss/seed77_noise"])
    x_t = RectifiedFlow.add_noise(x_0, noise, t)
    torch.testing.assert_close(RectifiedFlow.loss(fake_network(golden, x_t, t), x_0, noise), golden["loss/seed77_loss"])


VARIANTS = ["rflow", "rflow_map0", "rflow_slice", "rflow_slice_neg_prompt", "rflow_mask", "rflow_slice_mask"]


@pytest.mark.parametrize("variant", [*VARIANTS, "rflow_no_transform_cfg1"])
def test_sampler_equals_the_published_trace(golden: Golden, variant: str) -> None:
    """Every call's time and mask, its input and output where the set holds them, and the result.

    The fake network's condition terms come from the file.
    """
    prefix = f"sample/{variant}/"
    sliced = "slice" in variant
    calls = iter(range(100))
    z = golden["sample/in/z"]
    batch = len(z)

    def term(call: int, row: slice) -> Tensor:
        weights = {"y": 0.9, "maps": 0.5, "bm": 0.25, "cams": 0.01, "rel": 0.01}
        total = sum(weight * golden[f"{prefix}mean_{name}"][call, row] for name, weight in weights.items())
        return total.view(-1, 1, 1, 1, 1)  # type: ignore[union-attr]

    def once(call: int, row: slice, x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        if prefix + "x" in golden:
            torch.testing.assert_close(x, golden[prefix + "x"][call, row], rtol=1e-5, atol=1e-5)
        assert torch.equal(t, golden[prefix + "t"][call, row])
        v = fake_network(golden, x, t) + term(call, row)
        if x_mask is not None:
            assert torch.equal(x_mask, golden[prefix + "x_mask"][call, row])
            v = v + 0.1 * ~x_mask[:, None, :, None, None]
        if prefix + "v" in golden:
            torch.testing.assert_close(v, golden[prefix + "v"][call, row], rtol=1e-5, atol=1e-5)
        return v

    def velocity(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        first = next(calls)
        if sliced:
            rows = (first, slice(None)), (next(calls), slice(None))
        else:
            rows = (first, slice(batch)), (first, slice(batch, None))
        cond, null = (once(call, row, x, t, x_mask) for call, row in rows)
        return guide(cond, null, 1.0 if variant.endswith("cfg1") else 2.0)

    steps = len(golden[prefix + "t"]) // (2 if sliced else 1)
    if variant == "rflow_no_transform_cfg1":
        timesteps = RectifiedFlow().timesteps(steps, (1, 512, 512))
    else:
        timesteps = RectifiedFlow().timesteps(steps, (17, 848, 1600))
    if variant.endswith("mask"):
        drawn = iter(golden["sample/rflow_mask/noise_drawn"])  # both variants drew it from one seed
        out = EulerSolver(timesteps).sample(
            velocity, z, x_0=z, edit=golden["sample/edit_mask"], draw_noise=lambda x: next(drawn)
        )
    else:
        out = EulerSolver(timesteps).sample(velocity, z)
    torch.testing.assert_close(out, golden[prefix + "z_final"], rtol=1e-5, atol=2e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([1, 17, 33]))
def test_the_true_velocity_leads_back_to_the_data(steps: int, seed: int, frames: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_0, noise = torch.randn(2, 2, 3, 4, 2, 2, 2, generator=generator).unbind(0)
    timesteps = RectifiedFlow().timesteps(steps, (frames, 224, 400))
    out = EulerSolver(timesteps).sample(lambda x, t, mask: x_0 - noise, noise)
    torch.testing.assert_close(out, x_0, rtol=0, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.booleans(), min_size=4, max_size=4), st.integers(0, 2**31))
def test_conditioning_frames_come_out_unchanged(kept: list[bool], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_0, noise = torch.randn(2, 1, 3, 4, 2, 2, generator=generator).unbind(0)
    edit = 1.0 - torch.tensor([kept]).float()
    timesteps = RectifiedFlow().timesteps(3, (17, 224, 400))
    out = EulerSolver(timesteps).sample(lambda x, t, mask: torch.ones_like(x), noise, x_0=x_0, edit=edit)
    for frame, keep in enumerate(kept):
        assert torch.equal(out[:, :, frame], x_0[:, :, frame]) == keep


@given(st.floats(0, 1000), st.floats(0, 1000), st.sampled_from([(1, 224, 400), (241, 848, 1600)]))
def test_shift_keeps_order_and_ends(a: float, b: float, shape: tuple[int, int, int]) -> None:
    low, high = RectifiedFlow().shift(torch.tensor(sorted((a, b))), shape)
    assert low <= high
    ends = RectifiedFlow().shift(torch.tensor([0.0, 1000.0]), shape)
    torch.testing.assert_close(ends, torch.tensor([0.0, 1000.0]))


def test_the_base_size_keeps_its_noise_levels() -> None:
    flow, t = RectifiedFlow(base_pixels=112 * 200), torch.linspace(0, 1000, 9)
    torch.testing.assert_close(flow.shift(t, (1, 112, 200)), t)
    torch.testing.assert_close(flow.shift(t, (17, 112, 200)), RectifiedFlow().shift(t, (17, 512, 512)))
    assert (flow.shift(t, (1, 224, 400))[1:-1] > t[1:-1]).all()


def test_a_sample_without_noisy_frames_has_no_loss() -> None:
    x = torch.ones(1, 2, 3, 4, 4)
    assert RectifiedFlow.loss(x, x, x, torch.zeros(1, 3, dtype=torch.bool)).item() == 0.0


def test_the_network_is_read_in_fp32() -> None:
    x = torch.zeros(1, 2, 1, 2, 2)
    assert RectifiedFlow.loss(x.bfloat16(), x, x).dtype == torch.float32
