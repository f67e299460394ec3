"""What the default network promises beyond the published one, each with the difference shown."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from magicdrive_core.model.inputs import Conditions
from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.parallel.parallelize import parallelize
from tests.model.networks import conditions, network, noisy

T = torch.tensor([700.0])


@torch.no_grad()
def run(net: MagicDrive, cond: Conditions, x: Tensor | None = None, x_mask: Tensor | None = None) -> Tensor:
    x = noisy(len(cond.text), -(-cond.bev_map.shape[1] // 4)) if x is None else x
    return net(x, T.expand(len(x)), cond, x_mask)


def stack(first: Conditions, second: Conditions) -> Conditions:
    """Two samples in one batch; box slots and text are padded as ``collate`` does."""
    slots = max(first.box_classes.shape[-1], second.box_classes.shape[-1])

    def pad(one: Conditions) -> Conditions:
        missing = slots - one.box_classes.shape[-1]
        return replace(
            one,
            box_corners=functional.pad(one.box_corners, (0, 0, 0, 0, 0, missing)),
            box_classes=functional.pad(one.box_classes, (0, missing), value=-1),
            box_masks=functional.pad(one.box_masks, (0, missing)),
            box_latent=functional.pad(one.box_latent, (0, 0, 0, missing), value=5.0),
        )

    a, b = pad(first), pad(second)
    return replace(
        a,
        **{
            name: torch.cat([getattr(a, name), getattr(b, name)])
            for name, value in vars(a).items()
            if torch.is_tensor(value)
        },
    )


@pytest.mark.parametrize("published", [False, True])
def test_a_sample_does_not_depend_on_its_batch_mates(published: bool) -> None:
    """Published: it does, through the text's cut and the padded box slots (oddities 4 and 18)."""
    net = network(published=published)
    short, long = conditions(seed=3, slots=2), conditions(seed=4, slots=5)
    short = replace(short, text_mask=torch.arange(7)[None] < 2)
    long = replace(long, text_mask=torch.arange(7)[None] < 6)
    alone = run(net, short, noisy())
    together = run(net, stack(short, long), torch.cat([noisy(), noisy(seed=2)]))[:1]
    difference = (alone - together).abs().max()
    assert difference > 1e-2 if published else difference < 1e-5


@pytest.mark.parametrize("published", [False, True])
def test_text_padding_is_never_read(published: bool) -> None:
    net = network(published=published)
    cond = replace(conditions(), text_mask=torch.arange(7)[None] < 4)
    noise = torch.where(cond.text_mask[..., None], cond.text, 100.0)
    same = torch.equal(run(net, cond), run(net, replace(cond, text=noise)))
    assert same != published


def test_a_shorter_text_tensor_means_the_same() -> None:
    net, cond = network(), replace(conditions(), text_mask=torch.arange(7)[None] < 4)
    cut = replace(cond, text=cond.text[:, :4], text_mask=cond.text_mask[:, :4])
    torch.testing.assert_close(run(net, cond), run(net, cut))
    torch.testing.assert_close(run(net, cond.dropped()), run(net, cut.dropped()))


def test_encoding_once_is_the_whole_forward() -> None:
    net, cond, x = network(), conditions(batch=2), noisy(batch=2)
    context = net.encode(cond, (3, 5, 8))
    for t in (900.0, 100.0):
        step = torch.full((2,), t)
        assert torch.equal(net.denoise(x, step, context), net(x, step, cond))


def test_the_unconditional_pass_is_the_dropped_state_of_training() -> None:
    """Nothing of text, cameras, ego motion, map or boxes is left, but for which slots are boxes; published, the map."""
    net, cond, other = network(), conditions(seed=5), conditions(seed=6)
    other = replace(other, box_masks=cond.box_masks, fps=cond.fps)
    assert torch.equal(run(net, cond.dropped()), run(net, other.dropped()))
    assert not torch.equal(run(net, cond), run(net, other))
    published, no_map = network(published=True), replace(cond, bev_map=torch.zeros_like(cond.bev_map))
    assert not torch.equal(run(published, cond.dropped()), run(published, no_map.dropped()))


def test_conditioning_frames_see_noise_level_zero() -> None:
    net, cond, x = network(), conditions(batch=2), noisy(batch=2)
    clean = torch.zeros(2, 3, dtype=torch.bool)
    with torch.no_grad():
        none_noisy = net(x, T.expand(2), cond, clean)
        at_zero = net(x, torch.zeros(2), cond)
        all_noisy = net(x, T.expand(2), cond, ~clean)
    torch.testing.assert_close(none_noisy, at_zero)
    torch.testing.assert_close(all_noisy, run(net, cond, x))


def test_fresh_temporal_blocks_are_an_identity() -> None:
    """A fresh stage-2 network with stage-1 weights is the stage-1 network on single frames, bit for bit."""
    first = network(temporal=False, instance_latent=False, mean_over_frames=True)
    second = network(seed=9, fresh=True)
    with torch.no_grad():
        second.bbox_embedder.mean_var.zero_()
    missing, unexpected = second.load_state_dict(first.state_dict(), strict=False)
    assert not unexpected
    new = ("base_blocks_t.", "control_blocks_t.", "bbox_embedder.mean_var")
    assert all(name.startswith(new) for name in missing)
    cond = replace(conditions(frames=1), box_latent=None)
    x = noisy(latents=1)
    torch.testing.assert_close(run(first, cond, x), run(second, cond, x))
    published = network(seed=9, fresh=True, published=True)
    published.load_state_dict(first.state_dict(), strict=False)
    assert not torch.allclose(run(first, cond, x), run(published, cond, x))


def test_published_temporal_blocks_are_no_identity() -> None:
    """Oddity 10, at the blocks themselves, on several frames."""
    for published in (False, True):
        net = network(fresh=True, published=published)
        changed = []
        for blocks in (net.base_blocks_t, net.control_blocks_t):
            blocks[0].register_forward_hook(
                lambda _m, inputs, out, changed=changed: changed.append(not torch.equal(inputs[0], out))
            )
        run(net, conditions(), noisy())
        assert changed == [published, published]


def test_tables_stay_in_fp32_under_bf16() -> None:
    """Rotary angles: exact by the formula, where the published ones are rounded with the weights (oddities 5, 6)."""
    for published in (False, True):
        net = network(published=published).bfloat16()
        wide = network(published=published)
        equal = torch.equal(net.rope(61), wide.rope(61))
        assert net.rope(61).dtype == torch.float32
        assert equal != published
    net = network().bfloat16()
    seen = []
    net.t_embedder.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    out = run(net, conditions(), noisy())
    assert seen[0].dtype == torch.float32
    assert out.dtype == torch.float32
    exact = run(network(), conditions(), noisy())
    assert (out - exact).abs().max() < 0.25 * exact.std() + 0.1


def test_the_network_has_no_data_dependent_shapes() -> None:
    """It runs on tensors without data, with the shapes of a real run."""
    with FakeTensorMode():
        net = network()
        cond = conditions(batch=2)
        x = noisy(batch=2)
        out = net(x, torch.full((2,), 500.0), cond, torch.ones(2, 3, dtype=torch.bool))
        out.sum().backward()
        assert out.shape == x.shape


@pytest.mark.slow
def test_the_network_exports_with_equal_results() -> None:
    net, cond, x = network(depth=1).requires_grad_(False), conditions(), noisy()

    class Flat(nn.Module):
        def forward(self, x: Tensor, *tensors: Tensor) -> Tensor:
            return net(x, T, Conditions(*tensors))

    arguments = (x, *[getattr(cond, field.name) for field in fields(cond)[:-1]])
    exported = torch.export.export(Flat(), arguments, strict=False).module()
    torch.testing.assert_close(exported(*arguments), run(net, cond, x))


@pytest.mark.slow
@torch.no_grad()
def test_the_network_is_one_graph_with_equal_results() -> None:
    net, cond, x = network(depth=1), conditions(), noisy()
    one = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(one(x, T, cond), run(net, cond, x))


@pytest.mark.parametrize("stage1", [True, False])
def test_every_trainable_parameter_gets_a_gradient_and_checkpointing_the_same(stage1: bool) -> None:
    kind = {"temporal": not stage1, "instance_latent": not stage1, "mean_over_frames": stage1}
    net = network(**kind)
    gradients = [gradients_of(net, stage1=stage1, every=every) for every in (0, 1, 2)]
    for name, gradient in gradients[0].items():
        for other in gradients[1:]:
            assert torch.equal(other[name], gradient), name


def test_gradients_are_those_of_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere than on a CPU torch's kernels do it."""
    net = network()
    here = gradients_of(net)
    monkeypatch.setattr("magicdrive_core.kernels.library.usable", lambda _: False)
    for name, gradient in gradients_of(net).items():
        torch.testing.assert_close(here[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()) + 1e-9)


def gradients_of(
    net: MagicDrive, *, stage1: bool = False, every: int = 0, compile_backend: str | None = None
) -> dict[str, Tensor]:
    frames, latents = (1, 1) if stage1 else (9, 3)
    cond = replace(conditions(batch=2, frames=frames), keep=torch.tensor([True, False]))
    x, mask = noisy(batch=2, latents=latents), torch.ones(2, latents, dtype=torch.bool)
    parallelize(net, recompute_every=every, compile_backend=compile_backend)
    net.zero_grad()
    net(x, T.expand(2), cond, mask).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("every", "recomputed"), [(0, 0), (1, 6), (2, 4)])
def test_every_nth_block_is_computed_again(every: int, recomputed: int) -> None:
    """Two blocks of depth and one of control, spatial and temporal each; every second one is that of index 0."""
    net, calls = network(), []
    for block in net.blocks():
        block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients_of(net, every=every)
    assert len(calls) == 6 + recomputed


def test_compiled_blocks_give_the_same_gradients() -> None:
    """Up to the graphs of forward and backward, which aot_eager runs as they are; inductor takes minutes for more.

    Where blocks are computed again, with the same graphs.
    """
    torch._dynamo.reset()
    net = network(depth=1)
    eager = gradients_of(net)
    names = list(net.state_dict())
    torch._dynamo.utils.counters.clear()
    made = []
    for every in (0, 1):
        for name, gradient in gradients_of(net, every=every, compile_backend="aot_eager").items():
            torch.testing.assert_close(gradient, eager[name], atol=1e-5, rtol=1e-4, msg=name)
        made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert list(net.state_dict()) == names
    assert 0 < made[0] == made[1]


@settings(deadline=None, max_examples=12)
@given(
    views=st.integers(2, 5),
    frames=st.sampled_from([1, 8, 9, 17]),
    size=st.tuples(st.integers(2, 7), st.integers(2, 7)),
    slots=st.integers(1, 4),
    published=st.booleans(),
)
def test_any_size_goes_through(views: int, frames: int, size: tuple[int, int], slots: int, published: bool) -> None:
    ring = tuple(((view - 1) % views, (view + 1) % views) for view in range(views))
    net = network(neighbours=ring, published=published, depth=1)
    cond = conditions(frames=frames, slots=slots, views=views)
    x = noisy(latents=max(1, frames // 4 + frames % 2), size=size, views=views)
    out = run(net, cond, x)
    assert out.shape == x.shape
    assert out.isfinite().all()


def test_text_buffers_are_projected_features() -> None:
    net = network()
    classes, base = torch.randn(10, 10), torch.randn(10)
    net.set_text_buffers(classes, base)
    with torch.no_grad():
        torch.testing.assert_close(net.bbox_embedder._class_tokens, net.y_embedder.y_proj(classes))
        torch.testing.assert_close(net.base_token, net.y_embedder.y_proj(base))


def test_cross_view_attention_reads_neighbours_only() -> None:
    """A change of view 3 reaches views 2 and 4 in one block, and no others."""
    net = network(depth=1, control_depth=1, temporal=False, instance_latent=False, mean_over_frames=True)
    cond = conditions(frames=1)
    x = noisy(latents=1)
    changed = x.clone()
    changed[:, 3] += 1
    moved = (run(net, cond, x) - run(net, cond, changed)).abs().amax(dim=(0, 2, 3, 4, 5)) > 0
    assert moved.tolist() == [False, False, True, True, True, False]


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("limit", [1, 150])
def test_slices_change_nothing(published: bool, limit: int) -> None:
    """One frame or token position at a time, or a few; keys and values kept or computed by the blocks."""
    net = network(published=published, pad_patches=8)
    cond, x = conditions(batch=2), noisy(batch=2)
    mask = torch.tensor([[False, True, True], [True, True, False]])
    parallelize(net, slice_tokens=0)
    whole = run(net, cond, x, mask)
    parallelize(net, slice_tokens=limit)
    calls: list[int] = []
    net.base_blocks_t[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(run(net, cond, x, mask), whole, rtol=1e-5, atol=1e-5)
    assert len(calls) > 1
    with torch.no_grad():
        kept = net.encode(cond, (3, 5, 8))
        few = replace(kept, kv={})
        torch.testing.assert_close(net.denoise(x, T.expand(2), few, mask), whole, rtol=1e-5, atol=1e-5)


def test_large_contexts_keep_no_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("magicdrive_core.model.transformer.KEPT_BYTES", 1000)
    with torch.no_grad():
        assert network().encode(conditions(), (3, 5, 8)).kv == {}
        monkeypatch.undo()
        assert network().encode(conditions(), (3, 5, 8)).kv != {}
    assert network().encode(conditions(), (3, 5, 8)).kv == {}  # with gradients the blocks compute their own
