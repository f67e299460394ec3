"""Building the small encoders, and checking ones that exist."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from magicdrive_core.config.schema import Config, VaeBuild
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.encoders.build_encoders import build_encoders
from magicdrive_core.encoders.small_vae import build_vae, draw_clips, latent_spread, psnr
from magicdrive_core.encoders.vae import Vae
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import sha256_folder
from tests.encoders.conftest import Project, make_config, make_scene, write_infos


def settings(project: Project, **changes: object) -> VaeBuild:
    build = project.config.vae.build
    assert build is not None
    return build.model_copy(update=changes)


@pytest.fixture(scope="module")
def clips(source: Project) -> np.ndarray:
    return draw_clips(read_scenes(source.infos), source.root, "56x104", 9, 3, seed=0)


def test_training_improves_the_pictures(source, clips) -> None:
    quality = {}
    for steps, learning_rate in ((1, 1e-9), (60, 1.5e-3)):  # the start as it is, and trained
        model = build_vae(settings(source, steps=steps, learning_rate=learning_rate, crop=56, batch=4), clips)
        quality[steps] = psnr(Vae(model, scaling_factor=1.0), clips)
    assert quality[60] > quality[1] + 0.5
    assert quality[1] > 18.0


def test_the_same_seed_gives_the_same_weights(source, clips) -> None:
    first, again = (build_vae(settings(source, steps=3), clips).state_dict() for _ in range(2))
    other = build_vae(settings(source, steps=3, seed=9), clips).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["decoder.conv_out.conv.weight"], other["decoder.conv_out.conv.weight"])


def test_building_leaves_the_random_state_alone(source, clips) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_vae(settings(source, steps=1), clips)
    torch.testing.assert_close(torch.rand(3), expected)


def test_psnr_of_a_known_error() -> None:
    class Shifted(Vae):
        """Returns every pixel five steps brighter."""

        def __init__(self) -> None: ...

        def moments(self, video, micro_batch=1):
            return video

        def latents(self, moments, generator=None):
            return moments

        def decode(self, latents):
            yield ((latents + 1) * 127.5 + 5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()

    frames = np.random.default_rng(0).integers(0, 200, (2, 3, 8, 8, 3), dtype=np.uint8)
    assert psnr(Shifted(), frames) == pytest.approx(20 * np.log10(255 / 5), abs=1e-6)


def test_the_facts_are_those_of_the_folders(source, tmp_path) -> None:
    out = tmp_path / "encoders"
    build_encoders(source.config, source.infos, out)
    facts = json.loads((out / "encoders.json").read_text())
    assert facts["vae"]["path"] == (out / "vae").as_posix()
    assert facts["vae"]["digest"] == sha256_folder(out / "vae")
    assert facts["text"]["digest"] == sha256_folder(out / "text")
    assert facts["vae"]["latent_channels"] == 4
    assert facts["text"]["width"] == 64
    assert {"psnr_frames", "psnr_clips", "steps"} < set(facts["vae"])
    clips = draw_clips(read_scenes(source.infos)[:1], source.root, "56x104", 9, 2, source.config.vae.build.seed)
    spread = latent_spread(Vae.load(out / "vae", scaling_factor=1.0), clips)
    assert facts["vae"]["scaling_factor"] == pytest.approx(1 / spread, rel=1e-5)

    existing = make_config(
        source.root,
        vae={"path": str(out / "vae"), "build": None, "scaling_factor": 1.5},
        text={"path": str(out / "text"), "build": None},
    )
    build_encoders(existing, source.infos, tmp_path / "checked")
    checked = json.loads((tmp_path / "checked/encoders.json").read_text())
    assert checked["vae"]["scaling_factor"] == 1.5
    assert checked["vae"]["digest"] == facts["vae"]["digest"]
    assert checked["text"] == facts["text"]
    assert not (tmp_path / "checked/vae").exists()


def test_a_single_key_frame_is_enough(source, tmp_path) -> None:
    scene = make_scene("alone", "both", "One moment", 0, frames=1)
    write_infos(tmp_path / "infos", [scene])
    build_encoders(source.config, tmp_path / "infos", tmp_path / "encoders")
    facts = json.loads((tmp_path / "encoders/encoders.json").read_text())["vae"]
    assert "psnr_frames" in facts
    assert "psnr_clips" not in facts


def check(source: Project, path: Path, key: str, match: str, hint: str) -> None:
    sections = {key: {"path": str(path), "build": None}}
    config: Config = make_config(source.root, **sections)
    with pytest.raises(MagicDriveError, match=match) as caught:
        build_encoders(config, source.infos, path.parent / "out")
    assert hint in caught.value.hint
    assert not (path.parent / "out").exists()


def test_a_missing_vae_names_its_key_and_where_to_get_it(source, tmp_path) -> None:
    check(source, tmp_path / "vae", "vae", r"vae\.path: the folder .* is missing", "CogVideoX-2b")


def test_a_folder_without_weights_is_reported(source, tmp_path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text('{"_class_name": "AutoencoderKLCogVideoX"}')
    check(source, tmp_path / "vae", "vae", "holds no weights", "CogVideoX-2b")


def test_another_kind_of_vae_is_reported(source, tmp_path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "vae/weights.safetensors").write_bytes(b"")
    check(source, tmp_path / "vae", "vae", "holds a AutoencoderKL, not a CogVideoX VAE", "CogVideoX-2b")


def test_scenes_too_short_for_the_build_are_reported(source) -> None:
    with pytest.raises(MagicDriveError, match="no scene has the 33 frames"):
        draw_clips([make_scene("short", "train", "x", 0)], source.root, "56x104", 33, 1, seed=0)
