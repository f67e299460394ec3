"""The golden files of the published system, and the check of this network against them.

The layout of the files: README of the reference data, section 1.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.kernels.torch_ops import NORM_EPS, attend, normed_heads
from magicdrive_core.model.attention import CrossViewAttention
from magicdrive_core.model.blocks import ControlBlock
from magicdrive_core.model.build import build_network
from magicdrive_core.model.config import NetworkConfig
from magicdrive_core.model.inputs import Conditions, pack_map
from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.utils.files import UNREADABLE_ZIP

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from magicdrive_core.model.context import Context
    from magicdrive_core.model.transformer import MagicDrive

_PER_VIEW = ("cams", "rel_pos", "bbox_bboxes", "bbox_classes", "bbox_masks")  # rows are B*V


def read_npz(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the arrays of a golden file as tensors, and its settings.

    Args:
        path: a ``golden_*.npz``.

    Returns:
        The tensors by name, and the settings of the entry ``__meta_json__``.

    Raises:
        MagicDriveError: the file is missing, or is not a golden file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "__meta_json__"}
            return arrays, json.loads(bytes(file["__meta_json__"]))
    except FileNotFoundError:
        raise MagicDriveError(f"{path} is missing", "pass a golden_*.npz of the reference data") from None
    except UNREADABLE_ZIP as error:
        raise MagicDriveError(f"{path} is no golden file: {error}", "pass a golden_*.npz") from None


def load_golden_network(path: Path, meta: Mapping[str, Any]) -> MagicDrive:
    """Builds the network that a case describes, with the weights of the file that it names.

    Args:
        path: the case; the weights are in the same folder.
        meta: the case's settings, from ``read_npz``.

    Returns:
        The network in evaluation mode.

    Raises:
        MagicDriveError: the file of weights is missing, or is not a golden file.
    """
    weights, weights_meta = read_npz(path.parent / meta["weights_file"])
    network = build_network(golden_config({**weights_meta, **meta}))
    network.load_state_dict(weights, strict=True)
    return network.eval()


def golden_config(meta: Mapping[str, Any]) -> NetworkConfig:
    """Translates a golden file's settings to the sizes of this network.

    Args:
        meta: settings of a case, joined with those of its file of weights.

    Returns:
        The sizes of a published network.
    """
    config = meta["config"]
    box, ego = config["bbox_embedder_param"], config["frame_emb_param"]
    order = meta.get("mv_order_map", {})
    neighbours = {} if not order else {"neighbours": tuple(tuple(order[str(view)]) for view in range(len(order)))}
    return NetworkConfig(
        width=config["hidden_size"],
        depth=config["depth"],
        heads=config["num_heads"],
        control_depth=config["control_depth"],
        ego_heads=ego["num_heads"],
        box_heads=box["num_heads"],
        box_widths=tuple(box["proj_dims"][:-1]),
        map_channels=tuple(config["map_embedder_param"]["block_out_channels"]),
        latent_channels=config["in_channels"],
        text_width=config["caption_channels"],
        text_tokens=config["model_max_length"],
        temporal=config["with_temp_block"],
        control_temporal=not config.get("control_skip_temporal", False),
        instance_latent=box["sample_id"],
        mean_over_frames="time_downsample_factor" not in box,
        rays=0,
        published=True,
        class_width=box["class_token_dim"],
        map_layers=config["map_embedder_param"]["conditioning_size"][0],
        classes=box["n_classes"],
        mlp_ratio=int(config["mlp_ratio"]),
        pad_patches=meta.get("force_pad_h_for_sp_size") or config.get("force_pad_h_for_sp_size"),
        **neighbours,
    )


def read_conditions(arrays: Mapping[str, Tensor]) -> Conditions:
    """Reads the ``in/`` arrays of a case as conditions; rows b*V+v become (B, V, ...).

    Args:
        arrays: the case's tensors by name, from ``read_npz``.

    Returns:
        The conditions; without masks in the file nothing is dropped and all text tokens count.
    """
    maps = arrays["in/maps"]
    batch, frames = maps.shape[:2]
    rows = {name: arrays[f"in/{name}"].unflatten(0, (batch, -1)) for name in _PER_VIEW}
    latent = arrays.get("in/bbox_box_latent")
    text = arrays["in/y"][:, 0]
    return Conditions(
        text=text,
        text_mask=arrays.get("in/mask", torch.ones(text.shape[:2])).bool(),
        cameras=rows["cams"][:, :, :, 0],
        ego_motion=rows["rel_pos"][:, 0, :, 0],
        box_corners=rows["bbox_bboxes"],
        box_classes=rows["bbox_classes"].long(),
        box_masks=rows["bbox_masks"].long(),
        bev_map=pack_map(maps),
        height=arrays["in/height"],
        width=arrays["in/width"],
        fps=arrays["in/fps"],
        keep=arrays.get("in/drop_cond_mask", torch.ones(batch)).bool(),
        keep_frame=arrays.get("in/drop_frame_mask", torch.ones(batch, frames)).bool(),
        box_latent=None if latent is None else latent.unflatten(0, (batch, -1))[:, 0, 0],
    )


def views_from_channels(x: Tensor, views: int) -> Tensor:
    """Separates the views, which the published system interleaves with the channels (view fastest).

    Args:
        x: (B, C * V, T, H, W).
        views: V.

    Returns:
        (B, V, C, T, H, W).
    """
    return rearrange(x, "b (c v) t h w -> b v c t h w", v=views)


def channels_from_views(x: Tensor) -> Tensor:
    """Interleaves views with channels, the inverse of ``views_from_channels``.

    Args:
        x: (B, V, C, T, H, W).

    Returns:
        (B, C * V, T, H, W), view fastest.
    """
    return rearrange(x, "b v c t h w -> b (c v) t h w")


# The check -----------------------------------------------------------------------------------------------------------

TOLERANCE = 5e-5  # largest difference of the output in fp32


@dataclass(frozen=True)
class GoldenResult:
    """The differences between this network and one golden case.

    Attributes:
        rows: name and largest absolute difference (NaN: this network has no such part); the last name is "out".
    """

    rows: list[tuple[str, float]]

    @property
    def agrees(self) -> bool:
        """Whether the output is within the tolerance."""
        return self.rows[-1][1] <= TOLERANCE


def check_golden(path: Path | str) -> GoldenResult:
    """Runs a ``golden_model_*.npz`` and compares the output, and every intermediate that the file holds.

    Args:
        path: the file; its weights are in the same folder.

    Returns:
        The largest absolute difference of each intermediate and of the output.

    Raises:
        MagicDriveError: it is not a golden model file, or its weights are missing.
    """
    path = Path(path)
    arrays, meta = read_npz(path)
    if "out" not in arrays or "config" not in meta:
        raise MagicDriveError(f"{path} is not a golden model file", "pass golden_model_*.npz, not *_weights.npz")
    network = load_golden_network(path, meta)
    conditions = read_conditions(arrays)
    views = conditions.cameras.shape[1]
    latents = views_from_channels(arrays["in/x"], views)
    with torch.no_grad(), _recorded(network) as found:
        context = network.encode(conditions, tuple(latents.shape[3:]))
        out = network.denoise(latents, arrays["in/timestep"], context, arrays.get("in/x_mask"))
    found |= _of_context(context, conditions.height[0] * conditions.width[0])
    rows = []
    for name, expected in arrays.items():
        if name.startswith("mid/"):
            ours = found.get(name.removeprefix("mid/"))
            rows.append((name, float("nan") if ours is None else _difference(name, ours, expected, views)))
    return GoldenResult([*rows, ("out", float((channels_from_views(out) - arrays["out"]).abs().max()))])


def _of_context(context: Context, pixels: Tensor) -> dict[str, Tensor]:
    """Intermediates that are no module's output."""
    rows, columns = context.grid
    return {
        "pos_emb": context.position,
        "pos_emb_args": torch.tensor([rows, columns, float(pixels) ** 0.5 / 512, round((rows * columns) ** 0.5)]),
        "cond_sequence": context.tokens.by_frame(context.tokens.rows, context.tokens.frames),
    }


def _difference(name: str, ours: Tensor, expected: Tensor, views: int) -> float:
    """Largest absolute difference after ours is laid out like the file's: rows b*V+v, all views in full."""
    if name.endswith("controlnet_cond_embedder_temp"):
        ours = rearrange(ours, "b t c h w -> b c t h w")
    elif "_t." in name and name.endswith(".attn"):
        ours = rearrange(ours, "b v t s c -> b v s t c")
    if expected.numel() == views * ours.numel():
        ours = ours.repeat_interleave(views, dim=0)
    return float((ours.reshape(expected.shape) - expected).abs().max())


@contextmanager
def _recorded(network: MagicDrive) -> Iterator[dict[str, Tensor]]:
    """Collects the first output of every module that the golden files know, by their names."""
    found: dict[str, Tensor] = {}
    handles = []

    def keep(module: nn.Module, name: str) -> None:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            found.setdefault(name, output)

        handles.append(module.register_forward_hook(hook))

    def keep_norm(block: nn.Module, name: str) -> None:
        def hook(_module: nn.Module, inputs: Any) -> None:
            found[name] = functional.layer_norm(inputs[0], inputs[0].shape[-1:], eps=NORM_EPS)

        handles.append(block.register_forward_pre_hook(hook))

    def keep_pairs(attention: nn.Module, name: str) -> None:
        def hook(module: Any, inputs: Any, _output: Tensor) -> None:
            found[name] = _view_pairs(module, *inputs)

        handles.append(attention.register_forward_hook(hook))

    tokens = {"camera_embedder": "camera_token", "frame_embedder": "frame_token"}
    for name, module in network.named_children():
        if not isinstance(module, nn.ModuleList):
            keep(module, tokens.get(name, name))
            continue
        for index, block in enumerate(module):
            if isinstance(block, ControlBlock):
                keep(block, f"{name}.{index}.0")
                keep(block.after_proj, f"{name}.{index}.1")
            else:
                keep(block, f"{name}.{index}")
        first = dict(module[0].named_children()) if len(module) else {}
        if first:
            keep_norm(module[0], f"{name}.0.norm1")
        for part in ("attn", "cross_attn", "mva_proj", "mlp"):
            if part in first:
                keep(first[part], f"{name}.0.{part}")
        if "cross_view_attn" in first:
            keep_pairs(first["cross_view_attn"], f"{name}.0.cross_view_attn")
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _view_pairs(module: CrossViewAttention, x: Tensor, shift: Tensor, scale: Tensor, _: int) -> Tensor:
    """Attention of every view to each of its neighbours, projected, before the sum: (V * neighbours, B, T, S, C)."""
    q, k, v = (part.unbind(1) for part in normed_heads(module.packed(x, shift, scale), module.norm))
    pairs = []
    for view, others in enumerate(module.neighbours):
        for other in others:
            arguments = (rearrange(part, "b t s h d -> (b t) s h d") for part in (q[view], k[other], v[other]))
            pairs.append(module.proj(rearrange(attend(*arguments), "(b t) s h d -> b t s (h d)", b=len(x))))
    return torch.stack(pairs)
