"""States to decode from."""

import torch

from tnllm_export.runtime import Runtime, State


def some_state(runtime: Runtime, batch: int, seed: int = 0) -> State:
    """Random numbers, the same in every runtime."""
    generator = torch.Generator().manual_seed(seed)
    zero = runtime.host_state(runtime.initial_state(batch))
    return runtime.device_state([torch.randn(tensor.shape, generator=generator) for tensor in zero])
