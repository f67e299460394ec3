"""The VAE against the published system's outputs, and its stream against diffusers' decode."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from magicdrive_core.encoders.vae import PUBLISHED_SCALING, Vae, latent_shape, sample_moments, to_video
from magicdrive_core.encoders.vae_layers import use_lean_norms
from magicdrive_core.errors import MagicDriveError
from tests.golden.sets import SETS, read_arrays, settings

CASES = (1, 8, 9, 16, 17, 25, 33)
ENCODED = [(SETS[name], frames) for name in SETS for frames in (CASES if name == "full" else (1, 17))]
DECODED = [(SETS[name], frames) for name in SETS for frames in (CASES if name == "full" else (8, 25))]


@pytest.fixture(scope="module")
def golden(golden_set: Path) -> Mapping[str, np.ndarray]:
    return read_arrays(golden_set / "golden_vae.npz")


@pytest.fixture(scope="module")
def golden_folder(golden: Mapping[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published system's tiny VAE as a from_pretrained folder."""
    model = AutoencoderKLCogVideoX(**settings(golden)["config"])
    weights = {name[3:]: torch.from_numpy(array) for name, array in golden.items() if name.startswith("sd/")}
    model.load_state_dict(weights, strict=True)
    folder = tmp_path_factory.mktemp("golden_vae")
    model.save_pretrained(folder)
    return folder


def load(folder: Path, chunk_frames: int | None = 8, stripe_rows: int | None = None) -> Vae:
    return Vae.load(folder, scaling_factor=PUBLISHED_SCALING, chunk_frames=chunk_frames, stripe_rows=stripe_rows)


@pytest.mark.parametrize(
    ("golden_set", "name", "chunk", "frames"),
    [
        *((folder, "micro8", 8, frames) for folder, frames in ENCODED),
        *((folder, "micro16", 16, frames) for folder, frames in ENCODED if frames in (1, 16, 17, 33)),
        *((folder, "whole", None, frames) for folder, frames in ENCODED),
    ],
    indirect=["golden_set"],
)
def test_encoding_equals_the_published_system(golden, golden_folder, name, chunk, frames) -> None:
    vae = load(golden_folder, chunk)
    video = torch.from_numpy(golden[f"enc{frames}/x"])
    moments = vae.moments(video)
    expected = torch.from_numpy(golden[f"enc{frames}/mean_scaled_{name}"])
    torch.testing.assert_close(vae.latents(moments), expected, atol=1e-5, rtol=0)
    assert moments.shape[-3:] == latent_shape(frames, *video.shape[-2:])
    if name == "whole":
        torch.testing.assert_close(moments, torch.from_numpy(golden[f"enc{frames}/params_whole"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("golden_set", "frames"), DECODED, indirect=["golden_set"])
def test_streamed_decoding_equals_the_published_system(golden, golden_folder, frames) -> None:
    vae = load(golden_folder)
    latents = torch.from_numpy(golden[f"enc{frames}/mean_scaled_micro8"])
    groups = list(vae.decode_groups(latents))
    assert all(group.shape[2] <= 9 for group in groups)
    expected = torch.from_numpy(golden[f"enc{frames}/decoded_from_micro8"])
    torch.testing.assert_close(torch.cat(groups, dim=2), expected, atol=1e-5, rtol=1e-5)


def test_posterior_sampling_draws_the_published_noise(golden, golden_folder) -> None:
    vae = load(golden_folder)
    moments = vae.moments(torch.from_numpy(golden["enc17/x"]))
    expected = torch.from_numpy(golden["enc17/sampled_micro8_seed123"])
    sample = vae.latents(moments, torch.Generator().manual_seed(123))
    torch.testing.assert_close(sample, expected, atol=1e-5, rtol=0)


def test_striped_decoding_equals_the_published_system_untiled_and_leaves_encoding_alone(golden, golden_folder) -> None:
    # recorded before scaling; random weights give values up to 12
    latents = torch.from_numpy(golden["tile/z"]) * PUBLISHED_SCALING
    expected = torch.from_numpy(golden["tile/decoded_untiled"])
    step = settings(golden).get("tile_step", 1)
    # fp32 rounds sums at the size of what is added, and torch adds in another order with another number of threads
    rounding = 2e-6 * float(expected.abs().max())
    plain, striped = load(golden_folder), load(golden_folder, stripe_rows=7)
    for vae in (plain, striped):
        frames = torch.cat(list(vae.decode_groups(latents)), dim=2)
        torch.testing.assert_close(frames[..., ::step, ::step], expected, atol=rounding, rtol=0)
    video = torch.rand(1, 3, 1, 64, 48)
    torch.testing.assert_close(striped.moments(video), plain.moments(video), atol=0, rtol=0)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE of random weights, for checks that need no reference data."""
    torch.manual_seed(0)
    model = AutoencoderKLCogVideoX(
        block_out_channels=(4, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4
    )
    folder = tmp_path_factory.mktemp("small_vae")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("latent_frames", [1, 2, 3, 5, 6])
def test_the_stream_equals_diffusers_decode(small_folder, latent_frames) -> None:
    vae = load(small_folder)
    z = torch.randn((2, 4, latent_frames, 3, 5), generator=torch.Generator().manual_seed(1))
    whole = AutoencoderKLCogVideoX.from_pretrained(small_folder).decode(z).sample.detach()
    latents = z * PUBLISHED_SCALING
    torch.testing.assert_close(torch.cat(list(vae.decode_groups(latents)), dim=2), whole, atol=1e-5, rtol=1e-5)
    parts = list(vae.decode(latents))
    assert all(part.dtype == np.uint8 and part.shape[1] <= 9 for part in parts)
    rounded = ((whole + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 4, 1).numpy()
    difference = np.abs(np.concatenate(parts, axis=1).astype(int) - rounded.astype(int))
    assert difference.max() <= 1  # a value on the edge between two steps may round either way
    assert (difference > 0).mean() < 1e-3


def test_repeated_and_batched_encoding_is_the_same(small_folder) -> None:
    vae = load(small_folder)
    video = torch.rand((3, 3, 17, 16, 24), generator=torch.Generator().manual_seed(2)) * 2 - 1
    first = vae.moments(video)
    torch.testing.assert_close(vae.moments(video), first, atol=0, rtol=0)
    torch.testing.assert_close(vae.moments(video, micro_batch=3), first, atol=1e-5, rtol=0)


def test_pixels_pass_through_the_input_scale() -> None:
    frames = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16, 1).repeat(3, axis=-1)
    video = to_video(frames)
    assert video.shape == (1, 3, 1, 16, 16)
    expected = (torch.arange(256) / 255 - 0.5) / 0.5
    torch.testing.assert_close(video[0, 0, 0].flatten(), expected, atol=1e-6, rtol=0)


def test_samples_have_the_moments_statistics() -> None:
    mean, log_variance = torch.full((1, 2, 1, 100, 100), 0.5), torch.full((1, 2, 1, 100, 100), -2.0)
    moments = torch.cat([mean, log_variance], dim=1)
    sample = sample_moments(moments, torch.Generator().manual_seed(0))
    assert sample.mean().item() == pytest.approx(0.5, abs=0.015)
    assert sample.std().item() == pytest.approx(np.exp(-1.0), rel=0.03)
    torch.testing.assert_close(sample_moments(moments), mean)


def test_a_folder_without_a_vae_is_explained(tmp_path) -> None:
    with pytest.raises(MagicDriveError, match=r"vae\.path.*holds no readable CogVideoX VAE") as caught:
        load(tmp_path / "missing")
    assert "CogVideoX-2b" in caught.value.hint


def test_lean_norms_give_the_same_bits_and_keep_nothing() -> None:
    """Over three groups of latent frames, the first of which is odd, against diffusers' own norms."""
    torch.manual_seed(0)
    options = {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
    own = AutoencoderKLCogVideoX(**options).eval()
    lean = deepcopy(own)
    use_lean_norms(lean)
    assert lean.state_dict().keys() == own.state_dict().keys()
    caches = {"own": None, "lean": None}
    z = torch.randn(1, 4, 7, 3, 5)
    with torch.no_grad():
        for part in z.split([3, 2, 2], dim=2):
            expected, caches["own"] = own.decoder(part, conv_cache=caches["own"])
            frames, caches["lean"] = lean.decoder(part, conv_cache=caches["lean"])
            assert torch.equal(frames, expected)
    assert caches["lean"]["norm_out"] == {}
    assert caches["own"]["norm_out"] != {}
