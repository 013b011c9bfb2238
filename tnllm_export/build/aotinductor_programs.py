"""The two programs as AOTInductor compiles them: for one device, with both ops in a form that Inductor sees through."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tnllm_export.errors import EngineBuildError
from tnllm_export.kernels.contract import CHUNK_SIZE, LIGHTNING_ATTENTION, LIGHTNING_ATTENTION_STEP, NAMESPACE
from tnllm_export.kernels.lightning_attention.loop_free import lightning_attention_loop_free
from tnllm_export.kernels.lightning_attention.step import lightning_attention_step_pytorch
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.decay import slope_rates
from tnllm_export.models.modeling import GatedLinearAttention, Logits, TransnormerForCausalLM
from tnllm_export.models.programs import DecodeProgram, PrefillProgram

# Compilers specialise on sizes of 0 and 1: so there are several sequences, and several groups of several chunks.
_B, _T = 2, 10 * CHUNK_SIZE + 1


class _DecodeInPlace(DecodeProgram):
    """input_ids [B, 1], positions [B], states -> logits; the new states are written over the old ones."""

    def forward(self, input_ids: Tensor, positions: Tensor, past_state: list[Tensor]) -> Tensor:  # type: ignore[override]
        logits, present_state = self.causal_lm.decode(input_ids, positions, past_state)
        for past, present in zip(past_state, present_state, strict=True):
            past.copy_(present)
        return logits


class ProgramTracer:
    """Traces the programs of a model for a device, with symbolic batch and time.

    Weights are parameters without content, but for the decay rates: on the CPU their memory is never touched, on CUDA
    it is allocated.
    """

    def __init__(self, config: TransnormerConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        with torch.device("meta"):
            model = TransnormerForCausalLM(config).cast_weights(dtype)
        self._model = model.to_empty(device=device).eval().requires_grad_(False)
        self._model.tie_weights()
        mixers = (module for module in self._model.modules() if isinstance(module, GatedLinearAttention))
        for layer, mixer in enumerate(mixers):
            # Inductor writes short constants into the code, so these have to be true already.
            mixer.slope_rate.copy_(
                slope_rates(config.decay_type, layer, config.decoder_layers, config.decoder_attention_heads)
            )
        # Inductor takes inputs as aligned to 16 bytes if these are, and warns and copies at every step when one is not.
        # Decode's positions follow its token ids in one buffer.
        self._positions = torch.zeros(_B + 1, dtype=torch.int64, device=device)[1:]
        self._state = self._model.initial_state(_B)
        self._batch, self._time = Dim("batch", min=1), Dim("time", min=1)

    def prefill(self, logits: Logits) -> ExportedProgram:
        """Trace prefill. Raises EngineBuildError where torch.export refuses it."""
        input_ids = torch.zeros(_B, _T, dtype=torch.int64, device=self._device)
        lengths = torch.full((_B,), _T, dtype=torch.int32, device=self._device)
        batch = {0: self._batch}
        shapes = ({0: self._batch, 1: self._time}, batch, batch, [batch] * len(self._state))
        return self._trace(
            PrefillProgram(self._model, logits), (input_ids, lengths, self._positions, self._state), shapes
        )

    def decode(self) -> ExportedProgram:
        """Trace decode, for CUDA with the states updated in place. Raises EngineBuildError as `prefill` does."""
        token = torch.zeros(_B, 1, dtype=torch.int64, device=self._device)
        batch = {0: self._batch}
        module = _DecodeInPlace(self._model) if self._device.type == "cuda" else DecodeProgram(self._model)
        return self._trace(module, (token, self._positions, self._state), (batch, batch, [batch] * len(self._state)))

    def _trace(self, module: nn.Module, arguments: Sequence[Any], shapes: Any) -> ExportedProgram:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program: ExportedProgram = torch.export.export(
                    module, tuple(arguments), dynamic_shapes=shapes, strict=False
                )
                if self._device.type == "cpu":
                    decomposed: ExportedProgram = program.run_decompositions(_PYTORCH_FORMS)
                    return decomposed
                # Triton is imported where a package holds its kernels.
                from tnllm_export.build.aotinductor_kernels import use_triton_ops  # noqa: PLC0415

                major, minor = torch.cuda.get_device_capability(self._device)
                processors = torch.cuda.get_device_properties(self._device).multi_processor_count
                return use_triton_ops(program, 10 * major + minor, processors)
        except (RuntimeError, ValueError, TypeError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise EngineBuildError(
                f"torch {torch.__version__} could not trace {_name(module)} ({first_line}); build with another version"
            ) from error


def _name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("_").removesuffix("Program")


_OPS = getattr(torch.ops, NAMESPACE)
# Inductor would look for Triton inside the ops, on the CPU as well.
_PYTORCH_FORMS = {
    getattr(_OPS, LIGHTNING_ATTENTION.torch_name).default: lightning_attention_loop_free,
    getattr(_OPS, LIGHTNING_ATTENTION_STEP.torch_name).default: lightning_attention_step_pytorch,
}
