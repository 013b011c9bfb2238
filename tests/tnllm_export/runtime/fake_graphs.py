"""Captured steps without a GPU."""

from collections.abc import Callable

from torch import Tensor

from tnllm_export.runtime.cuda_graphs import Captured


def captured_on_the_cpu(call: Callable[[], Tensor]) -> Captured:
    """Stand in for a CUDA graph: fixed inputs and outputs, and capturing runs the call."""
    logits = call().clone()

    def replay() -> None:
        logits.copy_(call())

    return Captured(replay, logits)
