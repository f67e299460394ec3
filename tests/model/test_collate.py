"""Batches and unconditional states against the published system's (golden_collate_null.npz)."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from magicdrive_core.data.records import ClipConditions
from magicdrive_core.model.inputs import collate, pack_map
from magicdrive_core.model.published.golden import read_conditions
from magicdrive_core.model.published.transformer import published_null
from tests.golden.sets import COMPACT, Arrays, read_arrays

VIEWS = 2


@pytest.fixture(scope="module")
def golden() -> Arrays:
    return read_arrays(COMPACT / "golden_collate_null.npz")


def clip(golden: Arrays, sample: int | None, frames: int) -> ClipConditions:
    """Return a recorded sample's boxes, or a sample without boxes; all else is zero."""
    if sample is None:
        corners, classes = np.zeros((frames, 0, 8, 3), np.float32), np.zeros((frames, 0), np.int64)
        masks = np.zeros((frames, VIEWS, 0), np.int64)
    else:
        corners, classes, masks = (golden[f"collate/in{sample}/{name}"] for name in ("bboxes", "classes", "masks"))
        corners, classes, masks = corners[:, 0], classes[:, 0].astype(np.int64), masks.astype(np.int64)
    poses = np.zeros((frames, VIEWS, 3, 7)), np.zeros((frames, 4, 4))
    ids = [f"object {slot}" for slot in range(classes.shape[1])]
    bev_map = np.zeros((frames, 8, 2, 2), np.uint8)
    return ClipConditions("", *poses, corners, classes, masks, ids, bev_map, 80, 144, 12)


@pytest.mark.parametrize(("samples", "recorded"), [([0, 1, None], "out"), ([None, None], "all_none")])
def test_box_slots_are_padded_as_published(golden: Arrays, samples: list[int | None], recorded: str) -> None:
    frames = golden[f"collate/{recorded}/classes"].shape[1]
    batch = collate([clip(golden, sample, frames) for sample in samples], [torch.zeros(1, 2)] * len(samples), 3)
    for ours, name in ((batch.box_corners, "bboxes"), (batch.box_classes, "classes"), (batch.box_masks, "masks")):
        # recorded as samples, frames, views
        np.testing.assert_array_equal(ours.transpose(1, 2).numpy(), golden[f"collate/{recorded}/{name}"], err_msg=name)


@pytest.mark.parametrize(("zero_map", "recorded"), [(False, "add"), (True, "add_map0")])
def test_the_published_unconditional_state_is_the_recorded_one(golden: Arrays, zero_map: bool, recorded: str) -> None:
    fields = {
        name[8:].replace("bbox.", "bbox_"): array for name, array in golden.items() if name.startswith("null/in/")
    }
    case = {f"in/{name}": torch.from_numpy(array) for name, array in fields.items()}
    case["in/y"] = torch.ones(1, 1, 3, 2)
    conditions = read_conditions(case)
    unknown = SimpleNamespace(  # the numbers that the recorded run had in place of learned ones
        y_embedder=SimpleNamespace(y_embedding=torch.zeros(3, 2)),
        camera_embedder=SimpleNamespace(uncond_cam=torch.arange(21.0).reshape(3, 7)),
        frame_embedder=SimpleNamespace(uncond_cam=torch.arange(12.0).reshape(3, 4)),
    )
    null = published_null(unknown, conditions, zero_map=zero_map)  # type: ignore[arg-type]  # all that it reads

    def recorded_null(name: str) -> Tensor:
        array = torch.from_numpy(golden[f"null/{recorded}/{name}"])
        return array[len(array) // 2 :]  # conditional rows come first

    assert torch.equal(null.cameras[0], recorded_null("cams")[:, :, 0])
    for view in range(VIEWS):
        assert torch.equal(null.ego_motion[0, :, :3], recorded_null("rel_pos")[view, :, 0])
    assert torch.equal(null.bev_map, pack_map(recorded_null("maps")))
    assert torch.equal(null.box_masks[0].float(), recorded_null("bbox.masks"))
    assert not null.box_masks.any()  # so that corners and classes, which are zero there, are not read
