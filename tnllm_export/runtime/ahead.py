"""Steps that a device runs while the host goes on: what they give, and what a runtime offers that makes them."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tnllm_export.runtime.protocol import Runtime, State


class HostCopy:
    """A copy to the host of what the device will have written; `wait` gives it."""

    __slots__ = ("_arrived", "_tensor")

    def __init__(self, like: Tensor) -> None:
        """Allocate the copy of a tensor like this one."""
        self._tensor = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
        self._arrived = torch.cuda.Event() if like.is_cuda else None  # type: ignore[no-untyped-call]

    def start(self, tensor: Tensor) -> "HostCopy":
        """Copy the tensor when its device's current stream is there. Work on that stream may overwrite it later."""
        self._tensor.copy_(tensor, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(tensor.device))
        return self

    def wait(self) -> Tensor:
        """Return the copy when it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor


class Underway:
    """A decode step that may still run.

    Attributes:
        logits: [B, vocab] on the device, for work on the current stream. The next step of any state may overwrite it.
    """

    __slots__ = ("_choice", "logits")

    def __init__(self, logits: Tensor, choice: HostCopy) -> None:
        """Take the logits, and the copy of [3, ≥ B] int64: the likeliest tokens, anything, and their logits' bits."""
        self.logits = logits
        self._choice = choice

    def wait(self) -> tuple[list[int], list[float]]:
        """Wait for the step; return each sequence's likeliest token and its logit: NaN where any logit is NaN."""
        tokens, _, bits = self._choice.wait()
        B = len(self.logits)
        best: list[float] = bits.view(self.logits.dtype)[:B].tolist()
        return tokens[:B].tolist(), best


class RunsAhead(Runtime, Protocol):
    """What a runtime offers beside `Runtime` where `RuntimeInfo.runs_ahead` is true."""

    def decode_ahead(self, input_ids: Tensor | None, positions: Tensor | None, state: State) -> tuple[Underway, State]:
        """Enqueue what `decode` does and the choice of each sequence's likeliest next token, and wait for nothing.

        Args:
            input_ids: [B, 1] int64. With `positions`, tokens on the host, as `decode` takes them. Without, tokens that
                the caller chose from the logits of the step before, on the device: nobody has seen them, so they are
                moved into the vocabulary rather than refused. None: the likeliest ones, as the step before chose them.
            positions: [B] int64 on the host, or None: those behind the step before, which `decode_ahead` has made.
            state: Consumed, as by `decode`.

        Raises:
            StateError: `positions` is None, and the state does not come from `decode_ahead`.
        """

    def select(self, state: State, places: Sequence[int]) -> State:
        """Copy the sequences at these places into a new state, without a way over the host. Raises StateError."""
