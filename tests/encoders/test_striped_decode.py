"""Decoding in stripes gives the frames of whole pictures, at any size and stripe height, in less memory."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdrive_core.encoders.striped_decode import StripedDecoder
from magicdrive_core.encoders.vae import SPACE_STRIDE, Vae
from magicdrive_core.encoders.vae_layers import use_plane_convolutions
from magicdrive_core.inference import memory_plan as memory
from magicdrive_core.inference.memory_plan import LiveMemory, Planner, Setting
from tests.model.networks import config


def make_vae(widths: tuple[int, ...] = (8, 8, 12, 16), layers: int = 1) -> Vae:
    """Random weights, and affine norms that are not the identity; without planes, as on a GPU."""
    torch.manual_seed(0)
    model = AutoencoderKLCogVideoX(
        block_out_channels=widths, latent_channels=4, layers_per_block=layers, norm_num_groups=4
    )
    for layer in model.modules():
        if isinstance(layer, torch.nn.GroupNorm):
            torch.nn.init.normal_(layer.weight)
            torch.nn.init.normal_(layer.bias)
    return Vae(model, scaling_factor=1.0)


VAE = make_vae()
ON_CPU = make_vae()
use_plane_convolutions(ON_CPU.model)


def decoded(vae: Vae, latents: torch.Tensor, rows: int | None) -> torch.Tensor:
    vae.stripe_rows = rows
    return torch.cat(list(vae.decode_groups(latents)), dim=2)


@settings(max_examples=25, deadline=None)
@given(
    vae=st.sampled_from([VAE, ON_CPU]),
    videos=st.integers(1, 2),
    latent_frames=st.integers(1, 6),
    height=st.integers(1, 5),
    width=st.integers(1, 4),
    rows=st.integers(1, 41),
    seed=st.integers(0, 2**31),
)
def test_stripes_give_the_frames_of_whole_pictures(
    vae: Vae, videos: int, latent_frames: int, height: int, width: int, rows: int, seed: int
) -> None:
    """Over up to three groups of latent frames, the first with an odd one: 4 (t - 1) + 1 frames, or 4 t."""
    generator = torch.Generator().manual_seed(seed)
    latents = 3 * torch.randn((videos, 4, latent_frames, height, width), generator=generator)
    whole = decoded(vae, latents, None)
    striped = decoded(vae, latents, rows)
    torch.testing.assert_close(striped, whole, atol=1e-4 * float(whole.abs().max()), rtol=0)


def test_a_picture_that_is_bright_above_and_dark_below_has_no_seam() -> None:
    """Both parts have different statistics, so that norms of single stripes would be far off."""
    latents = torch.randn((1, 4, 3, 6, 3), generator=torch.Generator().manual_seed(1))
    latents[..., :3, :] += 8
    whole = decoded(VAE, latents, None)
    torch.testing.assert_close(decoded(VAE, latents, 8), whole, atol=1e-4 * float(whole.abs().max()), rtol=0)
    top = decoded(VAE, latents[..., :3, :], None)
    assert (top - whole[..., :24, :]).abs().mean() > 1e-2 * float(whole.abs().max())


def test_a_second_decoding_does_not_depend_on_the_first() -> None:
    latents = torch.randn((1, 4, 5, 2, 3), generator=torch.Generator().manual_seed(2))
    assert torch.equal(decoded(VAE, latents, 3), decoded(VAE, latents, 3))


def test_less_than_a_group_of_frames_is_decoded_before_the_first_can_be_used() -> None:
    latents = torch.randn((1, 4, 7, 2, 3), generator=torch.Generator().manual_seed(3))
    vae = deepcopy(VAE)
    vae.stripe_rows = 4
    calls: list[int] = []
    vae.model.decoder.conv_out.register_forward_hook(lambda _layer, _inputs, out: calls.append(out[0].shape[2]))
    first = next(vae.decode_groups(latents))
    assert first.shape[2] == 9
    assert calls == [9] * 4  # stripes of one group


def peaks(rows: int) -> tuple[int, int, int]:
    """Returns the peak of bytes while a group is decoded, measured and planned, and the bytes that wait afterwards."""
    z = torch.randn((1, 4, 3, 24, 4), generator=torch.Generator().manual_seed(4))
    real = make_vae((16, 32, 32, 64)).model.decoder
    fake = torch.nn.Module.to(deepcopy(real), "meta")
    found = []
    for decoder, latents in (
        (StripedDecoder(real, rows, SPACE_STRIDE), z),
        (StripedDecoder(fake, rows, SPACE_STRIDE), z.to("meta")),
    ):
        with LiveMemory(latents.device.type) as tracker:
            decoder(latents)
        found.append(tracker.peak)
    return found[0], found[1], sum(frames.nbytes for frames in decoder._past.values())


def test_memory_falls_with_the_height_of_the_stripes_as_planned() -> None:
    beside_waiting = []
    for rows in (96, 16, 4):
        real, planned, waiting = peaks(rows)
        assert real - waiting <= planned <= real  # on a CPU, frames that wait in main memory may count or not
        beside_waiting.append(real - waiting)
    assert beside_waiting == sorted(beside_waiting, reverse=True)
    assert beside_waiting[-1] < beside_waiting[0] / 2


def test_the_published_vae_decodes_848x1600_in_12_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans the first group of a clip, which is the largest; two activations of full size take most of it."""
    monkeypatch.setattr(memory, "GROUPS", 1)
    small = config(width=128, heads=4, ego_heads=4, box_heads=4, depth=1, control_depth=1)
    planned = Planner(small).peaks("848x1600", 9, Setting(slots=4, map_cells=40, stripe_rows=32)).decoding
    assert 9 * (256 + 128) * 848 * 1600 * 2 < planned < 12e9
