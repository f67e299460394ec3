"""Sizes and variants of the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from magicdrive_core.geometry.cameras import VIEWS, ring_neighbours

if TYPE_CHECKING:
    from magicdrive_core.config.schema import Model, Stage

PATCH = 2  # rows and columns of latents in a patch


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes and variants of the network.

    Attributes:
        width: C, channels of a token.
        depth: spatial blocks of the main branch; as many temporal ones where there are any.
        heads: attention heads of a block.
        control_depth: layers of the main branch that have a control block beside them.
        ego_heads: heads of the ego-motion embedder.
        box_heads: heads of the box embedder.
        box_widths: output widths of the box projection: of its first linear layer, then of the hidden ones.
        map_channels: channels of the BEV map's convolutions.
        latent_channels: channels of the VAE's latents.
        text_width: D, channels of the text features.
        text_tokens: most text tokens.
        temporal: whether there are temporal blocks; stage 1 has none.
        instance_latent: whether each object has a random vector; stage 1 has none.
        mean_over_frames: whether box and ego-motion tokens are means over all frames; else a quarter of the frames
            remains.
        rays: rays along each side of a patch that look up boxes and map; 0: none.
        published: whether the network is the published one, oddities included (golden notes, section 6);
            ``build_network`` then picks ``PublishedMagicDrive``.
        control_temporal: whether the control branch has temporal blocks too, where there are any.
        class_width: channels of a box class's vector; None: ``width``.
        map_layers: layers of the BEV map.
        classes: K, box classes.
        mlp_ratio: hidden width of an MLP in multiples of ``width``.
        neighbours: the views that each view attends to, equally many of each.
        pad_patches: published only: rows of patches are appended until this parallel size divides the patches of a
            frame; None: the real size.
    """

    width: int
    depth: int
    heads: int
    control_depth: int
    ego_heads: int
    box_heads: int
    box_widths: tuple[int, ...]
    map_channels: tuple[int, ...]
    latent_channels: int
    text_width: int
    text_tokens: int
    temporal: bool
    instance_latent: bool
    mean_over_frames: bool
    rays: int = 0
    published: bool = False
    control_temporal: bool = True
    class_width: int | None = None
    map_layers: int = 8
    classes: int = 10
    mlp_ratio: int = 4
    neighbours: tuple[tuple[int, ...], ...] = tuple(ring_neighbours(len(VIEWS)))
    pad_patches: int | None = None

    def __post_init__(self) -> None:
        if len({len(others) for others in self.neighbours}) != 1:
            raise ValueError(f"every view needs equally many neighbours: {self.neighbours}")

    @classmethod
    def from_settings(
        cls, model: Model, *, latent_channels: int, text_width: int, text_tokens: int, stage: Stage, published: bool
    ) -> NetworkConfig:
        """Derives the sizes of the network of one training stage from the settings.

        Args:
            model: the ``model`` section of the settings.
            latent_channels: channels of the project's VAE.
            text_width: D, channels of the project's text encoder.
            text_tokens: most text tokens.
            stage: "stage1" has neither temporal blocks nor instance latents.
            published: whether the network is the published one (setting ``published``).

        Returns:
            The configuration; what the settings do not name has its default.
        """
        first = stage == "stage1"
        return cls(
            width=model.width,
            depth=model.depth,
            heads=model.heads,
            control_depth=model.control_depth,
            ego_heads=model.temporal_heads,
            box_heads=model.temporal_heads,
            box_widths=tuple(model.box_widths),
            map_channels=tuple(model.map_channels),
            latent_channels=latent_channels,
            text_width=text_width,
            text_tokens=text_tokens,
            temporal=not first,
            instance_latent=not first,
            mean_over_frames=first,
            rays=model.rays,
            published=published,
        )
