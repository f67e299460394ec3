"""The reference files of the published system: cases of the network as arrays, with their settings.

Their layout: README of the reference data, section 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.model.inputs import Conditions
from magicdrive_core.model.network import MagicDrive, NetworkConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

_PER_VIEW = ("cams", "rel_pos", "bbox_bboxes", "bbox_classes", "bbox_masks")  # rows are B*V


def read_npz(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays of a reference file as tensors, and its settings.

    Raises:
        MagicDriveError: missing or not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "__meta_json__"}
            return arrays, json.loads(bytes(file["__meta_json__"]))
    except FileNotFoundError:
        raise MagicDriveError(f"{path} is missing", "name a golden_*.npz of the reference data") from None
    except (ValueError, KeyError, OSError) as error:
        raise MagicDriveError(f"{path} is no reference file: {error}", "name a golden_*.npz") from None


def load_golden_network(path: Path, meta: Mapping[str, Any]) -> MagicDrive:
    """The network that a case's settings describe, with the weights of the file that it names beside it."""
    weights, weights_meta = read_npz(path.parent / meta["weights_file"])
    network = MagicDrive(golden_config({**weights_meta, **meta}))
    network.load_state_dict(weights, strict=True)
    return network.eval()


def golden_config(meta: Mapping[str, Any]) -> NetworkConfig:
    """Sizes from a reference file's settings."""
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
        published=True,
        class_width=box["class_token_dim"],
        map_layers=config["map_embedder_param"]["conditioning_size"][0],
        classes=box["n_classes"],
        mlp_ratio=int(config["mlp_ratio"]),
        pad_patches=meta.get("force_pad_h_for_sp_size") or config.get("force_pad_h_for_sp_size"),
        **neighbours,
    )


def read_conditions(arrays: Mapping[str, Tensor]) -> Conditions:
    """The ``in/`` arrays of a case as conditions; per-view rows become (B, V, ...), view fastest."""
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
        bev_map=maps,
        height=arrays["in/height"],
        width=arrays["in/width"],
        fps=arrays["in/fps"],
        keep=arrays.get("in/drop_cond_mask", torch.ones(batch)).bool(),
        keep_frame=arrays.get("in/drop_frame_mask", torch.ones(batch, frames)).bool(),
        box_latent=None if latent is None else latent.unflatten(0, (batch, -1))[:, 0, 0],
    )


def views_from_channels(x: Tensor, views: int) -> Tensor:
    """(B, C*V, T, H, W) with the view fastest -> (B, V, C, T, H, W)."""
    return x.unflatten(1, (-1, views)).transpose(1, 2)


def channels_from_views(x: Tensor) -> Tensor:
    """The inverse of ``views_from_channels``."""
    return x.transpose(1, 2).flatten(1, 2)
