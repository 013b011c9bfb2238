"""The two programs of a model, traced by torch.export with symbolic batch and time."""

import warnings
from typing import Any

import torch
import torch.export._trace  # now, not by the first call, which waits for the checkpoint
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram

from tnllm_export.errors import ExportError
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import Logits, TransnormerForCausalLM
from tnllm_export.models.programs import DecodeProgram, PrefillProgram

_B, _T = 2, 3  # any sizes but 0 and 1, which torch.export would specialise on


class Tracer:
    """Traces the programs of a model of some configuration, without its weights: those are fake tensors."""

    def __init__(self, config: TransnormerConfig, dtype: torch.dtype) -> None:
        self._fake = FakeTensorMode()
        self._batch, self._time = Dim("batch", min=1), Dim("time", min=1)
        with self._fake:
            self._causal_lm = TransnormerForCausalLM(config).cast_weights(dtype).eval().requires_grad_(False)
            self._positions = torch.zeros(_B, dtype=torch.int64)
            self._state = self._causal_lm.initial_state(_B)

    def prefill(self, logits: Logits) -> ExportedProgram:
        """Trace prefill. Raises ExportError if torch.export refuses it."""
        with self._fake:
            input_ids = torch.zeros(_B, _T, dtype=torch.int64)
            lengths = torch.full((_B,), _T, dtype=torch.int32)
        batch = {0: self._batch}
        return _trace(
            self._fake,
            PrefillProgram(self._causal_lm, logits),
            (input_ids, lengths, self._positions, self._state),
            ({0: self._batch, 1: self._time}, batch, batch, [batch] * len(self._state)),
        )

    def decode(self) -> ExportedProgram:
        """Trace decode. Raises ExportError if torch.export refuses it."""
        with self._fake:
            token = torch.zeros(_B, 1, dtype=torch.int64)
        batch = {0: self._batch}
        return _trace(
            self._fake,
            DecodeProgram(self._causal_lm),
            (token, self._positions, self._state),
            (batch, batch, [batch] * len(self._state)),
        )


def _trace(fake: FakeTensorMode, module: nn.Module, arguments: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    try:
        # Most calls are made once or twice: to remember what they gave would take a quarter of the time.
        with fake, dynamo_config.patch(fake_tensor_cache_enabled=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
    except (RuntimeError, ValueError, TypeError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ExportError(f"torch.export could not trace {type(module).__name__}: {first_line}") from error
