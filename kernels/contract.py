"""The two ops' contract: names, argument order, shapes and dtypes. Written here once and read by everybody else.

    lightning_attention(query [B, T, H, K], key [B, T, H, K], value [B, T, H, V], slope_rate [H] f32,
                        past_state [B, H, K, V] f32, lengths [B] i32) -> output [B, T, H, V], present_state f32
    lightning_attention_step(query [B, H, K], key [B, H, K], value [B, H, V], slope_rate [H] f32,
                             past_state [B, H, K, V] f32) -> output [B, H, V], present_state f32

Both compute S_t = exp(-slope_rate) S_{t-1} + k_t v_tᵀ and o_t = q_tᵀ S_t, with no scale and no denominator. Tokens
at t >= lengths[b] change no state and give 0. Activations are float32, float16 or bfloat16 (all float64 in
references); the state and every accumulation are float32 (float64).
"""

from collections.abc import Sequence
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


_ACCUMULATORS = {activation: accumulator_dtype(activation) for activation in ACTIVATION_DTYPES}


# Every call of an op makes these checks, so they are written out: a loop or a call for each tensor takes twice as long.
def check_chunk_inputs(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor, lengths: Tensor
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit the chunk op's contract."""
    state_shape = _checked_state_shape(query, key, value, 4, "B, T, H")
    if lengths.shape != state_shape[:1]:
        raise _wrong_shape("lengths", lengths, state_shape[:1])
    if lengths.dtype is not torch.int32:
        raise TypeError(f"lengths is {lengths.dtype}; expected torch.int32")
    if lengths.device != query.device:
        raise _wrong_device("lengths", lengths, query.device)
    _check_state_and_dtypes(query, key, value, slope_rate, past_state, state_shape)


def check_step_inputs(query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit the decode step's contract."""
    state_shape = _checked_state_shape(query, key, value, 3, "B, H")
    _check_state_and_dtypes(query, key, value, slope_rate, past_state, state_shape)


def _checked_state_shape(query: Tensor, key: Tensor, value: Tensor, rank: int, rows: str) -> tuple[int, int, int, int]:
    """Return the shape of the state that activations of so many dimensions ask for, [B, H, K, V]."""
    shape, values = query.shape, value.shape
    if len(shape) != rank:
        raise _wrong_rank("query", query, f"{rank} dimensions [{rows}, K]")
    if len(values) != rank:
        raise _wrong_rank("value", value, f"{rank} dimensions [{rows}, V]")
    if key.shape != shape:
        raise _wrong_shape("key", key, shape)
    if values[:-1] != shape[:-1]:
        raise _wrong_shape("value", value, (*shape[:-1], values[-1]))
    return shape[0], shape[-2], shape[-1], values[-1]


def _check_state_and_dtypes(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor, state_shape: tuple[int, ...]
) -> None:
    if slope_rate.shape != state_shape[1:2]:
        raise _wrong_shape("slope_rate", slope_rate, state_shape[1:2])
    if past_state.shape != state_shape:
        raise _wrong_shape("past_state", past_state, state_shape)
    dtype, device = query.dtype, query.device
    accumulator = _ACCUMULATORS.get(dtype)
    if accumulator is None:
        raise TypeError(f"query is {dtype}; expected float32, float16, bfloat16 or float64")
    if key.dtype is not dtype:
        raise TypeError(f"key is {key.dtype}; expected {dtype} like query")
    if value.dtype is not dtype:
        raise TypeError(f"value is {value.dtype}; expected {dtype} like query")
    if slope_rate.dtype is not accumulator:
        raise TypeError(f"slope_rate is {slope_rate.dtype}; expected {accumulator} beside {dtype} activations")
    if past_state.dtype is not accumulator:
        raise TypeError(f"past_state is {past_state.dtype}; expected {accumulator} beside {dtype} activations")
    if key.device != device:
        raise _wrong_device("key", key, device)
    if value.device != device:
        raise _wrong_device("value", value, device)
    if slope_rate.device != device:
        raise _wrong_device("slope_rate", slope_rate, device)
    if past_state.device != device:
        raise _wrong_device("past_state", past_state, device)


def _wrong_rank(name: str, tensor: Tensor, expected: str) -> ValueError:
    return ValueError(f"{name} has shape {list(tensor.shape)}; expected {expected}")


def _wrong_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> ValueError:
    return ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)}")


def _wrong_device(name: str, tensor: Tensor, device: torch.device) -> ValueError:
    return ValueError(f"{name} is on {tensor.device}; expected {device} like query")
