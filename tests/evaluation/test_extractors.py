"""The user's I3D is taken by its digest and its form; the built-in extractor orders what is near and far."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from magicdrive_core.config.schema import I3D
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.evaluation.extractors import SmallExtractor, TorchScriptI3D
from magicdrive_core.evaluation.frechet import Statistics, frechet_distance
from magicdrive_core.utils.files import sha256_file


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3, 4)).repeat(1, 134)[:, :400]


class WithFlags(nn.Module):
    """The signature of the file that FVD scripts pass around."""

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        out = x.mean(dim=(2, 3, 4)).repeat(1, 134)[:, :400]
        return out if return_features and not rescale and not resize else torch.softmax(out, dim=1)


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3, 4))


def saved(module: nn.Module, folder: Path) -> I3D:
    path = folder / "i3d.pt"
    torch.jit.script(module).save(str(path))
    return I3D(path="i3d.pt", sha256=sha256_file(path))


def clips(seed: int = 0, count: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3, 16, 224, 224)).astype(np.float32)


@pytest.mark.parametrize("module", [Plain(), WithFlags()])
def test_logits_come_before_any_softmax(module: nn.Module, tmp_path: Path) -> None:
    given = clips()
    logits = TorchScriptI3D(saved(module, tmp_path), tmp_path)(given)
    assert (logits.shape, logits.dtype) == ((2, 400), np.float64)
    np.testing.assert_allclose(logits[:, :3], given.mean(axis=(2, 3, 4)), atol=1e-5)


def test_what_is_not_the_named_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MagicDriveError, match=r"scores\.i3d\.path: .*none\.pt is missing"):
        TorchScriptI3D(I3D(path="none.pt", sha256="0" * 64), tmp_path)
    settings = saved(Plain(), tmp_path)
    with pytest.raises(MagicDriveError, match=r"has SHA-256 .*, expected .*scores\.i3d\.sha256"):
        TorchScriptI3D(settings.model_copy(update={"sha256": "0" * 64}), tmp_path)
    (tmp_path / "text.pt").write_text("no module")
    with pytest.raises(MagicDriveError, match="is not a TorchScript module"):
        TorchScriptI3D(I3D(path="text.pt", sha256=sha256_file(tmp_path / "text.pt")), tmp_path)
    with pytest.raises(MagicDriveError, match=r"returns \(2, 3\) for 2 clips, expected logits \(2, 400\)"):
        TorchScriptI3D(saved(Pooled(), tmp_path), tmp_path)(clips())


def test_more_noise_is_farther_away() -> None:
    extractor, rng = SmallExtractor(), np.random.default_rng(1)
    coarse = rng.uniform(-0.8, 0.8, (4, 3, 1, 7, 7)).astype(np.float32)
    still = np.kron(coarse, np.ones((1, 1, 16, 32, 32), np.float32))
    noise = rng.normal(size=still.shape).astype(np.float32)
    truth = Statistics.of(extractor(still))
    far = [frechet_distance(truth, Statistics.of(extractor(still + level * noise))) for level in (0, 0.3, 0.6, 1.2)]
    assert far[0] == pytest.approx(0, abs=1e-9)
    assert far == sorted(far)
    assert far[1] > 1e-6


def test_order_in_time_counts() -> None:
    extractor = SmallExtractor()
    ramp = np.linspace(-1, 1, 224, dtype=np.float32)
    moving = np.stack([np.roll(np.tile(np.sign(ramp), (3, 224, 1)), 8 * n, axis=-1) for n in range(16)], axis=1)[None]
    shuffled = moving[:, :, np.random.default_rng(0).permutation(16)]
    assert np.abs(extractor(moving) - extractor(shuffled)).max() > 1e-3
    np.testing.assert_array_equal(extractor(moving), SmallExtractor()(moving))
