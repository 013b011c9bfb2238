"""What every runtime does: the two programs of a bundle behind two methods, with the state kept on the device."""

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from tnllm_export.models.config import TransnormerConfig

State: TypeAlias = object
"""A runtime's own handle of one recurrent state per layer, [B, H, K, V] float32 each. Opaque: only the runtime that
made it may look inside. `host_state` and `device_state` convert from and to plain tensors."""


@dataclass(frozen=True)
class RuntimeInfo:
    """What a loaded runtime runs.

    Attributes:
        name: The name that `load_runtime` takes, e.g. "onnxruntime".
        device: "cpu" or "cuda".
        dtype: Activation dtype, e.g. "float32".
        config: The model's configuration.
        logits: "last" or "all": which logits `prefill` returns.
        weights_id: Which weights are loaded (a checksum), or "" for a model that never was in a file.
        runs_ahead: Whether the runtime can decode a token that the host has not seen yet: see `ahead.RunsAhead`.
    """

    name: str
    device: str
    dtype: str
    config: TransnormerConfig
    logits: str
    weights_id: str = ""
    runs_ahead: bool = False


class Runtime(Protocol):
    """Runs prefill and decode of one model. Nothing is remembered between calls: the state goes in and comes out.

    Threads take turns: calls of one runtime may share memory for inputs and states.
    """

    @property
    def info(self) -> RuntimeInfo:
        """What is loaded."""

    def initial_state(self, batch: int) -> State:
        """Return the all-zero state of `batch` sequences. Raises StateError where `batch` is below 1."""

    def prefill(self, input_ids: Tensor, lengths: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed many tokens.

        Args:
            input_ids: [B, T] int64, B and T at least 1. Padding holds token ids too, any of the vocabulary.
            lengths: [B] int32; tokens at t >= lengths[b] are padding, change no state and give no logits.
            positions: [B] int64, the number of tokens that are already in the state.
            state: From `initial_state` or an earlier call. It stays valid afterwards.

        Returns:
            Logits float32, [B, vocab] of each last valid token, or [B, T, vocab] where the bundle was exported with
            all logits (rows at t >= lengths[b] are undefined); and the new state. A row of length 0 keeps its state;
            its logits mean nothing.

        Raises:
            PromptError: a token id outside the vocabulary.
            StateError: a state of another batch or runtime, or one that `decode` has consumed.
            RequestError: an argument of another shape or dtype, or a length or position out of its range.
        """

    def decode(self, input_ids: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed one token: input_ids [B, 1] int64, positions [B] int64 -> logits [B, vocab] float32, new state.

        Consumes the state that is passed: once decode has returned, only the new one may be used (a runtime may have
        updated it in place), and the old one raises StateError. A decode that raises leaves the passed state as it
        was. Raises what `prefill` raises.
        """

    def host_state(self, state: State) -> list[Tensor]:
        """Copy a state to the host: one float32 tensor [B, H, K, V] per layer."""

    def device_state(self, tensors: list[Tensor]) -> State:
        """Copy host tensors into a new state. Raises StateError where shape or dtype does not fit the model."""
