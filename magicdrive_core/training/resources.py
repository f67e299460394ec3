"""What a rank uses: memory of its device and of its host, and how fast the device could be.

Nothing here names a kind of device: torch.accelerator is CUDA, ROCm or a vendor's plugin, or absent on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import psutil
import torch

from magicdrive_core.memory import memory_left, memory_limit

# Dense TFLOP/s of the data sheets in bf16, and as many in fp16; the longest name that fits counts.
PEAK_TFLOPS = {"A100": 312.0, "A800": 312.0, "H100": 989.0, "H800": 989.0, "H200": 989.0, "H20": 148.0, "L40S": 362.0}


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes. The allocator's peaks since the start, and what the driver counts now: the device's true fill.

    The driver's figure holds what the allocator does not know: contexts, communication buffers, other processes.
    """

    allocated: int
    reserved: int
    used: int


def device_memory(device: torch.device) -> DeviceMemory | None:
    """Of a rank's device; None on a CPU."""
    if device.type == "cpu":
        return None
    free, total = torch.accelerator.get_memory_info(device)
    allocated, reserved = torch.accelerator.max_memory_allocated(device), torch.accelerator.max_memory_reserved(device)
    return DeviceMemory(allocated, reserved, total - free)


def fullest(devices: Sequence[DeviceMemory]) -> DeviceMemory | None:
    """The largest of each figure; None of none."""
    if not devices:
        return None
    return DeviceMemory(*(max(sizes) for sizes in zip(*map(astuple, devices), strict=True)))


def host_memory() -> dict[str, int]:
    """Bytes: of this process (``rss``; ``pss`` counts shared pages by their share), and of the whole container."""
    info = psutil.Process().memory_full_info()
    return {"rss": info.rss, "pss": getattr(info, "pss", info.rss), "container": memory_limit() - memory_left()}


def peak_tflops(device: torch.device, precision: str, configured: float | None) -> float | None:
    """Of one device; None where nothing is configured and the device is not in the table."""
    if configured is not None or device.type == "cpu" or precision == "fp32":
        return configured
    name = str(torch.get_device_module(device).get_device_name(device))
    return next((PEAK_TFLOPS[known] for known in sorted(PEAK_TFLOPS, key=len, reverse=True) if known in name), None)
