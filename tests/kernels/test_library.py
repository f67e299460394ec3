"""The kernels are compiled once for each processor; without a compiler torch's do the same."""

from __future__ import annotations

import logging
import os
import pwd
import stat
from collections.abc import Callable, Iterator
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


@pytest.fixture
def compilations(anew: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Notes each compilation; the compiler copies a library that exists, which is fast."""
    notes, compiler = tmp_path / "compilations", tmp_path / "compiler"
    existing = torch._C.__file__  # any library that can be loaded
    compiler.write_text(
        f"""#!/bin/sh
test "$1" = --version && exit
for last; do :; done
cp "{existing}" "$last" && echo >> "{notes}"
"""
    )
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    assert library() is not None
    library.cache_clear()
    assert library() is not None
    assert notes.read_text() == "\n"
    return notes


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def let_others_write(path: Path) -> None:
    path.chmod(0o722)


def give_away(path: Path) -> None:
    os.chown(path, 12345, -1)


def put_a_link(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


@pytest.mark.parametrize("damage", [cut_in_half, change_a_byte, let_others_write, give_away, put_a_link])
def test_a_kept_library_that_others_may_have_written_or_that_is_not_whole_is_compiled_again(
    damage: Callable[[Path], None], anew: Path, compilations: Path
) -> None:
    if damage is give_away and os.getuid():
        pytest.skip("only root can give a file to another user")
    (kept,) = anew.glob("kernels-*.so")
    damage(kept)
    library.cache_clear()
    assert library() is not None
    assert compilations.read_text() == "\n\n"
    assert module._is_intact(kept)


def test_only_its_owner_enters_the_folder_of_compiled_kernels(anew: Path, compilations: Path) -> None:
    anew.chmod(0o777)
    library.cache_clear()
    assert library() is not None
    assert stat.S_IMODE(anew.stat().st_mode) == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_nothing_is_loaded_from_the_folder_of_another_user(
    anew: Path, compilations: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.chown(anew, 12345, -1)
    library.cache_clear()
    assert library() is None
    (line,) = caplog.messages
    assert "belongs to another user" in line


@pytest.mark.parametrize("home", ["", None])
def test_without_home_the_users_own_folder_is_used(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "")
    if home is None:
        monkeypatch.delenv("HOME")
    assert module._cache_folder() == Path(pwd.getpwuid(os.getuid()).pw_dir) / ".cache/magicdrive"


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
