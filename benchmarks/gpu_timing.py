"""Time and memory of work on a GPU, and the chip's own ceilings. On a CPU the same calls work, by its clock.

Calls rotate among several sets of inputs, so that what is timed does not find its inputs in the cache.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

Call = Callable[[], Any]

CACHE_BYTES = 200 * 2**20
"""Sets of inputs together hold at least this much: several times the L2 of today's GPUs (60 MB on an H200)."""

_GRAPH_CALLS = 24
_SHORT_MS = 0.3


@dataclass(frozen=True)
class Ceilings:
    """What the chip can do, measured: bytes per second (read plus written) and bfloat16 FLOP per second."""

    bandwidth: float
    matmul: float


@cache
def ceilings(device: str = "cuda") -> Ceilings:
    """Measure a large copy within the device and a large matrix product on random numbers."""
    size, width = (4 * 2**30, 8192) if device == "cuda" else (2**24, 256)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = milliseconds([partial(target.copy_, source)], device)
    left, right = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_ms = milliseconds([partial(torch.matmul, left, right)], device)
    return Ceilings(bandwidth=2 * size / copy_ms * 1e3, matmul=2 * width**3 / product_ms * 1e3)


def set_count(set_bytes: int) -> int:
    """How many sets of inputs of this size outgrow the cache together; one that does so alone is enough."""
    return max(1, -(-CACHE_BYTES // max(set_bytes, 1)))


def milliseconds(
    calls: Sequence[Call], device: str = "cuda", budget_ms: float = 120, least: int = 5, most: int = 200
) -> float:
    """Return the median time of one call, launched as a program launches it, after a warm-up.

    Args:
        calls: The same work on different inputs, called in turns.
        device: "cuda" or "cpu".
        budget_ms: About how long to measure.
        least: Repeats at least.
        most: Repeats at most.
    """
    for call in calls:
        call()
    estimate = statistics.median(_timed([calls[0]] * 3, device))
    repeats = max(least, min(most, int(budget_ms / max(estimate, 1e-3))))
    chosen = [calls[index % len(calls)] for index in range(repeats)]
    _timed(chosen[: max(1, repeats // 4)], device)
    return statistics.median(_timed(chosen, device))


def graph_milliseconds(calls: Sequence[Call], budget_ms: float = 120) -> float:
    """Return the median time of one call in a CUDA graph that makes all of them one after the other.

    What the calls return stays alive while the graph is made, so that each has output memory of its own.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        calls[0]()
        end.record()
    torch.cuda.synchronize()
    rounds = -(-_GRAPH_CALLS // len(calls)) if start.elapsed_time(end) < _SHORT_MS else 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(rounds) for call in calls]
    result = milliseconds([graph.replay], "cuda", budget_ms) / len(kept)
    del graph, kept
    return result


def alternating_milliseconds(calls: Sequence[Call], device: str = "cuda", rounds: int = 60) -> list[float]:
    """Return the median time of each of several calls that take turns, so that the clock's moods meet all alike."""
    _timed(list(calls) * 3, device)
    times = _timed(list(calls) * rounds, device)
    return [statistics.median(times[place :: len(calls)]) for place in range(len(calls))]


def peak_bytes(call: Call, device: str = "cuda") -> int:
    """Return by how much one call, results included, raised the memory that is allocated; 0 on a CPU."""
    if device != "cuda":
        call()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def describe(error: BaseException) -> str:
    """One line that says why something could not be measured."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def _timed(calls: Sequence[Call], device: str) -> list[float]:
    if device != "cuda":
        times = []
        for call in calls:
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
    for call, (start_event, end_event) in zip(calls, events, strict=True):
        start_event.record()
        call()
        end_event.record()
    torch.cuda.synchronize()
    return [start_event.elapsed_time(end_event) for start_event, end_event in events]
