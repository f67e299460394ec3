"""The kernels are compiled once for each processor; without a compiler torch's do the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from magicdrive_core.kernels import library as module
from magicdrive_core.kernels.cpp_ops import attend_packed
from magicdrive_core.kernels.functions import modulated_mlp
from magicdrive_core.kernels.library import library, usable
from tests.kernels import formulas


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache without anything in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    yield tmp_path / "magicdrive"
    library.cache_clear()


def test_the_second_use_compiles_nothing(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library() is not None
    (first,) = anew.iterdir()
    written = first.stat().st_mtime_ns
    library.cache_clear()
    assert library() is not None
    assert [path.stat().st_mtime_ns for path in anew.iterdir()] == [written]
    monkeypatch.setattr(module, "FLAGS", (*module.FLAGS, "-g"))
    library.cache_clear()
    assert library() is not None
    assert len(list(anew.iterdir())) == 2


@pytest.mark.parametrize(("compiler", "said"), [("no-such-compiler", "no C++ compiler"), ("false", "cannot compile")])
def test_without_a_compiler_torchs_kernels_do_it(
    compiler: str, said: str, anew: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.INFO):
        assert not usable(torch.ones(1))
        assert not usable(torch.ones(1))
    (line,) = caplog.messages
    assert said in line
    assert "\n" not in line
    x, zero = torch.randn(5, 32), torch.zeros(32)
    maps = torch.randn(64, 32), torch.randn(64), torch.randn(32, 64), torch.randn(32)
    assert modulated_mlp(x, zero, zero, *maps).shape == x.shape


def test_no_place_for_them_and_torchs_kernels_do_it(
    anew: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert library() is None
    (line,) = caplog.messages
    assert "cannot be used" in line


def test_processors_with_shorter_vectors(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text for AVX2, of which every processor with AVX-512 is capable."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("no AVX2 here")
    flags = ["-march=haswell" if flag == "-march=native" else flag for flag in module.FLAGS]
    monkeypatch.setattr(module, "FLAGS", tuple(flags))
    packed, norm = torch.randn(1, 2, 61, 3, 2, 40), torch.rand(2, 40) + 0.5
    formulas.assert_as_in_fp64(
        lambda packed, norm: attend_packed(packed, norm, 50, None),
        lambda packed, norm: formulas.packed(packed, norm, 50, None),
        (packed, norm),
    )
    x, zero = torch.randn(31, 48), torch.zeros(48)
    maps = torch.randn(80, 48) / 4, torch.randn(80), torch.randn(48, 80) / 4, torch.randn(48)

    def formula(x: torch.Tensor, zero: torch.Tensor, *maps: torch.Tensor) -> torch.Tensor:
        inside = formulas.gelu(torch.nn.functional.linear(formulas.modulated(x, zero, zero), *maps[:2]))
        return torch.nn.functional.linear(inside, *maps[2:])

    formulas.assert_as_in_fp64(lambda x, zero, *maps: modulated_mlp(x, zero, zero, *maps), formula, (x, zero, *maps))
