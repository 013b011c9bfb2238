"""The PyTorch model as a runtime: on the CPU the truth that others are compared with, on CUDA with CUDA graphs.

On CUDA, decode is a CUDA graph, and so is prefill of a short prompt whose size comes again; with Triton kernels, it
runs any number of tokens at once.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Literal, Self

import torch
from safetensors import safe_open
from torch import Tensor

from tnllm_export.bundle import Bundle
from tnllm_export.errors import DeviceMemoryError
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.decay import slope_rates
from tnllm_export.models.fused_prefill import prefill
from tnllm_export.models.modeling import GatedLinearAttention, Logits, TransnormerForCausalLM
from tnllm_export.runtime.cuda_graphs import Capture
from tnllm_export.runtime.decode_graphs import DecodeGraphs, GraphState
from tnllm_export.runtime.device_memory import reporting_out_of_memory
from tnllm_export.runtime.gpu import current_gpu
from tnllm_export.runtime.graph_runtime import GraphRuntime
from tnllm_export.runtime.prefill_graphs import PrefillGraphs
from tnllm_export.runtime.protocol import RuntimeInfo, State
from tnllm_export.runtime.state import check_handle
from tnllm_export.runtime.support import check_kernels, check_supported, weights_id
from tnllm_export.runtime.validation import check_prefill


class TorchRuntime(GraphRuntime):
    """Runs `TransnormerForCausalLM` under `torch.inference_mode`; the model is used as it is, on its device.

    A float64 model works too: its states and logits are float64. Logits stay on the device. A state that was decoded on
    CUDA lives in its graph (see `decode_graphs`); what the graphs of short prompts take beside is in `prefill_graphs`.
    """

    def __init__(
        self,
        model: TransnormerForCausalLM,
        *,
        logits: Logits = "last",
        weights_id: str = "",
        capture: Capture | Literal["auto"] | None = "auto",
    ) -> None:
        """Make a runtime.

        Args:
            model: What is run.
            logits: Which logits `prefill` returns.
            weights_id: Which weights these are.
            capture: How decode steps and short prompts are captured: "auto" as CUDA graphs on a CUDA device, None not
                at all.
        """
        weight = model.lm_head.weight
        graphs: DecodeGraphs | None = None
        self._model = model
        self._prefill_graphs: PrefillGraphs | None = None
        if capture is not None and (capture != "auto" or weight.device.type == "cuda"):
            chosen = None if capture == "auto" else capture
            graphs = DecodeGraphs(model, chosen)
            if logits == "last":  # those of all tokens alone would take more memory than all else in a graph
                self._prefill_graphs = PrefillGraphs(model, chosen)
        self._logits: Logits = logits
        info = RuntimeInfo(
            name="torch",
            device=weight.device.type,
            dtype=str(weight.dtype).removeprefix("torch."),
            config=model.config,
            logits=logits,
            weights_id=weights_id,
            runs_ahead=graphs is not None,
        )
        super().__init__(info, weight.device, graphs, model.state_dtype)

    @classmethod
    def from_bundle(cls, bundle: Bundle, *, device: str = "cpu", threads: int | None = None) -> Self:
        """Build the eager model over a bundle's weights, memory-mapped where the device is the CPU.

        `threads` is PyTorch's own setting and holds for the whole process.

        Raises:
            UnsupportedTargetError: PyTorch does not run here on `device`, or the kernels that `TNLLM_KERNELS` asks for.
            DeviceMemoryError: The weights do not fit into the GPU's memory.
        """
        check_supported(bundle, "torch", device)
        if threads is not None:
            torch.set_num_threads(threads)
        place = torch.device(device) if device == "cpu" else current_gpu("torch")
        check_kernels(place)
        tensors = {}
        way_out = "free it for others' work, or load the bundle with --device cpu"
        with (
            reporting_out_of_memory(place, f"{bundle.path}: loading the weights", way_out),
            safe_open(bundle.weights_path, framework="pt", device=str(place)) as file,
        ):
            for name in file.keys():  # noqa: SIM118 - the handle is no dict
                tensors[name] = file.get_tensor(name)
        model = model_over(bundle.manifest.config, tensors, place)
        return cls(model, logits=bundle.manifest.logits, weights_id=weights_id(bundle))

    @property
    def model(self) -> TransnormerForCausalLM:
        """The eager model."""
        return self._model

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, lengths: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed input_ids [B, T]; see `Runtime.prefill`. Raises DeviceMemoryError where T is too large for the GPU."""
        check_prefill(self._info.config.vocab_size, input_ids, lengths, positions)
        B, T = input_ids.shape
        handle = check_handle(self, state, B)
        if self._prefill_graphs is not None and self._prefill_graphs.take(B, T):
            with suppress(DeviceMemoryError):  # a graph has two states of its own: the prompt alone may fit
                logits, present = self._prefill_graphs.prefill(input_ids, lengths, positions, handle)
                return logits, GraphState(self, present)
        with reporting_out_of_memory(
            self._device, f"prefill of {B} x {T} tokens", "feed the prompt in smaller pieces (--prefill-chunk)"
        ):
            ids, counts, places = (tensor.to(self._device) for tensor in (input_ids, lengths, positions))
            if self._logits == "last":
                logits, present = prefill(self._model, ids, counts, places, handle.tensors)
            else:
                logits, present = self._model(ids, counts, places, handle.tensors, self._logits)
        return logits, GraphState(self, present)

    def _decode_uncaptured(
        self, input_ids: Tensor, positions: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        with reporting_out_of_memory(self._device, "decode", "let go of states that are not needed any more"):
            return self._model.decode(input_ids.to(self._device), positions.to(self._device), past)


def model_over(config: TransnormerConfig, tensors: dict[str, Tensor], device: torch.device) -> TransnormerForCausalLM:
    """Build a model whose parameters are the given tensors, without a copy; a tied `lm_head.weight` may be absent.

    Decay rates are no parameters and are computed anew from the configuration.
    """
    with torch.device("meta"):
        model = TransnormerForCausalLM(config)
    if config.tie_word_embeddings:
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    mixers = [module for module in model.modules() if isinstance(module, GatedLinearAttention)]
    for layer, mixer in enumerate(mixers):
        rates = slope_rates(config.decay_type, layer, config.decoder_layers, config.decoder_attention_heads)
        mixer.slope_rate = rates.to(device)
    return model.requires_grad_(False)
