"""A small classifier that finds the regions of a generated city's pictures by their colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from magicdrive_core.synthetic.light import DAY, NIGHT, RAIN, Light
from magicdrive_core.synthetic.regions import Region, Regions
from magicdrive_core.video.colour import Picture

LIGHTS = (DAY, NIGHT, RAIN)
SQUARES = (3, 7, 15)  # pixels per side of the squares around a pixel whose mean colours count beside its own
ABOVE_BELOW = (-24, -12, 12, 24)  # rows from it to the middles of others, of the largest side
WIDTH = 96
STEPS, BATCH, RATE = 3000, 1024, 3e-3
SEED = 1


@dataclass(frozen=True)
class Frame:
    """One view of one scene with its exact regions."""

    light: Light
    picture: Picture  # (H, W, 3), rendered
    regions: Regions  # (H, W), exact


class RegionClassifier:
    """A perceptron from the colours of a pixel and of its surroundings, and the light, to the pixel's region.

    The position of a pixel in the picture is no input, so that the classifier cannot learn where roads usually are.
    """

    def __init__(self, network: nn.Module) -> None:
        """Wrap a trained network; ``learn`` trains one.

        Args:
            network: From features (..., 27) of pixels to logits (..., regions), in the order of ``Region``.
        """
        self._network = network

    @classmethod
    def learn(cls, frames: Sequence[Frame]) -> RegionClassifier:
        """Train on pictures whose regions are known; the same frames and number of threads give the same classifier.

        Args:
            frames: Pictures with their exact regions; each pixel is a sample.

        Returns:
            The trained classifier, on the CPU.
        """
        features = torch.cat([_features(frame.light, frame.picture).flatten(0, 1) for frame in frames])
        regions = torch.from_numpy(np.concatenate([frame.regions.ravel() for frame in frames])).long()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            network = nn.Sequential(
                nn.Linear(features.shape[1], WIDTH),
                nn.SiLU(),
                nn.Linear(WIDTH, WIDTH),
                nn.SiLU(),
                nn.Linear(WIDTH, len(Region)),
            )
            optimizer = torch.optim.AdamW(network.parameters(), RATE, fused=True)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
            for _ in range(STEPS):
                chosen = torch.randint(len(features), (BATCH,))
                optimizer.zero_grad()
                functional.cross_entropy(network(features[chosen]), regions[chosen]).backward()
                optimizer.step()
                schedule.step()
        return cls(network.eval().requires_grad_(False))

    def shares(self, light: Light, picture: Picture) -> NDArray[np.float32]:
        """Compute the probability of each region for each pixel of a picture.

        Args:
            light: The lighting of the scene, one of ``LIGHTS``.
            picture: uint8 RGB picture (H, W, 3).

        Returns:
            Probabilities (H, W, regions), float32, in the order of ``Region``; they sum to 1 over the last axis.
        """
        shares: NDArray[np.float32] = self._network(_features(light, picture)).softmax(dim=-1).numpy()
        return shares


def _features(light: Light, picture: Picture) -> Tensor:
    """Return (H, W, 27): colours of the pixel and of the means around it in [-1, 1], and one of three lights."""
    colours = picture.astype(np.float32) / 127.5 - 1
    means = [cv2.blur(colours, (side, side), borderType=cv2.BORDER_REFLECT_101) for side in SQUARES]
    rows = np.arange(len(picture))[:, None] + ABOVE_BELOW
    others = [means[-1][column] for column in rows.clip(0, len(picture) - 1).T]
    kind = np.broadcast_to(np.array([light == other for other in LIGHTS], np.float32), (*picture.shape[:2], 3))
    return torch.from_numpy(np.concatenate([colours, *means, *others, kind], axis=-1))
