"""Timing single calls under a deadline."""

import time
from collections.abc import Callable

from tnllm_export.bench.records import Times

LEAST_CALLS = 3


def percentile(values: list[float], share: float) -> float:
    """Return the value that a share of all are below, between neighbours in proportion."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def time_calls(call: Callable[[], object], calls: int, deadline: float, *, warm_up: int) -> Times:
    """Time `calls` calls after a warm-up, fewer where the deadline passes, but at least 3.

    Args:
        call: Returns when all of its work is done.
        calls: How many are timed.
        deadline: By the clock of `time.perf_counter`.
        warm_up: Calls before, which are not timed; the first is always made.
    """
    for done in range(warm_up):
        if done and time.perf_counter() > deadline:
            break
        call()
    seconds: list[float] = []
    while len(seconds) < calls and (len(seconds) < LEAST_CALLS or time.perf_counter() < deadline):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return summarize(seconds)


def summarize(seconds: list[float]) -> Times:
    """Return median, 10th and 90th percentile."""
    return Times(percentile(seconds, 0.5), percentile(seconds, 0.1), percentile(seconds, 0.9), len(seconds))
