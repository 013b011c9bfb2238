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
    """What a loaded runtime runs."""

    name: str
    device: str
    dtype: str
    config: TransnormerConfig
    logits: str
    """"last" or "all": which logits `prefill` returns."""


class Runtime(Protocol):
    """Runs prefill and decode of one model. Stateless between calls: the state goes in and comes out."""

    @property
    def info(self) -> RuntimeInfo:
        """What is loaded."""

    def initial_state(self, batch: int) -> State:
        """Return the all-zero state of `batch` sequences."""

    def prefill(self, input_ids: Tensor, lengths: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed many tokens.

        Args:
            input_ids: [B, T] int64.
            lengths: [B] int32; tokens at t >= lengths[b] are padding, change no state and give no logits.
            positions: [B] int64, the number of tokens that are already in the state.
            state: From `initial_state` or an earlier call. It stays valid afterwards.

        Returns:
            Logits float32, [B, vocab] of each last valid token, or [B, T, vocab] where the bundle was exported with
            all logits (rows at t >= lengths[b] are undefined); and the new state.

        Raises:
            PromptError: a token id outside the vocabulary.
            StateError: a state of another shape or runtime.
        """

    def decode(self, input_ids: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed one token: input_ids [B, 1] int64, positions [B] int64 -> logits [B, vocab] float32, new state.

        The new state may reuse the memory of a state that an earlier `decode` returned, but never of the one passed.
        """

    def host_state(self, state: State) -> list[Tensor]:
        """Copy a state to the host: one float32 tensor [B, H, K, V] per layer."""

    def device_state(self, tensors: list[Tensor]) -> State:
        """Make a state from host tensors. Raises StateError where shape or dtype does not fit the model."""
