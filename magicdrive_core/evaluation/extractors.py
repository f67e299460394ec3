"""Feature extractors for clips: the user's own I3D, or a small built-in network whose distance is not called FVD."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from magicdrive_core.config.schema import I3D
from magicdrive_core.device import this_device
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.evaluation.protocol import FRAMES, SIDE
from magicdrive_core.utils.files import sha256_file

LOGITS = 400  # classes of Kinetics-400
_FLAGS = {"rescale": False, "resize": False, "return_features": True}  # of the I3D that FVD scripts pass around


class Extractor(Protocol):
    """Turns clips (B, 3, F, 224, 224) in [-1, 1] into features (B, D)."""

    def __call__(self, clips: NDArray[np.float32]) -> NDArray[np.float64]:
        """Extract the features of clips.

        Args:
            clips: RGB clips (B, 3, F, 224, 224) in [-1, 1] (``protocol.framed``).

        Returns:
            Features (B, D).
        """


class TorchScriptI3D:
    """I3D from a TorchScript file that returns 400 logits, before any softmax."""

    def __init__(self, settings: I3D, project: Path = Path()) -> None:
        """Load the file after checking its digest.

        Args:
            settings: Path of the TorchScript file and its SHA-256.
            project: The project's folder, to which the path is relative.

        Raises:
            MagicDriveError: The file is missing, has another digest, or is not TorchScript.
        """
        path = project / settings.path
        if not path.is_file():
            raise MagicDriveError(
                f"scores.i3d.path: {path} is missing", "put the file there, or set scores.i3d to null"
            )
        found = sha256_file(path)
        if found != settings.sha256:
            raise MagicDriveError(
                f"{path} has SHA-256 {found}, expected {settings.sha256} (scores.i3d.sha256)",
                "use the file with that digest, or name its digest: scores of different weights cannot be compared",
            )
        self._device = this_device()
        try:
            self._module = torch.jit.load(str(path), map_location=self._device).eval()
        except RuntimeError as error:
            raise MagicDriveError(f"{path} is not a TorchScript module: {str(error).splitlines()[0]}") from None
        known = {argument.name for argument in self._module.forward.schema.arguments}
        self._flags = {name: value for name, value in _FLAGS.items() if name in known}
        self._path = path

    @torch.inference_mode()
    def __call__(self, clips: NDArray[np.float32]) -> NDArray[np.float64]:
        """Compute the logits of clips on this process's device.

        Args:
            clips: RGB clips (B, 3, F, 224, 224) in [-1, 1].

        Returns:
            Logits (B, 400), one for each class of Kinetics-400.

        Raises:
            MagicDriveError: The module rejects the clips or returns something else.
        """
        try:
            logits = self._module(torch.from_numpy(clips).to(self._device), **self._flags)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise MagicDriveError(f"{self._path} rejects clips (B, 3, {FRAMES}, {SIDE}, {SIDE}): {reason}") from None
        if not isinstance(logits, Tensor) or logits.shape != (len(clips), LOGITS):
            what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise MagicDriveError(
                f"{self._path} returns {what} for {len(clips)} clips, expected logits ({len(clips)}, {LOGITS})"
            )
        return logits.double().cpu().numpy()


class SmallExtractor:
    """Computes 64 features with a fixed random network: three spatio-temporal convolutions on downsampled clips.

    Random filters respond to edges, colours and motion. The distance falls to 0 as clips become equal and rises with
    noise, but it does not measure what a picture shows.
    """

    WIDTHS = (3, 16, 32, 64)
    SEED = 0

    def __init__(self) -> None:
        rng = np.random.default_rng(self.SEED)  # the same numbers on every machine, which torch does not promise
        self._convolutions = []
        for before, after in zip(self.WIDTHS, self.WIDTHS[1:], strict=False):
            layer = nn.Conv3d(before, after, kernel_size=3, stride=2, padding=1, bias=False)
            weight = rng.standard_normal(layer.weight.shape) * np.sqrt(2 / (27 * before))
            layer.weight = nn.Parameter(torch.from_numpy(weight.astype(np.float32)), requires_grad=False)
            self._convolutions.append(layer)

    @torch.inference_mode()
    def __call__(self, clips: NDArray[np.float32]) -> NDArray[np.float64]:
        """Compute each filter's mean response over space and time.

        Args:
            clips: RGB clips (B, 3, F, 224, 224) in [-1, 1].

        Returns:
            Features (B, 64), not negative.
        """
        x = functional.avg_pool3d(torch.from_numpy(clips), (1, 4, 4))
        for layer in self._convolutions:
            x = functional.relu(layer(x))
        return x.mean(dim=(2, 3, 4)).double().numpy()
