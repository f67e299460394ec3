"""A small CogVideoX VAE, trained on the data's pictures in about a minute, for runs without the published one.

``build_vae`` trains it. Two things make a minute enough:

- A linear start (``start_linear``). Training from random weights spends its first minutes on what principal component
  analysis computes in a second. So the encoder starts with the principal components of 8x8 patches, level by level: a
  strided convolution holds those of 2x2 neighbours. The decoder starts with the least-squares inverse, fitted level by
  level to the output of the level below: its convolutions follow nearest-neighbour upsampling, so that they cannot tell
  the pixels of one cell apart but reach into its neighbours. Residual branches start at zero. Norms must have one
  group: a large constant pair of channels then makes the last norms nearly linear, and pairs of opposite sign make SiLU
  linear, since silu(x) - silu(-x) = x.
- Muon (``Muon``), an optimizer that makes the momentum orthogonal (Jordan et al. 2024, "Muon: an optimizer for hidden
  layers"). On the demo's VAE 200 steps reach what Adam needs about 500 for. torch's own Muon computes in bfloat16,
  which is 11 times slower than float32 on CPUs without it, and takes matrices only.

Shapes: N pictures or clips, F frames, C channels, H, W rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from magicdrive_core.config.schema import VaeBuild, parse_size
from magicdrive_core.data.pictures import read_picture
from magicdrive_core.data.records import Scene
from magicdrive_core.encoders.vae import Vae, to_video
from magicdrive_core.encoders.vae_layers import use_plane_convolutions
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import Framing
from magicdrive_core.utils.progress import track

Pixels = NDArray[np.uint8]
CLIP_FRAMES = 9  # most frames of a training clip: three latent frames
EDGE_WEIGHT = 0.25  # of the error of differences between neighbouring pixels: keeps outlines sharp
KL_WEIGHT = 1e-6  # as in latent diffusion: keeps the latents bounded and hardly blurs
START_FRAMES = 24  # pictures that the linear start is fitted to
ADAM_SHARE = 0.2  # of Muon's learning rate

CONSTANT = 32.0  # value of the channel pair that outweighs the picture in the last norms
WHITENING = 0.85  # latent channels are divided by their deviation to this power: 0 keeps the pictures' scale, 1 whitens
RIDGE = 1e-5  # share of the mean square that is added to the diagonal of least squares
LOG_VARIANCE = -6.0  # of the posterior at the start, so low that its noise hides nothing

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Muon's quintic iteration, which drives all singular values towards 1
ITERATIONS = 5


def build_vae(build: VaeBuild, clips: Pixels) -> Any:
    """Trains a new VAE; the same seed and number of threads give the same weights.

    Args:
        build: sizes and schedule.
        clips: training clips (N, F, H, W, 3) in [0, 255].

    Returns:
        The diffusers ``AutoencoderKLCogVideoX`` in evaluation mode.
    """
    with torch.random.fork_rng():
        torch.manual_seed(build.seed)
        model: Any = AutoencoderKLCogVideoX(
            block_out_channels=tuple(build.block_out_channels),
            latent_channels=build.latent_channels,
            layers_per_block=build.layers_per_block,
            norm_num_groups=1,
            sample_height=parse_size(build.resolution)[0],
            sample_width=parse_size(build.resolution)[1],
        )
        use_plane_convolutions(model)
        start_linear(model, to_video(clips[:START_FRAMES, -1:])[:, :, 0])
        model.train()
        optimizers = _optimizers(model, build.learning_rate)
        schedules = [
            OneCycleLR(o, o.defaults["lr"], total_steps=build.steps, pct_start=0.1, cycle_momentum=False)
            for o in optimizers
        ]
        crops = _crops(build, clips)
        for _ in track(range(build.steps), "VAE", build.steps):
            model.zero_grad()
            _loss(model, to_video(next(crops))).backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
    return model.eval()


def _optimizers(model: Any, learning_rate: float) -> list[Optimizer]:
    """Returns Muon for the inner convolutions, and Adam for the first and last ones, norms and biases."""
    ends = {id(model.encoder.conv_in.conv.weight), id(model.decoder.conv_out.conv.weight)}
    inner = [p for p in model.parameters() if p.ndim >= 4 and id(p) not in ends]
    rest = [p for p in model.parameters() if p.ndim < 4 or id(p) in ends]
    return [Muon(inner, learning_rate), Adam(rest, ADAM_SHARE * learning_rate, betas=(0.9, 0.99), fused=True)]


def _loss(model: Any, video: Tensor) -> Tensor:
    """Returns the squared error of pixels and of their differences along rows and columns, plus the KL divergence."""
    posterior = model.encode(video).latent_dist
    error = model.decode(posterior.sample()).sample - video
    edges = error.diff(dim=3).square().mean() + error.diff(dim=4).square().mean()
    return error.square().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * posterior.kl().mean()


def _crops(build: VaeBuild, clips: Pixels) -> Iterator[Pixels]:
    """Yields random crops (N, F, H, W, 3) without end: single frames, and every ``clip_every`` steps a clip."""
    rng = np.random.default_rng(build.seed)
    count, frames, height, width = clips.shape[:4]
    step = 0
    while True:
        step += 1
        clip_step = frames > 1 and step % build.clip_every == 0
        parts = []
        for _ in range(1 if clip_step else build.batch):
            clip, top, left = rng.integers((count, height - build.crop + 1, width - build.crop + 1))
            when = slice(None) if clip_step else slice(first := int(rng.integers(frames)), first + 1)
            parts.append(clips[clip, when, top : top + build.crop, left : left + build.crop])
        yield np.stack(parts)


def longest_clip(scenes: Sequence[Scene], at_most: int) -> int:
    """Finds the longest clip of 8n + 1 frames that some scene allows.

    Args:
        scenes: the scenes; without any the result is 1.
        at_most: most frames, at least 1.

    Returns:
        Number of frames, 8n + 1.
    """
    return (min(at_most, max(map(len, scenes), default=1)) - 1) // 8 * 8 + 1


def draw_clips(scenes: Sequence[Scene], root: Path, size: str, frames: int, count: int, seed: int) -> Pixels:
    """Reads clips of one view each, spread evenly over the scenes, at random times and views.

    Args:
        scenes: scenes to choose from.
        root: data root of the pictures.
        size: height and width of the clips, such as "224x400".
        frames: frames of a clip.
        count: number of clips N.
        seed: seeds the random times and views.

    Returns:
        (N, F, H, W, 3) in [0, 255].

    Raises:
        MagicDriveError: every scene is too short, or a picture is missing or broken.
    """
    long_enough = [scene for scene in scenes if len(scene) >= frames]
    if not long_enough:
        raise MagicDriveError(
            f"no scene has the {frames} frames that the VAE is built with",
            "use longer scenes, or set vae.build to null and vae.path to a trained VAE",
        )
    rng = np.random.default_rng(seed)
    framing = Framing(*parse_size(size))
    paths = []
    for index in range(count):
        scene = long_enough[index % len(long_enough)]
        start = int(rng.integers(len(scene) - frames + 1))
        view = int(rng.integers(len(scene.pictures[0])))
        paths += [root / views[view] for views in scene.pictures[start : start + frames]]
    with ThreadPoolExecutor() as pool:  # PIL releases the interpreter lock
        pictures = list(track(pool.map(partial(read_picture, framing=framing), paths), "pictures", len(paths)))
    return rearrange(np.stack(pictures), "(n f) h w c -> n f h w c", f=frames)


def psnr(vae: Vae, clips: Pixels) -> float:
    """Measures the peak signal-to-noise ratio of clips that are encoded (posterior mean) and decoded.

    Args:
        vae: the VAE.
        clips: (N, F, H, W, 3) in [0, 255].

    Returns:
        Decibels, from the mean squared error over all clips.
    """
    squares = 0.0
    for clip in clips:
        latents = vae.latents(vae.moments(to_video(clip[None])))
        decoded = np.concatenate(list(vae.decode(latents)), axis=1)[0]
        squares += float(np.square(decoded.astype(np.float64) - clip).sum())
    return float(10 * np.log10(255**2 / (squares / clips.size)))


def latent_spread(vae: Vae, clips: Pixels) -> float:
    """Measures the root mean square of unscaled posterior samples; its inverse scales latents to unit size.

    Args:
        vae: the VAE; its scaling factor is not used.
        clips: (N, F, H, W, 3) in [0, 255].

    Returns:
        The root mean square over all clips, channels and positions, from the posterior's moments without sampling.
    """
    squares, count = 0.0, 0
    for clip in clips:
        mean, log_variance = vae.moments(to_video(clip[None])).double().chunk(2, dim=1)
        squares += float(mean.square().sum() + log_variance.exp().sum())
        count += mean.numel()
    return float(np.sqrt(squares / count))


@torch.no_grad()
def start_linear(model: Any, frames: Tensor) -> None:
    """Sets the weights of a new ``AutoencoderKLCogVideoX`` to the best linear code of some frames, in place.

    Args:
        model: a model whose norms have one group.
        frames: (N, 3, H, W) in [-1, 1]; height and width are multiples of 8.

    Raises:
        MagicDriveError: all frames have one colour, the same in all of them.
    """
    mean = frames.mean(dim=(0, 2, 3))
    if (frames - mean[:, None, None]).abs().max() < 1 / 255:
        raise MagicDriveError("all pictures for the VAE are of one colour", "check the pictures of data.root")
    for name, weight in model.named_parameters():
        if ".conv2.conv." in name:
            weight.zero_()
    _start_encoder(model.encoder, frames, mean)
    latents = model.encode(frames[:, :, None]).latent_dist.mean[:, :, 0]
    _start_decoder(model.decoder, frames, mean, latents)


def _start_encoder(encoder: Any, frames: Tensor, mean: Tensor) -> None:
    """Sets the encoder to the principal components of ``frames`` minus their mean colour (3)."""
    _set(encoder.conv_in.conv, torch.eye(3), -mean)
    features = frames - mean[:, None, None]
    for block in encoder.down_blocks[:-1]:
        _widen(block)
        convolution = block.downsamplers[0].conv
        patches = functional.pixel_unshuffle(features, 2)  # channels in the order (c row column)
        axes = _principal(patches, convolution.out_channels)
        kernel = torch.zeros_like(convolution.weight)
        kernel[: axes.shape[1], : features.shape[1], :2, :2] = rearrange(axes, "(i y x) o -> o i y x", y=2, x=2)
        convolution.weight.copy_(kernel)
        convolution.bias.zero_()
        features = torch.einsum("pc,nphw->nchw", axes, patches)
    count = len(encoder.conv_out.conv.bias) // 2
    axes = _principal(features, count)
    deviation = torch.einsum("pc,nphw->nchw", axes, features).square().mean(dim=(0, 2, 3)).sqrt()
    axes = axes * deviation**-WHITENING
    axes /= (axes.T @ _covariance(features) @ axes).diagonal().mean().sqrt()
    scale = _signed_pairs(encoder.down_blocks[-1].resnets[0].conv_shortcut, axes.T)
    means = scale * torch.cat([torch.eye(count), -torch.eye(count)], dim=1)
    _set(encoder.conv_out.conv, torch.cat([means, torch.zeros_like(means)]))
    encoder.conv_out.conv.bias[count:] = LOG_VARIANCE


def _start_decoder(decoder: Any, frames: Tensor, mean: Tensor, latents: Tensor) -> None:
    """Sets the decoder to the least-squares inverse of the encoder, which encodes ``frames`` to ``latents``."""
    _set(decoder.conv_in.conv, torch.eye(latents.shape[1]))
    features, factor = latents, 8
    for block, after in zip(decoder.up_blocks[:-1], decoder.up_blocks[1:], strict=True):
        _widen(block)
        factor //= 2
        target = functional.pixel_unshuffle(frames - mean[:, None, None], factor)
        if factor > 1:
            axes = _principal(target, after.resnets[0].out_channels)
            target = torch.einsum("pc,nphw->nchw", axes, target)
        up = functional.interpolate(features, scale_factor=2.0, mode="nearest")
        kernel, bias = _least_squares(up, target)
        _set(block.upsamplers[0].conv, kernel, bias)
        features = functional.conv2d(up, kernel, bias, padding=1)
    scale = _signed_pairs(decoder.up_blocks[-1].resnets[0].conv_shortcut, torch.eye(3))
    norm = decoder.norm_out
    norm.conv_y.conv.weight.zero_()
    norm.conv_y.conv.bias.fill_(1.0)
    norm.conv_b.conv.weight.zero_()
    norm.conv_b.conv.bias.zero_()
    _set(decoder.conv_out.conv, scale * torch.cat([torch.eye(3), -torch.eye(3)], dim=1), mean)


def _widen(block: Any) -> None:
    """Sets a block's first residual connection to the identity, as far as both widths go."""
    first = block.resnets[0]
    if first.in_channels != first.out_channels:
        _set(first.conv_shortcut, torch.eye(min(first.in_channels, first.out_channels)))


def _signed_pairs(shortcut: Any, matrix: Tensor) -> float:
    """Sets a convolution to the channels (matrix x, -matrix x, constant, -constant).

    Returns:
        The divisor of the norm that follows, which the constants dominate.
    """
    rows = 2 * len(matrix)
    _set(shortcut, torch.cat([matrix, -matrix, torch.zeros(2, matrix.shape[1])]))
    shortcut.bias[rows : rows + 2] = torch.tensor([CONSTANT, -CONSTANT])
    return float(CONSTANT * (2 / len(shortcut.bias)) ** 0.5)


def _set(convolution: Any, kernel: Tensor, bias: Tensor | float = 0.0) -> None:
    """Sets the first output channels of a convolution, for the current frame only.

    Args:
        convolution: a 2D or causal 3D convolution.
        kernel: (C_out, C_in, 3, 3), or (C_out, C_in) for the centre of the kernel.
        bias: (C_out), or one value for all.
    """
    rows, columns = kernel.shape[:2]
    weight = convolution.weight
    weight[:rows] = 0
    present = weight[:, :, -1] if weight.ndim == 5 else weight
    centre = present.shape[-1] // 2
    view = present if kernel.ndim == 4 else present[:, :, centre, centre]
    view[:rows, :columns] = kernel
    convolution.bias[:rows] = bias


def _covariance(features: Tensor) -> Tensor:
    """Returns the second moments (C, C) of features (N, C, H, W)."""
    values = rearrange(features.double(), "n c h w -> c (n h w)")
    return (values @ values.T / values.shape[1]).float()


def _principal(features: Tensor, count: int) -> Tensor:
    """Returns at most ``count`` orthonormal axes (C, K) of features (N, C, H, W), by falling variance, signs fixed."""
    axes = torch.linalg.eigh(_covariance(features).double()).eigenvectors.flip(1)[:, :count]
    signs = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    return (axes * signs).float()


def _least_squares(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Fits a 3x3 convolution from features (N, C_in, H, W) to a target (N, C_out, H, W) by least squares.

    Returns:
        Kernel (C_out, C_in, 3, 3) and bias (C_out).
    """
    size = 9 * features.shape[1] + 1
    gram, moments = (
        torch.zeros(size, size, dtype=torch.float64),
        torch.zeros(size, target.shape[1], dtype=torch.float64),
    )
    for source, wanted in zip(features, target, strict=True):  # one picture at a time, to save memory
        columns = functional.unfold(source[None].double(), 3, padding=1)[0]
        columns = torch.cat([columns, torch.ones_like(columns[:1])])
        gram += columns @ columns.T
        moments += columns @ wanted.flatten(1).double().T
    gram += RIDGE * gram.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    solution = torch.linalg.solve(gram, moments).float().T
    kernel = rearrange(solution[:, :-1], "o (i y x) -> o i y x", y=3, x=3)
    return kernel, solution[:, -1]


def orthogonalised(matrix: Tensor) -> Tensor:
    """Approximates U V^T of the singular value decomposition X = U S V^T by Newton-Schulz iteration.

    Jordan et al. 2024, "Muon: an optimizer for hidden layers". Each iterate is a polynomial of X X^T times X,
    so that the iteration runs on square matrices of the shorter side.

    Args:
        matrix: X, (m, n).

    Returns:
        (m, n), with singular values near 1.
    """
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    gram = wide @ wide.T
    product = identity = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    for _ in range(ITERATIONS):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    wide = product @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


class Muon(Optimizer):
    """Muon for weights of convolutions and matrices, whose rows are the output channels (Jordan et al. 2024).

    Args:
        params: tensors of two or more dimensions.
        lr: singular values of a step, for matrices with no more rows than columns; taller ones take
            sqrt(rows / columns) times as large steps.
        momentum: share of the past gradients; applied as Nesterov momentum.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: computes the loss again before the update; None: it is not computed.

        Returns:
            The loss of ``closure``; None without one.
        """
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalised(parameter.grad.lerp(average, group["momentum"]).flatten(1))
                rows, columns = update.shape
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
        return loss
