"""Memory of a look-back: where segments leave their states for each other, and counters that say which are there."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tnllm_export.kernels.cuda_driver import capture_of, use_context

STOCK = 32
"""So many launches have their counters set to 0 at once."""

KEPT_NUMBERS = 3 << 20
"""Numbers of states that are kept, 12 MiB: calls that need more are so long that the host has time to allocate."""

KEPT_STREAMS = 8
"""Streams that states are kept for, by each thread."""

KEPT_STOCKS = 128
"""Sizes, streams and captures that counters are kept for; a server sees many sizes."""


class _Kept(threading.local):
    """What one thread keeps for its next launches, by device, stream and what is captured there."""

    def __init__(self) -> None:
        self.nothing = False
        self.states: dict[tuple[int, int], Tensor] = {}
        self.counters: dict[tuple[int, int, int, int], list[Tensor]] = {}


_kept = _Kept()


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Keep no memory that is allocated in this context, in this thread.

    For calls from compiled code: torch.compile allocates from a pool of its CUDA graphs, also while it warms up without
    capturing, and refuses what stays there.
    """
    before, _kept.nothing = _kept.nothing, True
    try:
        yield
    finally:
        _kept.nothing = before


def handover_memory(state_numbers: int, counters: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return memory for one launch on the current stream of `device`, which is current.

    A launch that allocates, and sets counters to 0 by a launch of its own, costs a short sequence's host more than its
    kernel. So a stream's launches, which run one after the other, share the memory for states, and counters are set to
    0 for many at a time. A CUDA graph, which may run on any stream, and again, has its own.

    Args:
        state_numbers: Numbers of all states, at least.
        counters: Counters, at least.
        device: Where they lie.

    Returns:
        At least so many float32 with anything in them, and so many int32 that are 0.
    """
    if device.type != "cuda" or _kept.nothing:
        return _states(state_numbers, device), torch.zeros(counters, dtype=torch.int32, device=device)
    index = device.index
    use_context(index)
    stream = torch._C._cuda_getCurrentRawStream(index)
    if torch.cuda.is_current_stream_capturing():
        return _states(state_numbers, device), _counters(counters, device, stream, capture_of(stream))
    zeros = _counters(counters, device, stream, 0)
    if state_numbers > KEPT_NUMBERS:
        return _states(state_numbers, device), zeros
    states = _kept.states.get((index, stream))
    if states is None or states.numel() < state_numbers:
        if states is None and len(_kept.states) >= KEPT_STREAMS:
            _kept.states.clear()
        states = _kept.states[index, stream] = _states(state_numbers, device)
    return states, zeros


def _states(numbers: int, device: torch.device) -> Tensor:
    return torch.empty(numbers, dtype=torch.float32, device=device)


def _counters(count: int, device: torch.device, stream: int, capture: int) -> Tensor:
    key = count, device.index, stream, capture
    ready = _kept.counters.get(key)
    if not ready:
        # What is left of captures that have ended belongs to their graphs.
        ended = [other for other in _kept.counters if other[3] not in (0, capture)]
        for other in ended:
            del _kept.counters[other]
        if len(_kept.counters) >= KEPT_STOCKS:
            _kept.counters.clear()
        # Rows start at multiples of 16 bytes, as allocations do.
        rows = torch.zeros((STOCK, -(-count // 4) * 4), dtype=torch.int32, device=device)
        ready = _kept.counters[key] = list(rows.unbind())
    return ready.pop()
