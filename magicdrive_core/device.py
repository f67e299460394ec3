"""The device of this process: CUDA, Ascend NPU (with torch_npu installed) or CPU. No other module names a kind."""

from __future__ import annotations

import torch

from magicdrive_core.errors import MagicDriveError

# Products and convolutions in fp32 are fp32: TF32, which torch allows in convolutions, keeps 10 bits of 23. cuDNN does
# not try kernels out, which would choose others in each run and at each new size of a clip.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
torch.backends.cudnn.benchmark = False

BACKENDS = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}  # backend of collectives by kind of device


def kind() -> str:
    """Returns "cuda", "npu" or "cpu"; torch finds an installed torch_npu by itself."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None and found.type in BACKENDS else "cpu"


def this_device() -> torch.device:
    """Returns the device that ``take_device`` chose, or the first device."""
    return torch.device(kind()) if kind() == "cpu" else torch.device(kind(), torch.accelerator.current_device_index())


def take_device(index: int, *, share: bool = False) -> torch.device:
    """Chooses the device of this host that this process works on.

    Args:
        index: number of the device; all CPUs are one device.
        share: let processes beyond the number of devices share them in turn.

    Returns:
        The device.

    Raises:
        MagicDriveError: there is no such device.
    """
    if kind() == "cpu":
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if index >= count and not share:
        raise MagicDriveError(
            f"process {index + 1} of this host has no device: there are {count}", f"set cluster.ranks to {count}"
        )
    torch.accelerator.set_device_index(index % count)
    return this_device()


def backend() -> str:
    """Returns the backend of collectives between devices of this kind."""
    return BACKENDS[kind()]
