"""The kernels' tests need the kernels."""

from __future__ import annotations

import pytest
import torch

from magicdrive_core.kernels.library import library


@pytest.fixture(autouse=True)
def compiled(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    if library() is None and "without" not in request.node.name:
        pytest.skip("no GCC here: the kernels are not in use")
