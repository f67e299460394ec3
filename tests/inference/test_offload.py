"""``generate.offload`` without a GPU: which model moves when, and that no video changes.

On a CPU, device and main memory are the same, so that memory is not measured here. That weights leave main memory is
shown on the meta device, from which nothing comes back. The order of moves in a whole generation is recorded, with the
device called ``cpu:0``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from magicdrive_core.data.infos import read_scenes
from magicdrive_core.encoders.text import TextEncoder
from magicdrive_core.inference.generate import generate_items
from magicdrive_core.inference.items import list_items
from magicdrive_core.inference.models import Models
from magicdrive_core.video.item_record import ItemRecord
from tests.inference.project import STAGE, make_project, small_config, small_scene

OFFLOAD = small_config("generate.offload=true")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    make_project(folder, OFFLOAD, small_scene())
    return folder


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("wanted", ["network", "vae"])
def test_the_wanted_model_moves_completely_and_the_other_one_leaves(project: Path, offload: bool, wanted: str) -> None:
    models = replace(Models.load(OFFLOAD, project / STAGE, project), device=torch.device("meta"), offload=offload)
    parts = {"network": models.network, "vae": models.vae.model}
    models.move_to_device(parts[wanted])
    for name, model in parts.items():
        for tensor in [*model.parameters(), *model.buffers()]:
            assert tensor.is_meta == (offload and name == wanted)


def test_only_the_text_encoder_is_on_the_device_while_it_encodes(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a caption outside the cache, network and VAE wait in main memory, and the encoder is not kept."""
    models = Models.load(OFFLOAD, project / STAGE, project)
    devices = {"network": "cpu:0", "vae": "cpu:0"}  # before the call
    encoders: list[weakref.ref[Encoder]] = []

    class Encoder:
        def encode(self, captions: list[str]) -> list[torch.Tensor]:
            assert set(devices.values()) == {"cpu"}
            return [torch.full((3, 16), float(len(captions)))]

    def load(*_: object) -> Encoder:
        assert set(devices.values()) == {"cpu"}  # moved before the weights are read
        encoder = Encoder()
        encoders.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(TextEncoder, "load", load)
    for name, model in (("network", models.network), ("vae", models.vae.model)):
        monkeypatch.setattr(model, "to", partial(devices.__setitem__, name))
    assert models.features("Nothing like it was ever cached").tolist() == [[1.0] * 16] * 3
    assert [encoder() for encoder in encoders] == [None]


def test_only_the_working_model_is_on_the_device_and_the_videos_are_equal(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = list_items(OFFLOAD, read_scenes(project / "artifacts/infos"))
    generate_items(small_config(), items, project / STAGE, project / "kept", project=project)
    models = replace(Models.load(OFFLOAD, project / STAGE, project), device=torch.device("cpu:0"))
    parts: dict[str, Any] = {"network": models.network, "vae": models.vae.model}
    devices = {"network": "cpu", "vae": "cpu:0"}  # as Models.load leaves them
    works: list[str] = []

    def noting(call: Callable[..., Any], name: str, other: str) -> Callable[..., Any]:
        def noted(*words: Any, **options: Any) -> Any:
            assert (devices[name], devices[other]) == ("cpu:0", "cpu")
            works.append(name)
            return call(*words, **options)

        return noted

    def moving(name: str) -> Callable[[Any], None]:
        def to(device: Any) -> None:
            devices[name] = str(device)
            assert set(devices.values()) != {"cpu:0"}  # never both on the device

        return to

    for name in parts:
        monkeypatch.setattr(parts[name], "to", moving(name))
    for method in ("encode", "denoise"):
        monkeypatch.setattr(models.network, method, noting(getattr(models.network, method), "network", "vae"))
    monkeypatch.setattr(models.vae, "decode", noting(models.vae.decode, "vae", "network"))
    monkeypatch.setattr(Models, "load", lambda *_: models)
    generate_items(OFFLOAD, items, project / STAGE, project / "moved", project=project)
    steps = works.index("vae")
    assert works == 2 * (["network"] * steps + ["vae"] * 6)
    for item in items:
        kept, moved = (ItemRecord.read(project / folder / item.name).views for folder in ("kept", "moved"))
        assert {view: file.sha256 for view, file in kept.items()} == {view: f.sha256 for view, f in moved.items()}
