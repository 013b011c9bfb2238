"""What a device can do: bytes per second of a copy, FLOP per second of a matrix product."""

import time
from collections.abc import Callable

import torch

from tnllm_export.bench.records import Ceilings
from tnllm_export.bundle import DTYPES

_SECONDS = 0.3
_LEAST_CALLS = 3
_COPY_BYTES = {"cuda": 2**32, "cpu": 2**28}
"""Much more than the caches hold."""

_MATMUL_WIDTH = {"cuda": 8192, "cpu": 1024}


def measure_ceilings(device: torch.device, dtype: str) -> Ceilings:
    """Measure a large copy within the device and a large product of random matrices: the best of several calls.

    The product is in `dtype`; on the CPU also in float32, in which runtimes compute where that is quicker.
    """
    size, width = _COPY_BYTES[device.type], _MATMUL_WIDTH[device.type]
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        size = min(size, free // 8)
    bandwidth = 2 * size / _copy_seconds(size, device)
    dtypes = (dtype,) if device.type == "cuda" else tuple(dict.fromkeys((dtype, "float32")))
    seconds, fastest = min((_product_seconds(width, DTYPES[name], device), name) for name in dtypes)
    return Ceilings(bandwidth, 2 * width**3 / seconds, fastest)


def _copy_seconds(size: int, device: torch.device) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _best_seconds(lambda: target.copy_(source), device)


def _product_seconds(width: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    return _best_seconds(lambda: left @ right, device)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(times) < _LEAST_CALLS or time.perf_counter() < end:
        wait_for(device)
        start = time.perf_counter()
        call()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return min(times)
