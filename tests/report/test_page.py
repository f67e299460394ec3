"""The page holds what was made, stands alone, and is written where pieces are missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import rc_context
from PIL import Image

from magicdrive_core.config.schema import Config
from magicdrive_core.data.infos import write_infos
from magicdrive_core.data.map_cache import write_map
from magicdrive_core.data.records import FrameBoxes, Scene
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.evaluation.score_sheet import Sheet
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.geometry.poses import pose
from magicdrive_core.report import page as page_module
from magicdrive_core.report.loss_curves import VARIABLES, Curve
from magicdrive_core.report.page import write_report
from magicdrive_core.utils.files import sha256_file
from magicdrive_core.video.scene_views import SceneViews
from magicdrive_core.wcoda.package import pack
from tests.evaluation.stand_in import SAMPLES, config, write_item

FORWARD = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # a camera that looks along the lidar's y


def scene(token: str, name: str, sample: str, frames: int) -> Scene:
    """A car ahead of a standing ego car; all pictures are one file a view."""
    boxes = FrameBoxes(["car"], ["car"], np.array([[0.0, 12.0, -1.0, 1.8, 4.2, 1.6, 0.1]]))
    return Scene(
        token=token,
        name=name,
        split="val",
        location="singapore-onenorth",
        description="Fog & <owls>",
        tokens=[sample] + [f"{sample}{n}" for n in range(1, frames)],
        key_frames=np.arange(frames) % 6 == 0,
        timestamps=np.arange(frames) * 83_333,
        lidar_to_ego=np.tile(pose(np.eye(3), [0.9, 0, 1.84]), (frames, 1, 1)),
        ego_to_global=np.tile(np.eye(4), (frames, 1, 1)),
        pictures=[[f"samples/{view}.jpg" for view in VIEWS]] * frames,
        intrinsics=np.tile(np.array([[1266.0, 0, 800], [0, 1266, 450], [0, 0, 1]]), (frames, 6, 1, 1)),
        camera_to_lidar=np.tile(pose(FORWARD, [0, 0.4, -0.3]), (frames, 6, 1, 1)),
        boxes=[boxes] * frames,
    )


def project_of(folder: Path, frames: int) -> Config:
    """Infos, maps and pictures of two scenes, as the DVC stages would leave them below ``folder``."""
    settings = config(f"data.root={folder / 'data'}", "submission.frames=2")
    (folder / "artifacts/infos").mkdir(parents=True)
    (folder / "data/samples").mkdir(parents=True)
    scenes = [scene(f"scene-token-{n}", f"scene-000{n}", sample, frames) for n, sample in enumerate(SAMPLES)]
    facts = {"version": "v1.0-test", "rule": "by hand", "unpaired": "leave_out"}
    write_infos(scenes, facts, folder / "artifacts/infos")
    for n in range(len(SAMPLES)):
        bits = np.zeros((frames, 200, 200), dtype=np.uint8)
        bits[:, 90:110] = 1
        write_map(folder / f"artifacts/conditions/bev/200/scene-token-{n}.npz", bits)
    for v, view in enumerate(VIEWS):
        Image.new("RGB", (1600, 900), (40 * v, 120, 90)).save(folder / f"data/samples/{view}.jpg", quality=50)
    for n, sample in enumerate(SAMPLES):
        for generation in range(2):
            write_item(folder / "generated", sample, generation, frames, f"scene-token-{n}", f"scene-000{n}")
    run = folder / "runs/stage1"
    run.mkdir(parents=True)
    lines = [{"step": step, "loss": 1 / step, "seconds": 0.1} for step in range(1, 61)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return settings


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    folder = tmp_path_factory.mktemp("project")
    return folder, project_of(folder, 2)


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def sources(self, tag: str) -> list[str]:
        return [attributes["src"] or "" for name, attributes in self.tags if name == tag]


def test_the_page_stands_alone_and_shows_everything(made: tuple[Path, Config], tmp_path: Path) -> None:
    folder, settings = made
    package = pack(settings, folder / "generated", tmp_path)
    path = write_report(
        settings,
        folder / "generated",
        tmp_path,
        runs={"stage1": folder / "runs/stage1", "stage2": folder / "runs/none"},
        package=package,
        lineage={"git.commit": "c0ffee" * 6},
        made="2024-10-01",
        project=folder,
    )
    text = path.read_text()
    page = Page(text)
    assert len(page.sources("img")) == 2 * (1 + 1 + 3 + 1)  # above, conditions; real, two generations; over time
    assert len(page.sources("video")) == 2 * 4
    assert all(source.startswith("data:") for source in page.sources("img") + page.sources("video"))
    found = re.search(r"""(?:src|href)=["'](?!data:)|url\((?!["']?data:)|@import|<script""", text)
    assert not found, text[found.start() - 200 : found.end() + 50]
    assert page.text.count("The package is valid") == 1
    assert "c0ffeec0ff" in page.text
    assert "2024-10-01" in page.text
    assert "Fog & <owls>." in page.text  # escaped in the source
    assert sum(tag == "svg" for tag, _ in page.tags) == 1
    assert path.stat().st_size < 4e6


def test_the_same_results_give_the_same_page(made: tuple[Path, Config], tmp_path: Path) -> None:
    folder, settings = made
    digests = {
        sha256_file(write_report(settings, folder / "generated", tmp_path / name, runs={}, project=folder))
        for name in "ab"
    }
    assert len(digests) == 1


HOSTILE = st.sampled_from(
    [
        '"><script>',
        "x'y",
        "a} * {color:red",
        "</style><b>",
        "); }",
        "a b\tc",
        "<svg onload=x>",
        "&quot;",
        "é\u2028",
        "#.:",
    ]
)


@pytest.fixture(scope="module")
def context(made: tuple[Path, Config], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's template gets, without pictures."""
    folder, settings = made
    seen: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_module, "_template", lambda: SimpleNamespace(render=lambda **all_: seen.update(all_) or ""))
        write_report(settings, folder / "generated", tmp_path_factory.mktemp("page"), runs={}, project=folder)
    picture = "data:image/png;base64,AA=="
    seen["scenes"] = [
        each
        | {"above": picture, "layer": picture, "strip": picture}
        | {"columns": [replace(column, still=picture, video=picture) for column in each["columns"]]}
        for each in seen["scenes"]
    ]
    return seen | {"template": page_module._template()}


@settings(max_examples=40)
@given(
    names=st.lists(st.lists(HOSTILE | st.text(max_size=6), min_size=1, max_size=3).map("".join), min_size=6, max_size=6)
)
def test_no_name_in_the_data_becomes_markup_or_style(context: dict[str, Any], names: list[str]) -> None:
    keys = ("name", "location", "caption")

    def page(texts: list[str]) -> tuple[Page, list[str]]:
        scenes = [
            each | dict(zip(keys, texts[3 * n : 3 * n + 3], strict=True)) for n, each in enumerate(context["scenes"])
        ]
        text = context["template"].render(**context | {"scenes": scenes})
        return Page(text), re.findall(r"<style>.*?</style>", text, re.DOTALL)

    plain, plain_styles = page([f"plain-{n}" for n in range(6)])
    hostile, hostile_styles = page(names)
    shapes = [[(tag, sorted(attributes)) for tag, attributes in each.tags] for each in (plain, hostile)]
    assert shapes[0] == shapes[1]
    assert hostile_styles == plain_styles
    inline = [[attributes.get("style") for _, attributes in each.tags] for each in (plain, hostile)]
    assert inline[0] == inline[1]
    ids = [attributes["id"] or "" for _, attributes in hostile.tags if "id" in attributes]
    assert all(re.fullmatch(r"[A-Za-z0-9][\w.+~-]*", each) for each in ids)
    assert len(set(ids)) == (2 if names[0] != names[3] else 1)


def test_failures_come_first(made: tuple[Path, Config], tmp_path: Path) -> None:
    folder, settings = made
    package = pack(settings, folder / "generated", tmp_path)
    faults = [f"item {n}: CAM_FRONT is missing" for n in range(60)]
    path = write_report(
        settings, folder / "generated", tmp_path, runs={}, package=package, faults=faults, project=folder
    )
    text = Page(path.read_text()).text
    assert "60 faults found" in text
    assert "and 10 more" in text
    assert text.index("item 0: CAM_FRONT is missing") < text.index("highest bit rate")
    assert "The package is valid" not in text


def test_scores_stand_beside_the_published_ones(made: tuple[Path, Config], tmp_path: Path) -> None:
    folder, settings = made
    sheet = Sheet(
        question="",
        package="ab" * 32,
        figures={"small_224": 0.25, "small_212": 0.125},
        missing=["FVD: no I3D"],
        scenes={"scene-token-0": {"small_224": 0.1}, "scene-token-1": {"small_224": 0.7}},
        classes={},
        clips={"real": 12, "generated": 24},
    )
    path = write_report(settings, folder / "generated", tmp_path, runs={}, sheet=sheet, project=folder)
    text = Page(path.read_text()).text
    assert text.index("No package") < text.index("LiAuto-AD") < text.index("Not scored") < text.index("0.2500")
    first, second = (
        text.index(f"{name}singapore-onenorth") for name in ("\n    scene-0001\n    ", "\n    scene-0000\n    ")
    )
    assert first < second  # the farthest first
    assert "94.60" in text


def test_single_frames_have_no_package_and_no_videos(tmp_path: Path) -> None:
    settings = project_of(tmp_path, 1)
    note = "stage2 is left out: the data has no training clip"
    path = write_report(settings, tmp_path / "generated", tmp_path / "out", runs={}, notes=[note], project=tmp_path)
    page = Page(path.read_text())
    assert "No package" in page.text
    assert note in page.text
    assert page.sources("video") == []
    assert len(page.sources("img")) == 2 * 5
    assert "lossless" in page.text


def test_damaged_videos_are_named_and_not_shown(tmp_path: Path) -> None:
    settings = project_of(tmp_path, 1)
    picture = next((tmp_path / "generated").rglob("*CAM_FRONT.png"))
    picture.write_bytes(b"")
    path = write_report(settings, tmp_path / "generated", tmp_path / "out", runs={}, project=tmp_path)
    page = Page(path.read_text())
    assert "1 fault found" in page.text
    assert "has changed since it was written" in page.text
    assert page.sources("img") == []


def test_nothing_generated_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MagicDriveError, match="holds no generated clips"):
        write_report(config(), tmp_path, tmp_path, runs={}, project=tmp_path)


def test_conditions_show_the_car_ahead_in_every_view(made: tuple[Path, Config]) -> None:
    folder, _ = made
    scene_views = SceneViews(scene("t", "n", SAMPLES[0], 1), np.zeros((1, 200, 200), np.uint8), folder / "data", 240)
    drawn = scene_views.conditions(0).astype(int)
    assert drawn.shape == (6, 135, 240, 3)
    assert all(view[..., 2].max() > view[..., 0].max() for view in drawn)  # cars are blue
    assert (scene_views.box_layers(0)[..., 3] > 0).any(axis=(1, 2)).all()
    assert [int(view[..., 0].mean().round(-1)) for view in scene_views.real(0)] == [40 * v for v in range(6)]


@pytest.mark.parametrize(
    "losses",
    [
        lambda n: 1.0,
        lambda n: 2.0 - n / 100,
        lambda n: 1e-4 * (1 + n % 3),
        lambda n: 5000.0 if n == 3 else 0.1,
        lambda n: float("nan") if n == 2 else 0.3,
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 7, 5000])
def test_curves_stay_within_their_frame(tmp_path: Path, steps: int, losses: Callable[[int], float]) -> None:
    lines = [json.dumps({"step": n + 1, "loss": losses(n)}) for n in range(steps)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    curve = Curve.read("stage1", tmp_path)
    assert curve is not None
    svg = curve.svg()
    assert svg == curve.svg()
    assert len(svg) < 60_000
    (width, height) = map(float, re.findall(r'viewBox="0 0 (\S+) (\S+)"', svg)[0])
    lines = re.findall(r'<path d="([^"]+)"[^>]*style="[^"]*stroke: var\(--accent\)', svg)
    assert len(lines) == 2, svg
    for line in lines:
        for x, y in re.findall(r"[ML] (\S+) (\S+)", line):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height


def test_curves_bring_no_styles_or_colours_of_their_own() -> None:
    svg = Curve("stage1", [1, 2, 3], [3.0, 2.0, 1.0]).svg()
    assert "<style" not in svg
    assert set(re.findall(r"(?:stroke|fill): ([^;\"]+)", svg)) <= {"none", *VARIABLES.values()}
    assert "loss</text>" in svg  # text, not outlines of letters


def test_skipped_steps_and_damaged_lines_are_left_out_of_a_curve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert Curve.read("stage1", tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n{"step": 3, "lo\n{"step": 4, "loss": 0.25}\n'
    )
    curve = Curve.read("stage1", tmp_path)
    assert curve == Curve("stage1", [1, 4], [0.5, 0.25])
    assert "line 3 is damaged and left out" in caplog.text


def test_a_curve_does_not_depend_on_the_style_that_other_libraries_set() -> None:
    curve = Curve("stage1", [1, 2, 3], [0.5, 0.4, 0.3])
    with rc_context({"axes.grid": True, "axes.facecolor": "red", "font.size": 20}):
        styled = curve.svg()
    assert styled == curve.svg()
    assert "url(" not in styled
