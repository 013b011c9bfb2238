"""The two ops: what a model calls, and the torch.library ops that tracers see.

A traced program (torch.export, torch.compile, a dispatch mode) holds one node for each op. Plain eager code calls the
forms directly: torch.library's Python wrappers take longer than a short kernel.
"""

from typing import Any, cast

import torch
from torch import Tensor

from tnllm_export.kernels.contract import (
    LIGHTNING_ATTENTION,
    LIGHTNING_ATTENTION_STEP,
    check_chunk_inputs,
    check_step_inputs,
)
from tnllm_export.kernels.lightning_attention.form import (
    compute_chunk,
    compute_chunk_backward,
    compute_slope_gradient,
    compute_step,
    runs_triton,
    triton_step,
)
from tnllm_export.kernels.lightning_attention.handover_memory import nothing_kept
from tnllm_export.kernels.tracing import needs_gradient, runs_transformed, runs_untraced


def lightning_attention(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Lightning attention over many tokens: S_t = exp(-s) S_{t-1} + k_t v_tᵀ; o_t = q_tᵀ S_t.

    No scale, no denominator. Differentiable, once and in reverse mode, in everything but lengths. Triton kernels on
    CUDA and PyTorch elsewhere, as `use_kernels` says; PyTorch also for float64 and, with a warning, for sizes that the
    kernels do not take. Under torch.autocast query, key and value are cast to its dtype, and nothing else. Source:
    arXiv 2401.04658, with the released TransNormerLLM's per-head decay.

    Args:
        query: [B, T, H, K] float32, float16, bfloat16 or float64.
        key: [B, T, H, K], same dtype.
        value: [B, T, H, V], same dtype.
        slope_rate: [H] float32 (float64 beside float64), s >= 0.
        past_state: [B, H, K, V] float32 (float64 beside float64).
        lengths: [B] int32; tokens at t >= lengths[b] change no state and give 0.

    Returns:
        output [B, T, H, V] in the activations' dtype, and present_state [B, H, K, V] float32 (float64).

    Raises:
        ValueError: A shape or a device does not fit.
        TypeError: A dtype does not fit.
        NotImplementedError: A tensor has a tangent (forward mode).
    """
    query, key, value = _autocast(query, key, value)
    if not runs_untraced(query, key, value, slope_rate, past_state, lengths):
        called: Any = _TransformedLightningAttention.apply if runs_transformed() else _chunk_op
        return called(query, key, value, slope_rate, past_state, lengths)  # type: ignore[no-any-return]
    check_chunk_inputs(query, key, value, slope_rate, past_state, lengths)
    if needs_gradient(query, key, value, slope_rate, past_state):
        results: tuple[Tensor, Tensor] = _LightningAttention.apply(  # type: ignore[no-untyped-call]
            query, key, value, slope_rate, past_state, lengths
        )
        return results
    return compute_chunk(query, key, value, slope_rate, past_state, lengths)


def lightning_attention_step(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute one decoded token by the robust recurrence: S = exp(-s) S + k vᵀ; o = qᵀ S.

    For inference: it has no backward, and says so when one is asked for; train with `lightning_attention`. Forms,
    autocast and sizes are as there. Source: arXiv 2307.14995, robust inference.

    Args:
        query: [B, H, K] float32, float16, bfloat16 or float64.
        key: [B, H, K], same dtype.
        value: [B, H, V], same dtype.
        slope_rate: [H] float32 (float64 beside float64), s >= 0.
        past_state: [B, H, K, V] float32 (float64 beside float64).

    Returns:
        output [B, H, V] in the activations' dtype, and present_state [B, H, K, V] float32 (float64).

    Raises:
        ValueError: A shape or a device does not fit.
        TypeError: A dtype does not fit.
    """
    query, key, value = _autocast(query, key, value)
    untraced = runs_untraced(query, key, value, slope_rate, past_state)
    # The op raises an error when a gradient is asked of it.
    if not untraced or needs_gradient(query, key, value, slope_rate, past_state):
        return _step_op(query, key, value, slope_rate, past_state)  # type: ignore[no-any-return]
    check_step_inputs(query, key, value, slope_rate, past_state)
    return compute_step(query, key, value, slope_rate, past_state)


def lightning_attention_step_in_place(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, state: Tensor
) -> Tensor:
    """Compute `lightning_attention_step` and write the new state where the old one was; return output [B, H, V].

    For runtimes that own the state, and for CUDA graphs, which are bound to its address. It is not traced, and autograd
    does not know of it, whatever requires a gradient.

    Args:
        query, key, value, slope_rate: As for `lightning_attention_step`.
        state: [B, H, K, V] float32 (float64), contiguous; read and written.

    Raises:
        ValueError: A shape or a device does not fit, or the state is not contiguous.
        TypeError: A dtype does not fit.
    """
    query, key, value = _autocast(query, key, value)
    check_step_inputs(query, key, value, slope_rate, state)
    if not state.is_contiguous():
        raise ValueError(f"state has strides {state.stride()}; expected a contiguous one, to be written in place")
    if runs_triton(query, value):
        output = torch.empty_like(value, memory_format=torch.contiguous_format)
        triton_step().step(query, key, value, slope_rate, state, output, state)
        # Whoever has kept the state for a backward of their own is told.
        torch.autograd.graph.increment_version(state)
        return output
    with torch.no_grad():
        output, present_state = compute_step(query, key, value, slope_rate, state)
        state.copy_(present_state)
    return output


@torch.library.custom_op(LIGHTNING_ATTENTION.qualified_name, mutates_args=())
def _chunk_op(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    check_chunk_inputs(query, key, value, slope_rate, past_state, lengths)
    with nothing_kept():
        return compute_chunk(query, key, value, slope_rate, past_state, lengths)


@_chunk_op.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    check_chunk_inputs(query, key, value, slope_rate, past_state, lengths)
    return _like(value), _like(past_state)


@torch.library.custom_op(LIGHTNING_ATTENTION.qualified_name + "_backward", mutates_args=())
def _chunk_backward_op(
    grad_output: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slope_rate: Tensor,
    past_state: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (grad_output, grad_state, query, key, value, slope_rate, past_state, lengths)
    with nothing_kept():
        return cast(tuple[Tensor, Tensor, Tensor, Tensor], compute_chunk_backward(*arguments))


@_chunk_backward_op.register_fake
def _(
    grad_output: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slope_rate: Tensor,
    past_state: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(query), _like(key), _like(value), _like(past_state)


# Apart from the other gradients: slope_rate is a buffer in the released models, and its gradient has no kernel.
@torch.library.custom_op(LIGHTNING_ATTENTION.qualified_name + "_slope_gradient", mutates_args=())
def _slope_gradient_op(
    grad_output: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slope_rate: Tensor,
    past_state: Tensor,
    lengths: Tensor,
) -> Tensor:
    return compute_slope_gradient(grad_output, grad_state, query, key, value, slope_rate, past_state, lengths)


@_slope_gradient_op.register_fake
def _(
    grad_output: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slope_rate: Tensor,
    past_state: Tensor,
    lengths: Tensor,
) -> Tensor:
    return _like(slope_rate)


@torch.library.custom_op(LIGHTNING_ATTENTION_STEP.qualified_name, mutates_args=())
def _step_op(
    query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor
) -> tuple[Tensor, Tensor]:
    check_step_inputs(query, key, value, slope_rate, past_state)
    return compute_step(query, key, value, slope_rate, past_state)


@_step_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past_state: Tensor) -> tuple[Tensor, Tensor]:
    check_step_inputs(query, key, value, slope_rate, past_state)
    return _like(value), _like(past_state)


def _no_gradient_of_gradients(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("lightning_attention can be differentiated once: its gradients have no derivative")


def _no_gradient_of_a_step(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("lightning_attention_step has no backward: it is for inference; train with lightning_attention")


_chunk_backward_op.register_autograd(_no_gradient_of_gradients)
_slope_gradient_op.register_autograd(_no_gradient_of_gradients)
_step_op.register_autograd(_no_gradient_of_a_step)


def _map(op: Any) -> None:
    """Let torch.func.vmap call `op` once for each of what it maps over: lengths, decays and states differ."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Any, Any]:
        results = [
            op(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    op.register_vmap(rule)


for _op in (_chunk_op, _chunk_backward_op, _slope_gradient_op, _step_op):
    _map(_op)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)  # the state's gradient is mostly absent, and large


def _backward(ctx: Any, grad_output: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    _, _, value, _, past_state, _ = inputs
    _, _, _, slope_too, state_too, _ = ctx.needs_input_grad
    given = [grad for grad in (grad_output, grad_state) if grad is not None]
    # Where gradients are to be differentiated (create_graph=True), the op answers: it knows that they can't.
    untraced = runs_untraced(*inputs, *given) and not torch.is_grad_enabled()
    grad_output = _absent(value, untraced) if grad_output is None else grad_output
    grad_state = _absent(past_state, untraced) if grad_state is None else grad_state
    arguments = (grad_output, grad_state, *inputs)
    if untraced:
        dq, dk, dv, d_state = compute_chunk_backward(*arguments, state_too=state_too)
    else:
        dq, dk, dv, d_state = _op_in_backward(_chunk_backward_op, *arguments)
    d_slope = None
    if slope_too:
        d_slope = compute_slope_gradient(*arguments) if untraced else _op_in_backward(_slope_gradient_op, *arguments)
    return dq, dk, dv, d_slope, d_state, None


def _op_in_backward(op: Any, *arguments: Tensor) -> Any:
    if runs_transformed():
        return _TransformedGradient.apply(op, *arguments)  # type: ignore[no-untyped-call]
    return op(*arguments)


_zeros: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _absent(x: Tensor, untraced: bool) -> Tensor:
    """Return zeros in x's shape for a gradient that is not there.

    They are one number in memory. Untraced code keeps it: filling it takes as long as a short kernel.
    """
    zero = _zeros.get((x.device, x.dtype)) if untraced else None
    if zero is None:
        if not untraced or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            zero = x.new_zeros(())  # a graph's own
        else:
            # By way of the host, so that it is there for every stream.
            zero = _zeros[x.device, x.dtype] = torch.zeros((), dtype=x.dtype).to(x.device)
    return zero.expand(x.shape)


_chunk_op.register_autograd(_backward, setup_context=_save_for_backward)


class _LightningAttention(torch.autograd.Function):
    """The chunk op with its gradients, for eager code."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        output, present_state = compute_chunk(*inputs)
        _save_for_backward(ctx, inputs, (output, present_state))
        return output, present_state

    backward = staticmethod(_backward)


# The same for torch.func's transforms, which want the context apart: those take longer to call.


class _TransformedLightningAttention(torch.autograd.Function):
    """The chunk op with its gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return _chunk_op(*inputs)  # type: ignore[no-any-return]

    setup_context = staticmethod(_save_for_backward)
    backward = staticmethod(_backward)


class _TransformedGradient(torch.autograd.Function):
    """One of the ops that make gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: Any, *inputs: Tensor) -> Any:
        return op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    backward = staticmethod(_no_gradient_of_gradients)


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast activations, as autocast casts those of `scaled_dot_product_attention`; it leaves float64 alone, too."""
    # Asked first: it takes a quarter of the time, and mostly there is none.
    if not torch._C._is_any_autocast_enabled():
        return query, key, value
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
    return query, key, value


def _like(x: Tensor) -> Tensor:
    """Results are contiguous, whatever the strides of the inputs."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
