"""What each view's pixels look at: rays of the cameras, cut with the boxes and with the ground.

The published network has box tokens and a BEV map in the frame of the lidar, the same for all views: it must learn
from examples where in a picture a box or a lane appears. Here this is computed. Each patch has n x n rays. A ray's
features are its direction, what the BEV map holds where it meets the ground, and the class, the depth and the place on
the box of the nearest box that it meets (slab test: Kay and Kajiya, "Ray tracing complex scenes", 1986).

Shapes: B samples, V views, F frames, T latent frames, N box slots, S patches of a frame, P = n x n rays of a patch,
R = S * P rays.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from magicdrive_core.data.records import MAP_EXTENT
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH
from magicdrive_core.model.blocks import Mlp
from magicdrive_core.model.config import PATCH, NetworkConfig
from magicdrive_core.model.context import TokenShard
from magicdrive_core.model.inputs import Conditions, unpack_map

LIDAR_HEIGHT = 1.84  # metres above the ground, of nuScenes' LIDAR_TOP
HALF_DEPTH = 5.0  # metres at which the feature of the depth is a half
DIRECTION, GROUND, BOX = 3, 1, 4  # features of a ray beside the map's layers and the classes
PARALLEL = 1e-6  # a ray's component at which it counts as parallel to a plane


class RayEmbedder(nn.Module):
    """Tokens of what the rays of each patch meet: an MLP of all features of its rays.

    Args:
        config: sizes of the network; ``rays`` is n.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.rays, self.classes, self.layers = config.rays, config.classes, config.map_layers
        self.mlp = Mlp(config.rays**2 * ray_features(config), config.width, config.width)

    def forward(
        self, conditions: Conditions, latent_shape: tuple[int, int, int], grid: tuple[int, int], tokens: TokenShard
    ) -> Tensor:
        """Embeds what the rays meet.

        A latent frame takes the second of the frames that it stands for.

        Args:
            conditions: cameras, boxes, map and size of the video are read; dropped ones give features of 0.
            latent_shape: T, H, W of the latents.
            grid: rows and columns of patches.
            tokens: which patches this rank computes.

        Returns:
            (B, V, T, S, C), this rank's tokens.
        """
        features = self.features(conditions, latent_shape, grid, tokens)
        return self.mlp(rearrange(features.to(self.mlp.fc1.weight.dtype), "b v t s p f -> b v t s (p f)"))

    @torch.no_grad()
    def features(
        self, conditions: Conditions, latent_shape: tuple[int, int, int], grid: tuple[int, int], tokens: TokenShard
    ) -> Tensor:
        """Computes the features of all rays.

        Args:
            conditions: cameras, boxes, map and size of the video are read.
            latent_shape: T, H, W of the latents.
            grid: rows and columns of patches.
            tokens: which patches this rank computes.

        Returns:
            (B, V, T, S, P, features), fp32: direction (3); nearness of the ground and the map's layers there; nearness
            of the box, its class (one-hot) and the place on it (3, each from -1 to 1 along the box's axes).
        """
        frames = [max(0, 4 * t - 2) for t in range(latent_shape[0])]
        pixels = tokens.shard(self._pixels(conditions, latent_shape, grid))  # (B, S, 2P)
        pixels = rearrange(pixels, "b s (p xy) -> b (s p) xy", xy=2)
        shown = (conditions.box_masks == 1) & conditions.keep_frame[:, None, :, None]
        samples = []
        for sample in range(len(conditions.keep)):
            rows = []
            for view in range(conditions.cameras.shape[1]):
                for frame in frames:
                    camera = conditions.cameras[sample, :, frame].float()
                    up = functional.normalize(-camera[:, :, 4].mean(0), dim=0)
                    origin, rays = camera_rays(camera[view], pixels[sample])
                    at = sample, view, frame
                    corners, kinds = conditions.box_corners[at].float(), conditions.box_classes[at]
                    seen = shown[at] & in_view(camera[view], corners)
                    boxes = corners, kinds, seen
                    if seen.device.type == "cpu":  # a fifth of all boxes; a device would have to be waited for
                        boxes = corners[seen], kinds[seen], seen[seen]
                    layers = unpack_map(conditions.bev_map[sample, frame], self.layers, torch.float32)
                    ground = ground_features(origin, rays, up, layers)
                    met = box_features(origin, rays, *boxes, self.classes)
                    rows.append(torch.cat([functional.normalize(rays, dim=-1), ground, met], dim=-1))
            samples.append(torch.stack(rows) * conditions.keep[sample])
        return rearrange(
            torch.stack(samples),
            "b (v t) (s p) f -> b v t s p f",
            t=len(frames),
            p=self.rays**2,
        )

    def _pixels(self, conditions: Conditions, latent_shape: tuple[int, int, int], grid: tuple[int, int]) -> Tensor:
        """Returns the pixels (column, row) of the 1600x900 picture that the rays of all patches pass: (B, S, 2P)."""
        ratio = conditions.width.float() / PICTURE_WIDTH  # (B) as in geometry.cameras.Framing
        crop = (PICTURE_HEIGHT * ratio + 1e-3).floor() - conditions.height
        side = PATCH * conditions.width / latent_shape[2] / self.rays  # (B) video pixels between rays
        device = ratio.device
        rows, columns = (
            (torch.arange(count * self.rays, device=device) + 0.5) * side[:, None] for count in grid
        )  # (B, count * n)
        rows, columns = (rows + crop[:, None]) / ratio[:, None], columns / ratio[:, None]
        pixels = torch.stack(
            [columns[:, None].expand(-1, rows.shape[1], -1), rows[..., None].expand(-1, -1, columns.shape[1])], dim=-1
        )
        return rearrange(pixels, "b (h p) (w q) xy -> b (h w) (p q xy)", p=self.rays, q=self.rays)


def ray_features(config: NetworkConfig) -> int:
    """Counts the features of a ray.

    Args:
        config: sizes of the network.

    Returns:
        Direction, ground with the map's layers, box with the classes.
    """
    return DIRECTION + GROUND + config.map_layers + BOX + config.classes


def camera_rays(camera: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the rays of pixels in the lidar frame.

    Args:
        camera: (3, 7), [K | R | t]: K in pixels, camera-to-lidar R, t in metres.
        pixels: (R, 2), column and row.

    Returns:
        Origin (3) and directions (R, 3), as long as one metre of depth.
    """
    focal, centre = camera.diagonal()[:2], camera[:2, 2]
    inside = functional.pad((pixels - centre) / focal, (0, 1), value=1.0)
    return camera[:, 6], inside @ camera[:, 3:6].T


def in_view(camera: Tensor, corners: Tensor) -> Tensor:
    """Tells which boxes a picture may show: those whose sphere reaches into its left and right edge.

    Args:
        camera: (3, 7), [K | R | t] as in ``camera_rays``.
        corners: (N, 8, 3) of the boxes, in the lidar frame.

    Returns:
        (N) bool; True for every box that a ray of the picture can meet.
    """
    centres = corners.mean(1)
    radii = (corners[:, 0] - centres).norm(dim=-1)
    inside = (centres - camera[:, 6]) @ camera[:, 3:6]  # camera frame: x right, z forward
    focal, middle = camera[0, 0], camera[0, 2]
    left = inside[:, 0] * focal + inside[:, 2] * middle
    right = -inside[:, 0] * focal + inside[:, 2] * (PICTURE_WIDTH - middle)
    return (left > -radii * focal.hypot(middle)) & (right > -radii * focal.hypot(PICTURE_WIDTH - middle))


def ground_features(origin: Tensor, rays: Tensor, up: Tensor, bev_map: Tensor) -> Tensor:
    """Looks up the BEV map where rays meet the ground, a plane ``LIDAR_HEIGHT`` below the lidar.

    Args:
        origin: (3), of all rays, in the lidar frame.
        rays: (R, 3) directions, as long as one metre of depth.
        up: (3), unit vector: the mean of all cameras' upward axes, 0.1 degrees from the vertical with nuScenes' rig.
        bev_map: (layers, rows along the lidar's x, columns along its y).

    Returns:
        (R, 1 + layers): nearness h / (h + depth), h = ``HALF_DEPTH``, and the layers; 0 where the ground is not met.
    """
    falling = rays @ up
    depth = -(LIDAR_HEIGHT + origin @ up) / falling.clamp(max=-PARALLEL)
    met = falling < -PARALLEL
    ahead = functional.normalize(torch.stack([1 - up[0] * up[0], -up[0] * up[1], -up[0] * up[2]]), dim=0)
    axes = torch.stack([torch.linalg.cross(up, ahead), ahead])  # grid_sample has the column first
    place = (origin + depth[:, None] * rays) @ axes.T / (MAP_EXTENT / 2)
    place = torch.where(met[:, None], place, 2.0).clamp(-2, 2)  # 2: outside of the map
    layers = functional.grid_sample(bev_map[None], place[None, None], align_corners=False)[0, :, 0].T
    near = HALF_DEPTH / (HALF_DEPTH + depth)
    return torch.cat([(near * met)[:, None], layers], dim=-1)


def box_features(origin: Tensor, rays: Tensor, corners: Tensor, kinds: Tensor, shown: Tensor, classes: int) -> Tensor:
    """Finds the nearest box that each ray enters.

    Args:
        origin: (3), of all rays, in the lidar frame.
        rays: (R, 3) directions, as long as one metre of depth.
        corners: (N, 8, 3) of the boxes, in the order of ``geometry.boxes.corners``.
        kinds: (N) classes, -1 where there is no box.
        shown: (N) bool, False: the box is not there.
        classes: K.

    Returns:
        (R, 1 + K + 3): nearness as in ``ground_features``, class (one-hot), and the place on the box, from -1 to 1
        along its width, length and height; all 0 where no box is met.
    """
    if not len(corners):
        return rays.new_zeros(len(rays), 1 + classes + 3)
    halves = (corners[:, [4, 3, 1]] - corners[:, :1]).transpose(0, 1) / 2  # (3 axes, N, 3)
    to_unit = halves / halves.square().sum(-1, keepdim=True).clamp(min=PARALLEL)
    start = torch.einsum("anx,nx->an", to_unit, origin - corners.mean(1))[..., None]  # in units of each box
    slope = to_unit @ rays.T  # (3, N, R)
    inverse = 1 / torch.where(slope.abs() < PARALLEL, PARALLEL, slope)
    middle, half = -start * inverse, inverse.abs()
    enter, leave = (middle - half).amax(0), (middle + half).amin(0)  # (N, R) depths
    depth, box = enter.masked_fill((enter > leave) | (enter <= 0) | ~shown[:, None], torch.inf).min(0)
    met = depth.isfinite()
    depth = depth.where(met, 0.0)
    index = box[None, None].expand(3, 1, -1)
    place = (start.expand_as(slope).gather(1, index) + depth * slope.gather(1, index))[:, 0].T
    near = HALF_DEPTH / (HALF_DEPTH + depth)
    kind = functional.one_hot(kinds.clamp(min=0)[box], classes)
    return torch.cat([near[:, None], kind, place], dim=-1) * met[:, None]
