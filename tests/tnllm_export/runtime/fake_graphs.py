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


class Capture:
    """Counts captures and replays; fails when it is told to."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.replays = 0
        self.error: Exception | None = None

    def __call__(self, call: Callable[[], Tensor]) -> Captured:
        if self.error is not None:
            raise self.error
        captured = captured_on_the_cpu(call)
        self.batches.append(len(captured.logits))

        def replay() -> None:
            self.replays += 1
            captured.replay()

        return Captured(replay, captured.logits)
