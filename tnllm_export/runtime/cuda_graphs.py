"""Work captured as CUDA graphs, and pinned memory through which its inputs come."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tnllm_export.errors import RuntimeTargetError


@dataclass(frozen=True)
class Captured:
    """A decode step, or a prefill, with fixed inputs and outputs.

    Attributes:
        replay: Runs it again, on the current stream.
        logits: [B, vocab], written by each replay.
    """

    replay: Callable[[], None]
    logits: Tensor


Capture = Callable[[Callable[[], Tensor]], Captured]


class Staging:
    """Pinned memory for inputs, int64. numpy fills it: for a few numbers that is quicker than PyTorch."""

    def __init__(self, shape: tuple[int, ...], on_gpu: bool) -> None:
        self._tensor = torch.zeros(shape, dtype=torch.int64, pin_memory=on_gpu)
        self._array: NDArray[np.int64] = self._tensor.numpy()
        self._arrived = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def numbers(self) -> NDArray[np.int64]:
        """What will be sent, to be filled; waits where an earlier copy is not done."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._array

    def send(self, inputs: Tensor) -> None:
        """Start to copy the numbers into `inputs` on the device."""
        inputs.copy_(self._tensor, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()


def send_token(staging: Staging, input_ids: Tensor, positions: Tensor, inputs: Tensor) -> None:
    """Start to bring token ids [B, 1] and positions [B] into the first columns of inputs [2, rows] on the device."""
    B = positions.shape[0]
    if input_ids.is_cpu and positions.is_cpu:
        staged = staging.numbers()
        staged[0, :B] = input_ids.numpy()[:, 0]
        staged[1, :B] = positions.numpy()
        staging.send(inputs)
    else:
        inputs[0, :B] = input_ids.squeeze(1)
        inputs[1, :B] = positions


class CudaCapture:
    """Captures a call as a CUDA graph. All graphs share one pool of memory: they never run at the same time."""

    def __init__(self, device: torch.device, *, warm_ups: int = 2, reserve: int = 0) -> None:
        """Make the captures of a device.

        Args:
            device: Where the calls run.
            warm_ups: How often a call is run before it is captured, which compiles kernels and opens libraries.
            reserve: Bytes that the pool takes at once, for the largest graph to come: in many small pieces, as
                growing graphs ask for them, it would take more.
        """
        self._device = device
        self._warm_ups = warm_ups
        self._reserve = reserve
        self._pool: Any = None
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, call: Callable[[], Tensor]) -> Captured:
        """Warm the call up and capture it. Raises RuntimeTargetError."""
        # A pool ends with the last of its graphs.
        pool = self._pool if self._graphs else torch.cuda.graph_pool_handle()
        # One for all captures: libraries keep a workspace for each stream.
        self._stream = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(self._warm_ups):
                    call()
        finally:
            torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # The first, since a capture that fails leaves its stream the current one. Other threads may allocate.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                if self._reserve and pool is not self._pool:
                    torch.empty(self._reserve, dtype=torch.uint8, device=self._device)  # freed: the pool keeps it
                logits = call()
        except RuntimeError as error:
            recover(self._device, pool, stream)
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            reason = " ".join(str(error).split())[:300]
            raise RuntimeTargetError(
                f"the work could not be captured as a CUDA graph ({reason}); run it with TNLLM_KERNELS=pytorch, or on "
                "the CPU"
            ) from error
        self._pool = pool  # one of a failed capture could not be shared
        self._graphs.add(graph)
        return Captured(graph.replay, logits)


def recover(device: torch.device, pool: Any, stream: torch.cuda.Stream) -> None:
    """Make PyTorch forget a capture that has failed.

    Before 2.12 its allocator goes on to believe in it (#180395), and so does its generator of random numbers until a
    capture succeeds.
    """
    with suppress(RuntimeError):  # it knows
        torch._C._cuda_endAllocateToPool(device.index, pool)
    with suppress(RuntimeError), torch.cuda.stream(stream):
        graph, own = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=own, stream=stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=device)
