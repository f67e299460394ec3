"""Released weights: every form that they come in, and nothing that runs code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from magicdrive_core.cli.main import main as cli
from magicdrive_core.config.schema import STAGES, Stage
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.model.build import build_network
from magicdrive_core.model.published import checkpoint as importing
from magicdrive_core.model.published.checkpoint import check_names, fit_text, published_xl, read_weights
from magicdrive_core.utils.files import read_json, sha256_file
from tests.golden.sets import model_card
from tests.model.networks import config, network

CONFIG = config(published=True)


def import_checkpoint(path: Path, out: Path) -> int:
    return importing.import_checkpoint(path, out, "stage3", CONFIG)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return network(published=True).state_dict()


def as_file(weights: dict[str, Tensor], folder: Path) -> Path:
    torch.save(weights, folder / "ema.pt")
    return folder / "ema.pt"


def as_shards(weights: dict[str, Tensor], folder: Path, suffix: str) -> Path:
    names = sorted(weights)
    index = {}
    for shard, part in enumerate((names[::2], names[1::2])):
        file = f"part-{shard}{suffix}"
        values = {name: weights[name] for name in part}
        save_file(values, folder / file) if suffix == ".safetensors" else torch.save(values, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize("form", ["ema.pt", ".bin", ".safetensors"])
def test_every_form_comes_out_equal(weights: dict[str, Tensor], tmp_path: Path, form: str) -> None:
    path = as_file(weights, tmp_path) if form == "ema.pt" else as_shards(weights, tmp_path, form)
    out = tmp_path / "out"
    assert import_checkpoint(path, out) == len(weights)
    read = load_file(out / "ema.safetensors")
    facts = read_json(out / "run.json")
    assert facts["weights_sha256"] == sha256_file(out / "ema.safetensors")
    assert (facts["stage"], facts["published"]) == ("stage3", True)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    network(seed=4, published=True).load_state_dict(read, strict=True)


def test_text_length_is_adapted_and_old_tables_dropped(weights: dict[str, Tensor], tmp_path: Path) -> None:
    null = weights["y_embedder.y_embedding"]
    other = {**weights, "y_embedder.y_embedding": null[:5], "pos_embed": torch.zeros(1)}
    import_checkpoint(as_file(other, tmp_path), tmp_path / "out")
    read = load_file(tmp_path / "out/ema.safetensors")["y_embedder.y_embedding"]
    assert torch.equal(read, torch.cat([null[:5], null[4:5], null[4:5]]))
    assert torch.equal(fit_text(null, 3), null[:3])


@pytest.mark.parametrize("fault", ["lacks", "unknown", "shape"])
def test_weights_of_another_network_are_refused(weights: dict[str, Tensor], tmp_path: Path, fault: str) -> None:
    wrong = dict(weights)
    if fault == "lacks":
        del wrong["base_token"]
    elif fault == "unknown":
        wrong["stranger"] = torch.zeros(1)
    else:
        wrong["base_token"] = torch.zeros(3)
    with pytest.raises(MagicDriveError, match=fault):
        import_checkpoint(as_file(wrong, tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Bomb:
    """Unpickled with care for nothing, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


def test_a_pickle_with_code_is_refused_and_not_run(weights: dict[str, Tensor], tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    torch.save({**weights, "extra": Bomb(witness)}, tmp_path / "bomb.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Bomb(witness)))
    for name in ("bomb.pt", "bare.pt"):
        with pytest.raises(MagicDriveError, match=r"refused|not readable"):
            import_checkpoint(tmp_path / name, tmp_path / "out")
    assert not witness.exists()


def test_bad_files_are_named(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = as_file(weights, tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for bad in (path, tmp_path / "none.pt", tmp_path):
        with pytest.raises(MagicDriveError, match=str(bad)):
            import_checkpoint(bad, tmp_path / "out")
    (tmp_path / "model.index.json").write_text(json.dumps({"weight_map": {"base_token": "../../etc/passwd"}}))
    with pytest.raises(MagicDriveError, match="not an index of shards"):
        import_checkpoint(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("stage", STAGES)
def test_the_released_xl_checkpoint_of_each_stage_fits(tmp_path: Path, stage: Stage) -> None:
    """Names and shapes of the model card; one number a tensor, spread by strides."""
    with torch.device("meta"):
        wanted = build_network(published_xl(stage)).state_dict()
    rows = model_card()["state_dict"]["stage1" if stage == "stage1" else "stage3"]
    listed = {name: shape for name, shape, *_ in rows}
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in listed.items()}, tmp_path / "ema.pt")
    weights = read_weights(tmp_path / "ema.pt")
    check_names(weights, wanted, tmp_path)
    assert len(weights) == (1044 if stage == "stage1" else 1768)
    with torch.device("meta"):
        other = build_network(published_xl("stage2" if stage == "stage1" else "stage1")).state_dict()
    with pytest.raises(MagicDriveError, match="belong to another network"):
        check_names(weights, other, tmp_path)


def test_the_verb_says_where_the_network_is_and_how_to_use_it(
    weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importing, "published_xl", lambda _stage: CONFIG)
    as_file(weights, tmp_path)
    codes = []
    for words in (["ema.pt"], ["ema.pt", "--stage", "stage2", "--out", "mine"], ["none.pt"]):
        with pytest.raises(SystemExit) as ended:
            cli(["import-checkpoint", *words])
        codes.append(ended.value.code)
    assert codes == [0, 0, 1]
    out, err = capsys.readouterr()
    assert "published=true" in out
    assert "generate.weights=runs/published-stage3" in out
    assert "none.pt is missing" in err
    assert load_file("runs/published-stage3/ema.safetensors").keys() == weights.keys()
    assert read_json("mine/run.json")["stage"] == "stage2"
