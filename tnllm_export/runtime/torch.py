"""The eager model as a runtime: the truth that every other runtime is compared with."""

from typing import Self

import torch
from safetensors import safe_open
from torch import Tensor

from tnllm_export.bundle import Bundle
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.decay import slope_rates
from tnllm_export.models.modeling import GatedLinearAttention, Logits, TransnormerForCausalLM
from tnllm_export.runtime.protocol import RuntimeInfo, State
from tnllm_export.runtime.state import StateHandle, check_batch, check_handle, check_state_tensors
from tnllm_export.runtime.support import check_supported, weights_id
from tnllm_export.runtime.validation import check_decode, check_prefill


class TorchRuntime:
    """Runs `TransnormerForCausalLM` under `torch.inference_mode`; the model is used as it is, on its device.

    A float64 model works too: its states and logits are float64.
    """

    def __init__(self, model: TransnormerForCausalLM, *, logits: Logits = "last", weights_id: str = "") -> None:
        weight = model.lm_head.weight
        self._model = model
        self._logits: Logits = logits
        self._info = RuntimeInfo(
            name="torch",
            device=weight.device.type,
            dtype=str(weight.dtype).removeprefix("torch."),
            config=model.config,
            logits=logits,
            weights_id=weights_id,
        )

    @classmethod
    def from_bundle(cls, bundle: Bundle, *, device: str = "cpu", threads: int | None = None) -> Self:
        """Build the eager model over a bundle's weights, memory-mapped where the device is the CPU.

        `threads` is PyTorch's own setting and holds for the whole process.

        Raises:
            UnsupportedTargetError: PyTorch does not run here on `device`.
        """
        check_supported(bundle, "torch", device)
        if threads is not None:
            torch.set_num_threads(threads)
        tensors = {}
        with safe_open(bundle.weights_path, framework="pt", device=device) as file:
            for name in file.keys():  # noqa: SIM118 - the handle is no dict
                tensors[name] = file.get_tensor(name)
        model = model_over(bundle.manifest.config, tensors, torch.device(device))
        return cls(model, logits=bundle.manifest.logits, weights_id=weights_id(bundle))

    @property
    def info(self) -> RuntimeInfo:
        """What is loaded."""
        return self._info

    @property
    def model(self) -> TransnormerForCausalLM:
        """The eager model."""
        return self._model

    def initial_state(self, batch: int) -> State:
        """Return the all-zero state of `batch` sequences."""
        check_batch(batch)
        return StateHandle(self, self._model.initial_state(batch))

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, lengths: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed input_ids [B, T]; see `Runtime.prefill`."""
        check_prefill(self._info.config.vocab_size, input_ids, lengths, positions)
        handle = check_handle(self, state, input_ids.shape[0])
        device = self._model.lm_head.weight.device
        logits, present = self._model(
            input_ids.to(device), lengths.to(device), positions.to(device), handle.tensors, self._logits
        )
        return logits, StateHandle(self, present)

    @torch.inference_mode()
    def decode(self, input_ids: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed input_ids [B, 1] and consume `state`; see `Runtime.decode`."""
        check_decode(self._info.config.vocab_size, input_ids, positions)
        handle = check_handle(self, state, input_ids.shape[0])
        device = self._model.lm_head.weight.device
        logits, present = self._model.decode(input_ids.to(device), positions.to(device), handle.tensors)
        handle.consumed = True
        return logits, StateHandle(self, present)

    def host_state(self, state: State) -> list[Tensor]:
        """Copy a state to the host: one [B, H, K, V] per layer."""
        return [tensor.detach().to("cpu", copy=True) for tensor in check_handle(self, state, None).tensors]

    def device_state(self, tensors: list[Tensor]) -> State:
        """Copy host tensors into a new state."""
        check_state_tensors(self._info.config, tensors, self._model.state_dtype)
        device = self._model.lm_head.weight.device
        return StateHandle(self, [tensor.detach().to(device, copy=True) for tensor in tensors])


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
