"""Saying in one line that a GPU's memory does not suffice."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tnllm_export.errors import DeviceMemoryError

_WANTED = re.compile(r"Tried to allocate ([\d.]+ \w+)")


@contextmanager
def reporting_out_of_memory(device: torch.device, work: str, way_out: str) -> Iterator[None]:
    """Turn PyTorch's out-of-memory error into DeviceMemoryError: what was needed, what was free, the way out.

    What the failed call had allocated is let go, so that the caller may try something smaller.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if error.__traceback__ is not None:
            traceback.clear_frames(error.__traceback__)
        wanted = _WANTED.search(str(error))
        needed = wanted[1] if wanted else "more memory"
        raise DeviceMemoryError(
            f"{work}: the GPU's memory does not suffice: {needed} asked for, {_free(device)} free; {way_out}"
        ) from error


def gibibytes(size: float) -> str:
    """Return a number of bytes as people read it."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 2**10:.1f} KiB"


def _free(device: torch.device) -> str:
    free, total = torch.cuda.mem_get_info(device)
    return f"{gibibytes(free)} of {gibibytes(total)}"
