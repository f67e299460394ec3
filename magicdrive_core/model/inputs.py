"""The conditions of a batch as tensors. B samples, V views, F frames, N box slots, L text tokens, D text width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from magicdrive_core.data.records import ClipConditions
    from magicdrive_core.model.config import NetworkConfig


@dataclass(frozen=True)
class Conditions:
    """All that the network is conditioned on. Floating-point tensors are fp32, unless the network has another dtype."""

    text: Tensor  # B, L, D features
    text_mask: Tensor  # B, L bool: True = a token of the prompt
    cameras: Tensor  # B, V, F, 3, 7: K | camera-to-lidar R | t; the network looks at frame 0
    ego_motion: Tensor  # B, F, 4, 4: first lidar frame -> this lidar frame
    box_corners: Tensor  # B, V, F, N, 8, 3 metres
    box_classes: Tensor  # B, V, F, N int64, -1 where absent
    box_masks: Tensor  # B, V, F, N int64: 1 shown, 0 no box, -1 hidden
    bev_map: Tensor  # B, F, h, w uint8: bit k of a cell is layer k
    height: Tensor  # B pixels of the video
    width: Tensor  # B
    fps: Tensor  # B: 12, or 120 for single frames
    keep: Tensor  # B bool: False = every condition is dropped; published, all but the map
    keep_frame: Tensor  # B, F bool: False = ego motion and boxes of the frame are dropped
    box_latent: Tensor | None = None  # B, N, C: a standard normal vector an object, shared by frames and views
    pad_patches: int | None = None  # published only: parallel size whose padding rows are added; None: the network's
    longest_text: int | None = None  # tokens of the longest prompt; None: read from text_mask, which waits for a device

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        """Applies a function to each tensor; numbers and None are kept.

        Args:
            change: maps a tensor to its replacement.

        Returns:
            The changed copy.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> Conditions:
        """Copies the conditions to a device, without waiting for transfers from pinned memory.

        Args:
            device: where the tensors of the copy are.

        Returns:
            The copy.
        """
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def dropped(self) -> Conditions:
        """Builds the unconditional state of training: everything is dropped (golden notes, oddities 9 and 22).

        Returns:
            The same conditions with ``keep`` False for every sample.
        """
        return replace(self, keep=torch.zeros_like(self.keep))


def collate(
    clips: Sequence[ClipConditions], text: Sequence[Tensor], max_tokens: int, keep: Tensor | None = None
) -> Conditions:
    """Stacks the conditions of clips of one size and length.

    Box slots are padded to the longest clip's, at least one: corners 0, class -1, mask 0. Text features are padded with
    zeros to ``max_tokens``, and the mask marks the prompt's own tokens.

    Args:
        clips: conditions of each of B clips.
        text: (l, D) features of each clip's caption; cut to ``max_tokens``.
        max_tokens: L.
        keep: (B) bool, False = every condition of the sample is dropped; None: none is.

    Returns:
        The batch on the CPU, without box latents; no frame's ego motion or boxes are dropped.
    """
    slots = max(1, *(clip.box_classes.shape[1] for clip in clips))
    views = clips[0].cameras.shape[1]

    def pad_slots(array: Tensor, dim: int, value: float) -> Tensor:
        missing = slots - array.shape[dim]
        return functional.pad(array, (0, 0) * (array.ndim - 1 - dim) + (0, missing), value=value)

    corners, classes, masks = [], [], []
    for clip in clips:
        corners.append(pad_slots(torch.from_numpy(clip.box_corners).float(), 1, 0.0))
        classes.append(pad_slots(torch.from_numpy(clip.box_classes), 1, -1))
        masks.append(pad_slots(torch.from_numpy(clip.box_masks), 2, 0).transpose(0, 1))
    features = torch.stack([functional.pad(t[:max_tokens], (0, 0, 0, max(0, max_tokens - len(t)))) for t in text])
    lengths = torch.tensor([min(len(t), max_tokens) for t in text])
    frames = clips[0].ego_motion.shape[0]
    return Conditions(
        text=features,
        text_mask=torch.arange(max_tokens)[None] < lengths[:, None],
        cameras=torch.stack([torch.from_numpy(clip.cameras).float() for clip in clips]).transpose(1, 2).contiguous(),
        ego_motion=torch.stack([torch.from_numpy(clip.ego_motion).float() for clip in clips]),
        box_corners=torch.stack(corners)[:, None].expand(-1, views, -1, -1, -1, -1),
        box_classes=torch.stack(classes)[:, None].expand(-1, views, -1, -1),
        box_masks=torch.stack(masks),
        bev_map=torch.stack([torch.from_numpy(clip.bev_map) for clip in clips]),
        height=torch.tensor([float(clip.height) for clip in clips]),
        width=torch.tensor([float(clip.width) for clip in clips]),
        fps=torch.tensor([float(clip.fps) for clip in clips]),
        keep=torch.ones(len(clips), dtype=torch.bool) if keep is None else keep,
        keep_frame=torch.ones(len(clips), frames, dtype=torch.bool),
        longest_text=int(lengths.max()),
    )


def pack_map(layers: Tensor) -> Tensor:
    """Packs the layers of a BEV map into bits, an eighth of a byte for each layer of a cell.

    Args:
        layers: (..., layers, h, w) of 0 and 1, eight layers at most.

    Returns:
        (..., h, w) uint8; bit k of a cell is layer k.
    """
    bits = torch.zeros_like(layers.select(-3, 0), dtype=torch.uint8)
    for index, layer in enumerate(layers.unbind(-3)):
        bits |= layer.to(torch.uint8) << index
    return bits


def unpack_map(bits: Tensor, layers: int, dtype: torch.dtype) -> Tensor:
    """Unpacks the bits of a BEV map.

    Args:
        bits: (..., h, w) uint8; bit k of a cell is layer k.
        layers: number of layers.
        dtype: data type of the result.

    Returns:
        (..., layers, h, w) of 0 and 1.
    """
    masks = 2 ** torch.arange(layers, device=bits.device, dtype=torch.uint8)
    return (bits.unsqueeze(-3) & masks[:, None, None]).ne_(0).to(dtype)


def blank_conditions(
    config: NetworkConfig,
    frames: int,
    *,
    batch: int = 1,
    slots: int = 1,
    cells: int = 32,
    device: torch.device | str = "cpu",
) -> Conditions:
    """Makes conditions that are zeros, for passes whose numbers do not matter.

    Args:
        config: sizes of the network.
        frames: F.
        batch: B.
        slots: N.
        cells: rows and columns of the BEV map.
        device: where the tensors are.

    Returns:
        The conditions of the clips with V = ``len(config.neighbours)`` views, with box latents.
    """
    B, V, N, L = batch, len(config.neighbours), slots, config.text_tokens

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return Conditions(
        text=zeros(B, L, config.text_width),
        text_mask=zeros(B, L, dtype=torch.bool),
        cameras=zeros(B, V, frames, 3, 7),
        ego_motion=zeros(B, frames, 4, 4),
        box_corners=zeros(B, V, frames, N, 8, 3),
        box_classes=zeros(B, V, frames, N, dtype=torch.int64),
        box_masks=zeros(B, V, frames, N, dtype=torch.int64),
        bev_map=zeros(B, frames, cells, cells, dtype=torch.uint8),
        height=zeros(B),
        width=zeros(B),
        fps=zeros(B),
        keep=zeros(B, dtype=torch.bool),
        keep_frame=zeros(B, frames, dtype=torch.bool),
        box_latent=zeros(B, N, config.class_width or config.width),
        longest_text=L,
    )
