"""The comparison of a whole project: items are read as generation writes them, and land in the right rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from PIL import Image

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Config
from magicdrive_core.data.edits import Edits, edit_scene
from magicdrive_core.data.records import Scene
from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.evaluation import control_fidelity, fidelity_run, region_classifier
from magicdrive_core.evaluation.control_fidelity import (
    GENERATED,
    RECONSTRUCTED,
    RENDERED,
    UNTRAINED,
    Comparison,
    ControlFidelity,
    Draw,
    next_alike,
    region_lines,
    table_lines,
)
from magicdrive_core.evaluation.edit_response import DARKENED, MOVED, REMOVED, Response
from magicdrive_core.evaluation.region_fidelity import Fidelity
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.inference.items import Item
from magicdrive_core.synthetic.footage import edited_footage
from magicdrive_core.synthetic.regions import Region
from magicdrive_core.utils.files import read_json, sha256_file, write_json
from magicdrive_core.video.frames import crop_to_frame, full_size_image, write_frames
from magicdrive_core.video.item_record import ItemRecord, ViewFile, item_name, video_name
from tests.conftest import PROJECT

FRAMES = 4  # of 9 that a clip has; the measured ones are 0 and 3
Videos = dict[str, np.ndarray]  # (V, F, H, W, 3) by scene token


@pytest.fixture(scope="module")
def control(
    synthetic_root: Path, infos: Path, scenes: list[Scene], tmp_path_factory: pytest.TempPathFactory
) -> ControlFidelity:
    """The measure of a scene by day and one by night, which also teach the colours, with an untrained VAE."""
    folder = tmp_path_factory.mktemp("fidelity")
    overrides = [
        f"data.root={synthetic_root}",
        "vae.scaling_factor=1.0",
        "conditions.maps=live",
        "generate.frames=9",
        f"submission.frames={FRAMES}",
    ]
    config = load_config(PROJECT / "profiles/learn.yaml", overrides)
    (folder / "artifacts").mkdir()
    (folder / "artifacts/infos").symlink_to(infos)
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(block_out_channels=(4, 4, 4, 4), latent_channels=2, norm_num_groups=1)
    vae.save_pretrained(folder / "vae")
    facts = {"path": "vae", "scaling_factor": 1.0, "latent_channels": 2}
    write_json(folder / "artifacts/encoders/encoders.json", {"vae": facts})
    control = ControlFidelity(config, folder)
    control.__dict__["_all"] = [replace(scene, split="both") for scene in scenes]
    control.__dict__["others"] = {scene.token: other for scene, other in zip(scenes, scenes[::-1], strict=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control_fidelity, "CLASSIFIER_CLIPS", 4)
        patch.setattr(region_classifier, "STEPS", 1500)
        _ = control.classifier
    return control


@pytest.fixture(scope="module")
def videos(control: ControlFidelity) -> Videos:
    """What a perfect network would generate."""
    return {scene.token: control.rendered(scene)[:, :FRAMES] for scene in control.scenes}


@pytest.fixture(scope="module")
def comparison(control: ControlFidelity, videos: Videos) -> Comparison:
    """A perfect network, one that draws nothing, and one that draws noise."""
    noise = np.random.default_rng(0)
    return control.compare(
        {
            GENERATED: lambda scene: videos[scene.token],
            "condition swap: map of another clip": lambda scene: np.full_like(videos[scene.token], 110),
            UNTRAINED: lambda scene: noise.integers(0, 256, videos[scene.token].shape, np.uint8),
        }
    )


def write_items(out: Path, scenes: list[Scene], videos: Videos) -> Path:
    """Items of lossless frames, as generation leaves them."""
    for scene in scenes:
        folder = out / item_name(scene.first_sample, 0)
        folder.mkdir(parents=True)
        views = {}
        for view, frames in zip(VIEWS, videos[scene.token], strict=False):
            path = folder / Path(video_name(scene.first_sample, view)).stem
            write_frames(map(full_size_image, frames), path)
            views[view] = ViewFile(path.name, sha256_file(path / "000000.png"), 1, None, None)
        ItemRecord(
            fingerprint="0" * 64, sample=scene.first_sample, scene=scene.token, scene_name=scene.name, start=0,
            generated=FRAMES, frames=FRAMES, fps=12, generation=0, caption="", seed=0, size="80x144", lineage={},
            seconds={}, views=views,
        ).write(folder)  # fmt: skip
    return out


def test_a_perfect_network_reaches_the_rendered_row_exactly(comparison: Comparison) -> None:
    assert comparison.regions[GENERATED] == comparison.regions[RENDERED]
    assert comparison.regions[GENERATED].psnr == float("inf")
    shares = comparison.regions[GENERATED].shares_of(comparison.regions[RENDERED])
    assert {share for share in shares.values() if not np.isnan(share)} == {1.0}  # no number: a region never found
    assert shares["vehicle"] == shares["mark_contrast"] == 1
    assert comparison.time[GENERATED] == comparison.time[RENDERED]
    assert comparison.views[GENERATED] == comparison.views[RENDERED]
    assert comparison.consistency(GENERATED)["time_ratio"] == 1


def test_networks_that_follow_no_condition_score_low(comparison: Comparison) -> None:
    best = comparison.regions[RENDERED]
    for label in (
        "condition swap: map of another clip",
        "generated, compared with another clip",
        UNTRAINED,
        RECONSTRUCTED,  # by a VAE that was never trained
    ):
        _assert_worse(comparison.regions[label], best)


def test_the_rendered_video_follows_the_flow_and_its_views_agree(comparison: Comparison) -> None:
    real = comparison.consistency(RENDERED)
    assert real["time_error"] < 4  # grey levels, of 80x144 pixels with their edges and reflections
    assert real["time_structure"] > 0.8
    assert real["views_error"] < 8
    assert real["views_structure"] > 0.6
    assert comparison.time[RENDERED].pixels > 50_000
    assert comparison.views[RENDERED].pixels > 5_000


def test_noise_is_at_the_other_end(comparison: Comparison) -> None:
    noise = comparison.consistency(UNTRAINED)
    assert noise["time_ratio"] > 15
    assert abs(noise["time_structure"]) < 0.05
    assert noise["views_ratio"] > 8
    assert abs(noise["views_structure"]) < 0.05


def test_a_plain_video_has_no_error_and_no_structure(comparison: Comparison) -> None:
    plain = comparison.consistency("condition swap: map of another clip")
    assert plain["time_error"] == plain["views_error"] == 0
    assert np.isnan(plain["time_structure"])


def test_scenes_take_turns_of_light(control: ControlFidelity) -> None:
    day, night = control.scenes
    some = ControlFidelity(control.config, control.project, every=4, clips=3)
    some.__dict__["_all"] = [replace(day, name=f"day {n}") for n in range(3)] + [replace(night, name="night")]
    assert [scene.name for scene in some.scenes] == ["day 0", "night", "day 1"]
    assert list(control.measured_frames(day)) == [0, 3]
    assert list(some.measured_frames(day)) == [0]


def test_items_are_read_as_generation_writes_them_and_drawn_over_time(
    control: ControlFidelity, videos: Videos, tmp_path: Path
) -> None:
    scene = control.scenes[0]
    items = write_items(tmp_path / "items", [scene], videos)
    read = control.read_item(items, scene)
    assert np.abs(read.astype(int) - videos[scene.token]).mean() < 4  # enlarged to 1600x900 and made small again
    rows = {label: lambda _: read for label in (GENERATED, UNTRAINED)}
    control.write_sheet(control.sheet_scenes([0]), rows, tmp_path / "sheet.png")
    assert control.sheet_scenes() == control.scenes  # one by day, one by night
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 3 * 200
        assert sheet.height > 2 * 2 * 100


def test_a_missing_item_and_one_of_another_length_are_named(control: ControlFidelity, tmp_path: Path) -> None:
    scene = control.scenes[0]
    with pytest.raises(MagicDriveError, match="scene-2001 is missing"):
        control.read_item(tmp_path, scene)
    write_items(tmp_path, [scene], {scene.token: np.zeros((6, 1, 80, 144, 3), np.uint8)})
    longer = ControlFidelity(control.config.model_copy(update={"submission": Longer}), control.project)
    longer.__dict__["_all"] = control.scenes
    with pytest.raises(MagicDriveError, match="has 4 frames, not 9"):
        longer.read_item(tmp_path, scene)


class Longer:
    """In place of the section ``submission``: clips are written whole."""

    frames = 9


def test_single_scenes_of_a_light_are_refused(control: ControlFidelity) -> None:
    alone = ControlFidelity(control.config, control.project)
    alone.__dict__["_all"] = control.scenes
    with pytest.raises(MagicDriveError, match="two validation scenes"):
        _ = alone.others


def test_rendered_edits_are_a_full_response(control: ControlFidelity, videos: Videos, tmp_path: Path) -> None:
    day = replace(control)
    day.__dict__.update(control.__dict__, scenes=control.scenes[:1])

    def rendered(scene: Scene, edits: Edits) -> np.ndarray:
        own = control.painter.footage(scene.pictures[0][0])
        footage, video = edited_footage(own, scene, edit_scene(scene, edits)), np.zeros_like(videos[scene.token])
        for view, frame in product(range(len(VIEWS)), control.measured_frames(scene)):
            picture = control.painter.render(scene.pictures[frame][view], footage)
            video[view, frame] = crop_to_frame(picture, control.framing)
        return video

    responses = day.respond(lambda scene: videos[scene.token], rendered, tmp_path / "edits.png")
    assert set(responses) == {REMOVED, MOVED, DARKENED}
    for response in responses.values():
        assert response.share == pytest.approx(1, abs=0.05)
    removed, moved, dark = (responses[kind] for kind in (REMOVED, MOVED, DARKENED))
    assert removed.rendered_before - removed.rendered_after > 0.3
    assert moved.rendered_before < 0 < moved.rendered_after
    assert dark.rendered_after < 0.5 * dark.rendered_before
    with Image.open(tmp_path / "edits.png") as sheet:
        assert sheet.width > 4 * 400


def test_no_response_is_none_and_half_is_half() -> None:
    assert Response(1, 0.5, 0.5, 0.6, 0.1).share == 0
    assert Response(1, 0.5, 0.25, 0.6, 0.1).share == pytest.approx(0.5)
    assert np.isnan(Response(1, 0.5, 0.5, 0.6, 0.6).share)


def test_each_row_comes_from_its_network_and_its_conditions(
    control: ControlFidelity, comparison: Comparison, videos: Videos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step as a whole, with networks that write down what they are asked for."""
    day, night = control.scenes
    asked: list[tuple[str, ...]] = []

    class Painter:
        def __init__(self, config: Config, folder: Path) -> None:
            self.name = folder.name

        def edited(self, item: Item, scene: Scene, edits: Edits) -> np.ndarray:
            asked.append((self.name, item.clip.scene, "edited" if edits != Edits() else "as it is"))
            return videos[scene.token]

        def swapped(self, item: Item, scene: Scene, other: Scene, what: str) -> np.ndarray:
            asked.append((self.name, item.clip.scene, what, other.token))
            return videos[scene.token]

    def compare(_: ControlFidelity, drawn: Mapping[str, Draw]) -> Comparison:
        for draw in drawn.values():
            draw(day)
        return comparison

    def respond(_: ControlFidelity, generated: Draw, edited: Callable, sheet: Path) -> dict[str, Response]:
        edited(night, Edits(weather="night"))
        return {DARKENED: Response(1, 100.0, 80.0, 120.0, 40.0)}

    plan = SimpleNamespace(folder=tmp_path / "trained", stage="stage3")
    paths = SimpleNamespace(generated=tmp_path / "generate-1", trained_model=lambda: plan)
    for target, name, value in (
        (fidelity_run, "find_run_paths", lambda config: paths),
        (fidelity_run, "ControlFidelity", lambda config, every, clips: control),
        (fidelity_run, "ClipPainter", Painter),
        (fidelity_run, "generate_items", lambda *arguments: None),
        (fidelity_run, "write_untrained", lambda config, stage, folder: folder.mkdir(parents=True)),
        (fidelity_run, "read_run_note", lambda folder: {}),
        (ControlFidelity, "compare", compare),
        (ControlFidelity, "respond", respond),
        (ControlFidelity, "read_item", lambda self, folder, scene: videos[scene.token]),
    ):
        monkeypatch.setattr(target, name, value)
    lines, out = fidelity_run.measure_fidelity(control.config, [0])
    assert asked == [
        *(("trained", day.token, what, night.token) for what in ("map", "boxes", "text")),
        ("untrained", day.token, "as it is"),  # once: the sheet shows it again
        ("trained", night.token, "edited"),
    ]
    assert out == tmp_path / "fidelity-1"
    assert (out / "fidelity.png").is_file()
    assert read_json(out / "fidelity.json")["edits"][DARKENED]["share"] == 0.25
    assert any(line.startswith("share of the VAE's") for line in lines)
    with pytest.raises(UsageError, match=r"--scene 2: 2 scenes are measured"):
        fidelity_run.measure_fidelity(control.config, [2])


def test_conditions_are_exchanged_within_a_kind() -> None:
    kinds = ["day", "night", "day", "rain", "night", "day", "rain"]
    others = next_alike(kinds)
    for own, other in enumerate(others):
        assert other != own
        assert kinds[other] == kinds[own]
    assert set(others) == set(range(len(kinds)))
    with pytest.raises(ValueError, match="two scenes"):
        next_alike(kinds[:2])


def test_tables_show_percent_decibel_shares_and_dashes() -> None:
    rows = {
        RECONSTRUCTED: Fidelity(dict.fromkeys(Region, 0.5), {Region.MARK: 0.25}, 20.0),
        GENERATED: Fidelity(dict.fromkeys(Region, 0.4), {Region.MARK: float("nan")}, 10.0),
    }
    lines = [line.split() for line in region_lines(rows)]
    assert lines[1][-10:] == [*["50.0"] * len(Region), "25.0", "20.0"]
    assert lines[3][-10:] == [*["80.0"] * len(Region), "-", "-"]
    assert table_lines({"a": {"x": 1.0, "y": 0.126}}, digits=2)[1].split() == ["a", "1.00", "0.13"]


def _assert_worse(one: Fidelity, other: Fidelity) -> None:
    assert one.psnr < 40
    for region in (Region.ROAD, Region.VEHICLE, Region.SCENERY):
        assert one.iou[region] < 0.75 * other.iou[region], region
