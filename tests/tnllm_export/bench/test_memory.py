"""Meters of a GPU's memory, with a fake GPU."""

import pytest
import torch

from tnllm_export.bench.memory import meter_for

GPU = torch.device("cuda", 0)
TOTAL = 1000


class Gpu:
    """What PyTorch and the driver say of a GPU on which PyTorch has `allocated`, and keeps `cached` for later."""

    def __init__(self):
        self.allocated = self.peak = self.cached = self.others = 0

    def allocate(self, size):
        """As PyTorch does: from what it keeps, where that suffices."""
        self.cached = max(0, self.cached - size)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def free(self, size):
        self.allocated -= size
        self.cached += size

    def reserved(self):
        return self.allocated + self.cached

    def reset(self):
        self.peak = self.allocated


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    for name, answer in {
        "memory_allocated": lambda device: gpu.allocated,
        "max_memory_allocated": lambda device: gpu.peak,
        "memory_reserved": lambda device: gpu.reserved(),
        "reset_peak_memory_stats": lambda device: gpu.reset(),
        "mem_get_info": lambda device: (TOTAL - gpu.reserved() - gpu.others, TOTAL),
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return gpu


@pytest.mark.parametrize("runtime", ["torch", "aotinductor", "onnxruntime", "tensorrt"])
def test_what_pytorch_keeps_for_later_hides_nothing(gpu, runtime):
    gpu.allocate(300)
    gpu.free(300)
    meter = meter_for(runtime, GPU)
    meter.reset()
    gpu.allocate(200)
    assert meter.peak() == 200
    meter.reset()
    gpu.allocate(50)
    gpu.free(50)
    assert meter.peak() == 250
    meter.reset()
    assert meter.peak() == 200


def test_memory_beside_pytorch_counts_where_a_runtime_takes_some(gpu):
    gpu.others = 10
    meters = {name: meter_for(name, GPU) for name in ("torch", "onnxruntime")}
    gpu.allocate(100)
    gpu.others += 70
    assert {name: meter.peak() for name, meter in meters.items()} == {"torch": 100, "onnxruntime": 170}
