"""Clips that are longer than a window, and clips with initial frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from magicdrive_core.config.schema import Config
from magicdrive_core.data.edits import chosen_edits
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.data.map_cache import BevMaps
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.inference import sampler as sampling
from magicdrive_core.inference import writer as writing
from magicdrive_core.inference.generate import generate_items
from magicdrive_core.inference.items import Item, list_items
from magicdrive_core.inference.models import Models
from magicdrive_core.inference.processes import SingleProcess
from magicdrive_core.inference.sampler import Sampler
from magicdrive_core.video.frames import read_view
from magicdrive_core.video.item_record import ItemRecord
from tests.inference.project import STAGE, make_project, small_config, small_scene

LONG = ("generate.frames=25", "generate.window=17", "generate.generations=1", "generate.steps=1", "video.format=png")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    make_project(folder, small_config(), small_scene(26))
    for view in VIEWS:
        path = folder / f"data/samples/{view}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((1600, 900), 60).convert("RGB").save(path)
    return folder


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes files of the network's size, because hundreds of lossless full-size images take minutes."""
    for module in (sampling, writing):
        monkeypatch.setattr(module, "full_size_image", lambda frame: frame)


def make(config: Config, project: Path, out: str) -> tuple[Item, Path]:
    (item,) = list_items(config, read_scenes(project / "artifacts/infos"), project)
    generate_items(config, [item], project / STAGE, project / out, project=project)
    return item, project / out / item.name


def frames(folder: Path, view: str = "CAM_BACK") -> np.ndarray:
    record = ItemRecord.read(folder)
    assert record.faults(folder) == []
    return np.stack(list(read_view(folder / record.views[view].file)))


def test_each_window_continues_from_the_last_frames_of_the_one_before(project: Path) -> None:
    config = small_config(*LONG, "generate.initial_latent_frames=2")
    scene = read_scenes(project / "artifacts/infos")[0]
    (item,) = list_items(config, [scene])
    models = Models.load(config, project / STAGE, project)
    sampler = Sampler(config, models, item, scene, chosen_edits(config, project), BevMaps(config, project))
    first, second = sampler.sample(SingleProcess())
    window = sampler.windows[1]
    assert (window.start, window.conditioning_latents, window.conditioning_frames) == (8, 3, 9)
    pixels = np.stack([np.concatenate([group[0] for group in models.vae.decode(view[None])]) for view in first])
    conditioning = models.vae.latents(
        models.vae.moments(torch.from_numpy(pixels[:, 8:]).permute(0, 4, 1, 2, 3) / 127.5 - 1.0)
    )
    torch.testing.assert_close(second[:, :, :3], conditioning, rtol=1e-4, atol=1e-5)
    shown = np.stack([np.stack(list(view)) for view in sampler.decode_views([first, second])])
    assert shown.shape == (6, 25, 32, 64, 3)
    assert np.array_equal(shown[:, :17], pixels)


def test_a_long_clip_is_reproducible_and_records_its_length(project: Path) -> None:
    config = small_config(*LONG)
    one, again = (make(config, project, out) for out in ("one", "again"))
    assert np.array_equal(frames(one[1]), frames(again[1]))
    assert len(frames(one[1])) == ItemRecord.read(one[1]).frames == 25
    whole = make(small_config(*LONG, "generate.window=null"), project, "whole")
    assert not np.array_equal(frames(one[1]), frames(whole[1]))


def test_a_clip_starts_with_real_pictures(project: Path) -> None:
    config = small_config(
        *LONG,
        "generate.initial_frames=real",
        "generate.initial_latent_frames=2",
        "generate.frames=17",
        "data.root=data",
    )
    _, folder = make(config, project, "real")
    shown = frames(folder)
    with Image.open(project / "data/samples/CAM_BACK.jpg") as picture:
        small = np.asarray(picture.resize((64, 36), Image.Resampling.BICUBIC))[4:]
    assert len(shown) == 17
    for frame in shown[:5]:
        assert np.array_equal(frame, small)
    assert not np.array_equal(shown[5], shown[4])


def test_a_clip_continues_an_earlier_generation(project: Path) -> None:
    config = small_config(*LONG, "generate.frames=9", "generate.window=null", "submission.frames=8")
    _, earlier = make(config, project, "earlier")
    assert len(frames(earlier)) == 8
    config = small_config(*LONG, "generate.initial_frames=earlier")
    item, later = make(config, project, "later")
    assert (item.initial_frames, item.clip.frames) == (8, 24)
    shown = frames(later)
    assert len(shown) == 24
    assert np.array_equal(shown[:8], frames(earlier))  # exactly
    assert not any(np.array_equal(shown[7], frame) for frame in shown[8:])
