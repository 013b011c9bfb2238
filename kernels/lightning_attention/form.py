"""Which form computes the ops: Triton kernels where they are wanted and take the sizes, PyTorch elsewhere."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tnllm_export.kernels.dispatch import form_for
from tnllm_export.kernels.lightning_attention.blocked import (
    lightning_attention_blocked,
    lightning_attention_blocked_backward,
)
from tnllm_export.kernels.lightning_attention.slope_gradient import slope_gradient_in_pieces
from tnllm_export.kernels.lightning_attention.step import lightning_attention_step_pytorch

MAX_HEAD_DIM = 256
"""The widest query, key and value that the Triton kernels take; all widths are multiples of HEAD_DIM_STEP."""

HEAD_DIM_STEP = 16


def compute_chunk(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the chunk op. Args and results are those of `lightning_attention`."""
    inputs = (query, key, value, slope_rate, past_state, lengths)
    if runs_triton(query, value):
        return triton_chunk().lightning_attention_triton(*inputs)  # type: ignore[no-any-return]
    with _accumulation_dtype_kept(query.device.type):
        return lightning_attention_blocked(*inputs)


def compute_chunk_backward(
    grad_output: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slope_rate: Tensor,
    past_state: Tensor,
    lengths: Tensor,
    *,
    state_too: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of query, key, value and, if `state_too`, of past_state."""
    inputs = (grad_output, grad_state, query, key, value, slope_rate, past_state, lengths)
    if runs_triton(query, value):
        return triton_chunk().lightning_attention_triton_backward(*inputs, state_too=state_too)  # type: ignore[no-any-return]
    with _accumulation_dtype_kept(query.device.type):
        dq, dk, dv, _, d_state = lightning_attention_blocked_backward(*inputs)
    return dq, dk, dv, d_state if state_too else None


def compute_slope_gradient(
    grad_output: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slope_rate: Tensor,
    past_state: Tensor,
    lengths: Tensor,
) -> Tensor:
    """Return the gradient of slope_rate, [H]. It has no kernel."""
    if runs_triton(query, value):
        _warn_of_slope_gradient()
    with _accumulation_dtype_kept(query.device.type):
        return slope_gradient_in_pieces(grad_output, grad_state, query, key, value, slope_rate, past_state, lengths)


def compute_step(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute one token. Args and results are those of `lightning_attention_step`."""
    if runs_triton(query, value):
        return triton_step().lightning_attention_step_triton(  # type: ignore[no-any-return]
            query, key, value, slope_rate, past_state
        )
    with _accumulation_dtype_kept(query.device.type):
        return lightning_attention_step_pytorch(query, key, value, slope_rate, past_state)


def runs_triton(query: Tensor, value: Tensor) -> bool:
    """Whether Triton is wanted for these tensors [..., K] and [..., V] and takes them; warns, once, of their sizes."""
    if query.dtype == torch.float64 or form_for(query.device) != "triton":
        return False
    K, V = query.shape[-1], value.shape[-1]
    if K % HEAD_DIM_STEP or V % HEAD_DIM_STEP or not 0 < K <= MAX_HEAD_DIM or not 0 < V <= MAX_HEAD_DIM:
        _warn_of_size(K, V)
        return False
    return True


@cache
def _warn_of_size(K: int, V: int) -> None:
    warnings.warn(
        f"lightning attention: found heads of {K} keys and {V} values; the Triton kernels take multiples of "
        f"{HEAD_DIM_STEP} up to {MAX_HEAD_DIM}, so PyTorch computes, more slowly",
        stacklevel=5,
    )


@cache
def _warn_of_slope_gradient() -> None:
    warnings.warn(
        "lightning attention: slope_rate requires a gradient, which no Triton kernel computes, so PyTorch does, more "
        "slowly; detach slope_rate if it is not learned",
        stacklevel=4,
    )


@contextmanager
def _accumulation_dtype_kept(device: str) -> Iterator[None]:
    """Keep autocast away from the PyTorch forms' inner products, which are float32 (float64)."""
    if not torch.is_autocast_enabled(device):
        yield
        return
    with torch.autocast(device, enabled=False):
        yield


@cache
def triton_chunk() -> Any:
    """The chunk op in Triton, imported when it is first wanted."""
    return import_module("tnllm_export.kernels.lightning_attention.chunk")


@cache
def triton_step() -> Any:
    """The decode step in Triton, imported when it is first wanted."""
    return import_module("tnllm_export.kernels.lightning_attention.step_kernel")
