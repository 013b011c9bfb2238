"""The two programs of a model, traced by torch.export with symbolic batch and time."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram

from tnllm_export.errors import ExportError
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import Logits, TransnormerForCausalLM

MODEL = "causal_lm"
"""Name under which a program module holds the model."""


class PrefillProgram(nn.Module):
    """input_ids [B, T], lengths [B], positions [B], states -> logits, new states."""

    def __init__(self, causal_lm: TransnormerForCausalLM, logits: Logits) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.logits = logits

    def forward(
        self, input_ids: Tensor, lengths: Tensor, positions: Tensor, past_state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Feed many tokens."""
        answer: tuple[Tensor, list[Tensor]] = self.causal_lm(
            input_ids, lengths, positions, past_state, logits=self.logits
        )
        return answer


class DecodeProgram(nn.Module):
    """input_ids [B, 1], positions [B], states -> logits, new states."""

    def __init__(self, causal_lm: TransnormerForCausalLM) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, input_ids: Tensor, positions: Tensor, past_state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Feed one token."""
        return self.causal_lm.decode(input_ids, positions, past_state)


@dataclass(frozen=True)
class TracedPrograms:
    """Both ExportedPrograms of a model; their weights are fake tensors."""

    prefill: ExportedProgram
    decode: ExportedProgram


def trace_programs(config: TransnormerConfig, dtype: torch.dtype, logits: Logits) -> TracedPrograms:
    """Trace prefill and decode of a model of this configuration, without its weights.

    Raises:
        ExportError: torch.export refused the program.
    """
    B, T = 2, 3  # any sizes but 0 and 1, which torch.export would specialise on
    batch, time = Dim("batch", min=1), Dim("time", min=1)
    fake = FakeTensorMode()
    with fake:
        causal_lm = TransnormerForCausalLM(config).cast_weights(dtype).eval().requires_grad_(False)
        input_ids = torch.zeros(B, T, dtype=torch.int64)
        lengths = torch.full((B,), T, dtype=torch.int32)
        positions = torch.zeros(B, dtype=torch.int64)
        state = causal_lm.initial_state(B)
    states = [{0: batch} for _ in state]
    prefill = _trace(
        fake,
        PrefillProgram(causal_lm, logits),
        (input_ids, lengths, positions, state),
        ({0: batch, 1: time}, {0: batch}, {0: batch}, states),
    )
    with fake:
        token = torch.zeros(B, 1, dtype=torch.int64)
    decode = _trace(fake, DecodeProgram(causal_lm), (token, positions, state), ({0: batch}, {0: batch}, states))
    return TracedPrograms(prefill, decode)


def _trace(fake: FakeTensorMode, module: nn.Module, arguments: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    try:
        # Most calls are made once or twice: to remember what they gave would take a quarter of the time.
        with fake, dynamo_config.patch(fake_tensor_cache_enabled=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
    except (RuntimeError, ValueError, TypeError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ExportError(f"torch.export could not trace {type(module).__name__}: {first_line}") from error
