"""The two ops' contract: names, argument order, shapes and dtypes. Written here once and read by everybody else.

    lightning_attention(query [B, T, H, K], key [B, T, H, K], value [B, T, H, V], slope_rate [H] f32,
                        past_state [B, H, K, V] f32, lengths [B] i32) -> output [B, T, H, V], present_state f32
    lightning_attention_step(query [B, H, K], key [B, H, K], value [B, H, V], slope_rate [H] f32,
                             past_state [B, H, K, V] f32) -> output [B, H, V], present_state f32

Both compute S_t = exp(-slope_rate) S_{t-1} + k_t v_tᵀ and o_t = q_tᵀ S_t, with no scale and no denominator. Tokens
at t >= lengths[b] change no state and give 0. Activations are float32, float16 or bfloat16 (all float64 in
references); the state and every accumulation are float32 (float64).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NAMESPACE = "tnllm"
"""torch.library namespace, ONNX domain and plugin namespace."""

OPSET_VERSION = 1
"""Version of the ONNX domain `tnllm`."""

CHUNK_SIZE = 64
"""Tokens that the blocked forms work on at once."""

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class OpContract:
    """Names of one op and of its arguments, in order."""

    torch_name: str
    onnx_name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def qualified_name(self) -> str:
        """The name under which torch registers the op, e.g. `tnllm::lightning_attention`."""
        return f"{NAMESPACE}::{self.torch_name}"


LIGHTNING_ATTENTION = OpContract(
    torch_name="lightning_attention",
    onnx_name="LightningAttention",
    inputs=("query", "key", "value", "slope_rate", "past_state", "lengths"),
    outputs=("output", "present_state"),
)
LIGHTNING_ATTENTION_STEP = OpContract(
    torch_name="lightning_attention_step",
    onnx_name="LightningAttentionStep",
    inputs=("query", "key", "value", "slope_rate", "past_state"),
    outputs=("output", "present_state"),
)


def accumulator_dtype(activation: torch.dtype) -> torch.dtype:
    """Return the dtype of state and accumulation: float64 for float64 activations, else float32."""
    return torch.float64 if activation == torch.float64 else torch.float32


def check_chunk_inputs(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor, lengths: Tensor
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit the chunk op's contract."""
    _check_rank("query", query, 4, "[B, T, H, K]")
    B, T, H, K = query.shape
    _check_rank("value", value, 4, "[B, T, H, V]")
    V = value.shape[3]
    _check_shape("key", key, (B, T, H, K))
    _check_shape("value", value, (B, T, H, V))
    _check_shape("lengths", lengths, (B,))
    if lengths.dtype != torch.int32:
        raise TypeError(f"lengths is {lengths.dtype}; expected torch.int32")
    _check_device("lengths", lengths, query.device)
    _check_state_and_dtypes(query, key, value, slope_rate, past_state, (B, H, K, V))


def check_step_inputs(query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit the decode step's contract."""
    _check_rank("query", query, 3, "[B, H, K]")
    B, H, K = query.shape
    _check_rank("value", value, 3, "[B, H, V]")
    V = value.shape[2]
    _check_shape("key", key, (B, H, K))
    _check_shape("value", value, (B, H, V))
    _check_state_and_dtypes(query, key, value, slope_rate, past_state, (B, H, K, V))


def _check_rank(name: str, tensor: Tensor, rank: int, layout: str) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {rank} dimensions {layout}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)}")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; expected {device} like query")


def _check_state_and_dtypes(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor, state_shape: tuple[int, ...]
) -> None:
    _check_shape("slope_rate", slope_rate, (state_shape[1],))
    _check_shape("past_state", past_state, state_shape)
    if query.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"query is {query.dtype}; expected float32, float16, bfloat16 or float64")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} is {tensor.dtype}; expected {query.dtype} like query")
    accumulator = accumulator_dtype(query.dtype)
    for name, tensor in (("slope_rate", slope_rate), ("past_state", past_state)):
        if tensor.dtype != accumulator:
            raise TypeError(f"{name} is {tensor.dtype}; expected {accumulator} beside {query.dtype} activations")
    device = query.device
    for name, tensor in (("key", key), ("value", value), ("slope_rate", slope_rate), ("past_state", past_state)):
        _check_device(name, tensor, device)
