"""The comparison of a whole project: items are read as generation writes them, and land in the right rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from PIL import Image

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Config, Synth
from magicdrive_core.data.infos import build_infos, read_scenes
from magicdrive_core.data.records import Scene
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.evaluation.control_fidelity import ControlFidelity, Fidelity
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.synthetic.dataset import synthesize
from magicdrive_core.synthetic.regions import Region
from magicdrive_core.utils.files import sha256_file, write_json
from magicdrive_core.video.frames import full_size_image
from magicdrive_core.video.item_record import ItemRecord, ViewFile, item_name, video_name
from tests.conftest import PROJECT

SCENES = 9  # day, night and rain in turn: three to learn colours from, two of each light to judge


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A project with data, infos and a VAE that was never trained."""
    folder = tmp_path_factory.mktemp("learn")
    synthesize(Synth(seed=7, scenes=SCENES, seconds=0.1), folder / "data", "v1.0-demo", workers=1)
    judged = ",".join(f"scene-{2001 + index}" for index in range(3, SCENES))
    overrides = [
        f"data.root={folder / 'data'}",
        f"data.val_scenes=[{judged}]",
        "vae.scaling_factor=1.0",
        "conditions.maps=live",
    ]
    config = load_config(PROJECT / "profiles/learn.yaml", overrides)
    build_infos(config, folder / "artifacts/infos")
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(block_out_channels=(4, 4, 4, 4), latent_channels=2, norm_num_groups=1)
    vae.save_pretrained(folder / "vae")
    facts = {"path": "vae", "scaling_factor": 1.0, "latent_channels": 2}
    write_json(folder / "artifacts/encoders/encoders.json", {"vae": facts})
    return folder, config


def write_items(out: Path, scenes: list[Scene], frames: dict[str, list[np.ndarray]]) -> Path:
    """Items of single frames, as generation leaves them."""
    for scene in scenes:
        folder = out / item_name(scene.first_sample, 0)
        folder.mkdir(parents=True)
        views = {}
        for view, frame in zip(VIEWS, frames[scene.token], strict=True):
            path = folder / Path(video_name(scene.first_sample, view)).with_suffix(".png")
            Image.fromarray(full_size_image(frame)).save(path, compress_level=1)
            views[view] = ViewFile(path.name, sha256_file(path), path.stat().st_size, None, None)
        ItemRecord(
            fingerprint="0" * 64, sample=scene.first_sample, scene=scene.token, scene_name=scene.name, start=0,
            generated=1, frames=1, fps=12, generation=0, caption="", seed=0, size="80x144", lineage={}, seconds={},
            views=views,
        ).write(folder)  # fmt: skip
    return out


def test_the_rows_of_a_perfect_network_and_of_one_that_draws_nothing(
    project: tuple[Path, Config], tmp_path: Path
) -> None:
    folder, config = project
    control = ControlFidelity(config, folder)
    scenes = control.scenes
    assert len(scenes) == SCENES - 3
    pictures = {scene.token: [f.picture for f in frames] for scene, frames in zip(scenes, control.truth, strict=True)}
    perfect = write_items(tmp_path / "perfect", scenes, pictures)
    grey = {token: [np.full_like(frame, 110) for frame in frames] for token, frames in pictures.items()}
    nothing = write_items(tmp_path / "nothing", scenes, grey)
    table = control.compare(perfect, nothing, {"map": [frame for frames in grey.values() for frame in frames]})

    best, drawn = table["rendered"], table["generated"]
    assert drawn.psnr > 30  # enlarged to 1600x900 and made small again
    for region in (Region.SKY, Region.ROAD, Region.SCENERY):
        assert drawn.iou[region] == pytest.approx(best.iou[region], abs=0.05)
    _assert_worse(table["generated, compared with another clip"], drawn)
    _assert_worse(table["condition swap: map of another clip"], drawn)
    _assert_worse(table["untrained"], drawn)
    _assert_worse(table["through the VAE"], drawn)  # it was never trained

    control.write_sheet(perfect, nothing, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 3 * 200


def test_a_missing_item_is_named(project: tuple[Path, Config], tmp_path: Path) -> None:
    folder, config = project
    with pytest.raises(MagicDriveError, match=r"6 of 6 scenes are missing, the first is scene-2004"):
        ControlFidelity(config, folder).items(tmp_path)


def test_single_scenes_of_a_light_are_refused(project: tuple[Path, Config], tmp_path: Path) -> None:
    folder, config = project
    control = ControlFidelity(config, folder)
    control.__dict__["scenes"] = [s for s in read_scenes(folder / "artifacts/infos") if s.split == "val"][:3]
    with pytest.raises(MagicDriveError, match="two scenes"):
        control.compare(tmp_path, tmp_path, {})


def _assert_worse(one: Fidelity, other: Fidelity) -> None:
    assert one.psnr < other.psnr - 5
    for region in (Region.ROAD, Region.VEHICLE, Region.SCENERY):
        assert one.iou[region] < 0.75 * other.iou[region], region
