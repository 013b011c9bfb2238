"""Peak memory of a runtime above what was in use before it was loaded."""

import gc
from pathlib import Path
from typing import Protocol

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_PYTORCH_ALONE = ("torch", "aotinductor")
"""Runtimes whose tensors all come from PyTorch's allocator."""


class Meter(Protocol):
    """Measures one runtime's memory; made before it is loaded.

    Attributes:
        how: What the figures are, for the reader of a report.
    """

    how: str

    def reset(self) -> None:
        """Forget the peak so far."""

    def peak(self) -> int | None:
        """Return the peak since `reset` in bytes, above the start; None where it can't be told."""


def meter_for(runtime: str, device: torch.device) -> Meter:
    """Return the meter for a runtime that is about to be loaded."""
    release(device)
    if device.type != "cuda":
        return ResidentMeter()
    return AllocatorMeter(device) if runtime in _PYTORCH_ALONE else DeviceMeter(device)


def release(device: torch.device) -> None:
    """Let go of what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class AllocatorMeter:
    """What PyTorch's allocator has handed out: exact where PyTorch is all that allocates."""

    how = "allocated by PyTorch on the GPU"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = torch.cuda.memory_allocated(device)

    def reset(self) -> None:
        """Forget the peak so far."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """Return the peak since `reset`."""
        return torch.cuda.max_memory_allocated(self._device) - self._start


class DeviceMeter:
    """What PyTorch's allocator has handed out, and what the driver says is in use beside PyTorch.

    The two apart: what PyTorch keeps for later would hide what a runtime takes from it, such as weights and states.
    Beside PyTorch runtimes keep what they have taken, so what is in use later was the peak.
    """

    how = "allocated by PyTorch, and in use beside it on the GPU as the driver counts, what others use included"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pytorch = AllocatorMeter(device)
        self._start = self._beside_pytorch()

    def reset(self) -> None:
        """Forget the peak so far."""
        self._pytorch.reset()

    def peak(self) -> int:
        """Return the peak since `reset` of PyTorch's part, and what is in use now of the rest."""
        return self._pytorch.peak() + self._beside_pytorch() - self._start

    def _beside_pytorch(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - torch.cuda.memory_reserved(self._device)


class ResidentMeter:
    """The resident memory of this process, mapped files included, as Linux counts it."""

    how = "resident memory of the process, mapped weights included"

    def __init__(self) -> None:
        self._start = _kibibytes("VmRSS")

    def reset(self) -> None:
        """Forget the peak so far, where Linux lets us."""
        if _CLEAR.exists():
            _CLEAR.write_text(_RESET_PEAK)

    def peak(self) -> int | None:
        """Return the peak since `reset`."""
        peak = _kibibytes("VmHWM")
        return None if peak is None or self._start is None else max(0, peak - self._start)


def _kibibytes(field: str) -> int | None:
    """Read a field of /proc/self/status in bytes; None elsewhere than on Linux."""
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    return None
