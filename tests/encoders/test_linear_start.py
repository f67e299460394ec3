"""A new VAE starts as the best linear code of its pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor
from torch.nn import functional

from magicdrive_core.encoders.small_vae import WHITENING, start_linear
from magicdrive_core.encoders.vae_layers import use_plane_convolutions
from magicdrive_core.errors import MagicDriveError

LATENTS = 9


def make_model() -> Any:
    torch.manual_seed(3)
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 12, 12, 24), latent_channels=LATENTS, layers_per_block=1, norm_num_groups=1
    ).eval()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Soft blobs in three colours: most of an 8x8 patch is in its mean and slopes."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, 3, 5, 7, generator=generator)
    return functional.interpolate(noise, size=(64, 88), mode="bicubic").clamp(-1, 1)


@pytest.fixture(scope="module")
def model(pictures: Tensor) -> Any:
    model = make_model()
    start_linear(model, pictures)
    return model


def reconstruct(model: Any, pictures: Tensor) -> Tensor:
    with torch.no_grad():
        return model.decode(model.encode(pictures[:, :, None]).latent_dist.mean).sample[:, :, 0]


def test_pictures_survive_without_any_training(model, pictures) -> None:
    error = functional.mse_loss(reconstruct(model, pictures), pictures)
    random = functional.mse_loss(reconstruct(make_model(), pictures), pictures)
    assert error < 0.12 * pictures.var()
    assert error < 0.15 * random


def test_latents_are_principal_components(model, pictures) -> None:
    """Uncorrelated, of falling deviation, of the size that WHITENING leaves; they hold what the best basis can."""
    with torch.no_grad():
        latents = model.encode(pictures[:, :, None]).latent_dist.mean[:, :, 0].transpose(0, 1).flatten(1).double()
    covariance = latents @ latents.T / latents.shape[1]
    deviations = covariance.diagonal().sqrt()
    correlation = covariance / deviations / deviations[:, None]
    assert (correlation - torch.eye(LATENTS)).abs().max() < 0.1
    assert deviations.square().mean() == pytest.approx(1, rel=0.1)

    patches = functional.pixel_unshuffle(pictures - pictures.mean(dim=(0, 2, 3))[:, None, None], 8).double()
    patches = patches.transpose(0, 1).flatten(1)
    best = torch.linalg.svdvals(patches / patches.shape[1] ** 0.5)[:LATENTS]
    torch.testing.assert_close(
        deviations ** (1 / (1 - WHITENING)) / deviations[0] ** (1 / (1 - WHITENING)),
        best / best[0],
        rtol=0.2,
        atol=0.01,
    )
    explained = torch.linalg.lstsq(latents.T, patches.T)
    residual = patches.T - latents.T @ explained.solution
    assert residual.square().mean() < 1.3 * (patches.square().mean() - best.square().sum() / len(patches))


def test_encoding_is_nearly_linear(model, pictures) -> None:
    first, second = pictures[:3, :, None], pictures[3:, :, None]
    with torch.no_grad():
        means = [model.encode(x).latent_dist.mean for x in (first, second, (first + second) / 2)]
    torch.testing.assert_close(means[2], (means[0] + means[1]) / 2, rtol=0, atol=0.05)


def test_a_still_clip_is_coded_as_its_picture(model, pictures) -> None:
    still = pictures[:1, :, None].expand(-1, -1, 9, -1, -1)
    with torch.no_grad():
        clip = model.encode(still).latent_dist.mean
        single = model.encode(still[:, :, :1]).latent_dist.mean
    torch.testing.assert_close(clip, single.expand_as(clip), rtol=1e-3, atol=1e-3)


def test_replaced_convolutions_start_the_same(pictures) -> None:
    plain, planes = make_model(), make_model()
    use_plane_convolutions(planes)
    for each in (plain, planes):
        start_linear(each, pictures)
    for name, weight in planes.state_dict().items():
        torch.testing.assert_close(weight, plain.state_dict()[name], rtol=1e-3, atol=1e-3, msg=name)


def test_pictures_of_one_colour_are_refused(pictures) -> None:
    with pytest.raises(MagicDriveError, match="of one colour"):
        start_linear(make_model(), torch.full_like(pictures, 0.25))
