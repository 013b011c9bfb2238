"""Lowering `matmul`: batched matrix products over chunks with constant decay masks, no Loop and no Scan.

The two functions below are also the bodies of the `plugin` lowering's nodes, so both always mean the same.

Chunk states are a decayed prefix sum over M = N + 2 items: the past state, the N chunks' updates, and a zero. Summed by
one [M, M] mask it would need memory quadratic in T; summed one after the other, a Loop. So the items are folded into
about sqrt(M) groups of about sqrt(M): one mask sums inside the groups, one over the groups, and both masks together
have about 2 M entries. Everything is float32 inside, whatever the activations' dtype.
"""

# Function bodies are ONNX in Python syntax: names of values, no annotations that a type checker could use.
# mypy: ignore-errors

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass
from onnxscript import opset20 as op
from onnxscript import script
from onnxscript.values import Opset

from tnllm_export.graphs.lowerings.functions import add_functions
from tnllm_export.kernels.contract import CHUNK_SIZE, NAMESPACE, OPSET_VERSION
from tnllm_export.kernels.lightning_attention.step import DITHER, DITHER_FREQUENCY, SLOW_RATE

_C = CHUNK_SIZE
_ROW = np.arange(_C)
_DISTANCE = onnx.numpy_helper.from_array(np.maximum(_ROW[:, None] - _ROW, 0).astype(np.float32))
_CAUSAL = onnx.numpy_helper.from_array((_ROW[:, None] >= _ROW).astype(np.float32))
_ROWS = onnx.numpy_helper.from_array(_ROW.astype(np.int64))
_ROWS_FROM_ONE = onnx.numpy_helper.from_array((_ROW + 1).astype(np.float32)[:, None])
_TNLLM = Opset(NAMESPACE, OPSET_VERSION)


@script(_TNLLM, default_opset=op)
def LightningAttention(query, key, value, slope_rate, past_state, lengths):  # noqa: N802, PLR0915
    """lightning_attention as matrix products; see `kernels.contract`."""
    # Shapes: T, N chunks, [1] int64 each.
    zero, one, chunk = op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[_C])
    infer = op.Constant(value_ints=[-1])
    zero_scalar, one_scalar = op.Constant(value_int=0), op.Constant(value_int=1)
    tokens = op.Shape(query, start=1, end=2)
    chunks = op.Div(op.Add(tokens, op.Constant(value_ints=[_C - 1])), chunk)
    key_dim = op.Shape(query, start=3, end=4)
    value_dim = op.Shape(value, start=3, end=4)
    rate = op.Reshape(slope_rate, op.Constant(value_ints=[-1, 1, 1, 1]))  # [H, 1, 1, 1]

    # Padding changes nothing: its keys and values are 0.  [B, T, 1, 1]
    counts = op.Min(op.Cast(lengths, to=7), tokens)
    index = op.Range(zero_scalar, op.Squeeze(tokens), one_scalar)
    valid = op.Less(op.Unsqueeze(index, [0, 2, 3]), op.Unsqueeze(counts, [1, 2, 3]))
    nothing = op.Constant(value_float=0.0)
    k_valid = op.Where(valid, op.Cast(key, to=1), nothing)
    v_valid = op.Where(valid, op.Cast(value, to=1), nothing)

    # [B, T, H, D] -> [B, H, N, C, D]
    padding = op.Concat(zero, op.Sub(op.Mul(chunks, chunk), tokens), axis=0)
    two = op.Constant(value_ints=[2])
    q_padded = op.Pad(op.Transpose(op.Cast(query, to=1), perm=[0, 2, 1, 3]), padding, nothing, two)
    k_padded = op.Pad(op.Transpose(k_valid, perm=[0, 2, 1, 3]), padding, nothing, two)
    v_padded = op.Pad(op.Transpose(v_valid, perm=[0, 2, 1, 3]), padding, nothing, two)
    copy = op.Constant(value_ints=[0, 0, -1, _C])
    q = op.Reshape(q_padded, op.Concat(copy, key_dim, axis=0))
    k = op.Reshape(k_padded, op.Concat(copy, key_dim, axis=0))
    v = op.Reshape(v_padded, op.Concat(copy, value_dim, axis=0))

    # Inside a chunk: (Q Kᵀ ⊙ M) V, M [H, 1, C, C]
    mask = op.Mul(op.Exp(op.Neg(op.Mul(rate, op.Constant(value=_DISTANCE)))), op.Constant(value=_CAUSAL))
    scores = op.Mul(op.MatMul(q, op.Transpose(k, perm=[0, 1, 2, 4, 3])), mask)
    inside = op.MatMul(scores, v)

    # What each chunk adds to the state: (lambda^(c-1-j) K)ᵀ V, c valid tokens.  [B, H, N, K V]
    starts = op.Mul(op.Range(zero_scalar, op.Squeeze(chunks), one_scalar), chunk)
    in_chunk = op.Min(op.Max(op.Sub(op.Unsqueeze(counts, [1]), op.Unsqueeze(starts, [0])), zero), chunk)
    left = op.Max(op.Sub(op.Sub(op.Unsqueeze(in_chunk, [2]), one), op.Constant(value=_ROWS)), zero)
    rate_3d = op.Reshape(slope_rate, op.Constant(value_ints=[-1, 1, 1]))
    key_decay = op.Exp(op.Neg(op.Mul(rate_3d, op.Unsqueeze(op.Cast(left, to=1), [1]))))
    decayed = op.Mul(k, op.Unsqueeze(key_decay, [4]))
    flat = op.Concat(op.Constant(value_ints=[0, 0, -1]), op.Mul(key_dim, value_dim), axis=0)
    updates = op.Reshape(op.MatMul(op.Transpose(decayed, perm=[0, 1, 2, 4, 3]), v), flat)

    # Items of the prefix sum, padded with zeros to A groups of G.  [B, H, A, G, K V]
    items = op.Add(chunks, two)
    group = op.Cast(op.Ceil(op.Sqrt(op.Cast(items, to=1))), to=7)
    groups = op.Div(op.Sub(op.Add(items, group), one), group)
    start = op.Reshape(past_state, flat)
    tail = op.Concat(zero, op.Sub(op.Mul(groups, group), op.Add(chunks, one)), axis=0)
    summands = op.Pad(op.Concat(start, updates, axis=2), tail, nothing, two)
    copy_two = op.Constant(value_ints=[0, 0])
    grouped = op.Reshape(summands, op.Concat(copy_two, groups, group, infer, axis=0))

    # Sums inside groups, then of whole groups before each group.
    chunk_rate = op.Mul(rate, op.Constant(value_float=float(_C)))  # decay of a whole chunk, [H, 1, 1, 1]
    g = op.Cast(op.Range(zero_scalar, op.Squeeze(group), one_scalar), to=1)
    g_apart = op.Sub(op.Unsqueeze(g, [1]), op.Unsqueeze(g, [0]))
    g_decay = op.Exp(op.Neg(op.Mul(chunk_rate, op.Max(g_apart, nothing))))
    g_mask = op.Where(op.Less(g_apart, nothing), nothing, g_decay)
    local = op.MatMul(g_mask, grouped)
    totals = op.Squeeze(op.Slice(local, infer, op.Constant(value_ints=[9223372036854775807]), [3]), [3])
    group_rate = op.Mul(op.Squeeze(chunk_rate, [3]), op.Cast(group, to=1))  # [H, 1, 1]
    a = op.Cast(op.Range(zero_scalar, op.Squeeze(groups), one_scalar), to=1)
    a_apart = op.Sub(op.Sub(op.Unsqueeze(a, [1]), op.Unsqueeze(a, [0])), op.Constant(value_float=1.0))
    a_decay = op.Exp(op.Neg(op.Mul(group_rate, op.Max(a_apart, nothing))))
    a_mask = op.Where(op.Less(a_apart, nothing), nothing, a_decay)
    before = op.Unsqueeze(op.MatMul(a_mask, totals), [3])
    from_before = op.Exp(op.Neg(op.Mul(chunk_rate, op.Unsqueeze(op.Add(g, op.Constant(value_float=1.0)), [1]))))
    sums = op.Reshape(op.Add(local, op.Mul(from_before, before)), flat)  # state before each chunk, [B, H, A G, K V]

    # Output: inside + lambda^(i+1) Q S
    state_shape = op.Concat(op.Constant(value_ints=[0, 0, -1]), key_dim, value_dim, axis=0)
    states = op.Reshape(op.Slice(sums, zero, chunks, two), state_shape)
    query_decay = op.Exp(op.Neg(op.Mul(rate, op.Constant(value=_ROWS_FROM_ONE))))
    blocks = op.Add(inside, op.MatMul(op.Mul(q, query_decay), states))
    by_head = op.Reshape(blocks, op.Concat(op.Constant(value_ints=[0, 0, -1]), value_dim, axis=0))
    by_token = op.Transpose(op.Slice(by_head, zero, tokens, two), perm=[0, 2, 1, 3])
    output = op.CastLike(op.Where(valid, by_token, nothing), query)

    # State after the last valid token: f whole chunks, then what is left of one.  [B, H, 1, K V]
    whole = op.Div(counts, chunk)
    rest = op.Cast(op.Sub(counts, op.Mul(whole, chunk)), to=1)
    per_head = op.Concat(op.Shape(past_state, start=0, end=2), one, one, axis=0)
    last = op.Expand(op.Unsqueeze(whole, [1, 2, 3]), per_head)
    rest_decay = op.Exp(op.Neg(op.Mul(rate_3d, op.Unsqueeze(rest, [1, 2, 3]))))
    final = op.Add(
        op.Mul(rest_decay, op.GatherND(sums, last, batch_dims=2)),
        op.GatherND(summands, op.Add(last, one), batch_dims=2),
    )
    present_state = op.Reshape(final, op.Concat(copy_two, key_dim, value_dim, axis=0))
    return output, present_state


@script(_TNLLM, default_opset=op)
def LightningAttentionStep(query, key, value, slope_rate, past_state):  # noqa: N802
    """lightning_attention_step: S = exp(-s) S + k vᵀ; o = qᵀ S."""
    # Slow heads add expm1(-s) S to S, so that exp(-s) is not rounded to 1: see kernels.lightning_attention.step. ONNX
    # has no Expm1, but a Tanh: expm1(x) = 2 tanh(x/2) / (1 - tanh(x/2)).
    rate = op.Reshape(slope_rate, op.Constant(value_ints=[-1, 1, 1]))
    half = op.Tanh(op.Mul(rate, op.Constant(value_float=-0.5)))
    one = op.Constant(value_float=1.0)
    expm1 = op.Div(op.Add(half, half), op.Sub(one, half))
    slow = op.Less(rate, op.Constant(value_float=SLOW_RATE))
    change = op.Where(slow, expm1, op.Exp(op.Neg(rate)))
    keep = op.Cast(slow, to=1)
    # The change is dithered below the last place of the state, so that it is not rounded away.  [B, H, 1, V]
    v = op.Unsqueeze(op.Cast(value, to=1), [2])
    turns = op.Add(op.Mul(v, op.Constant(value_float=DITHER_FREQUENCY)), op.Constant(value_float=0.5))
    fraction = op.Sub(turns, op.Floor(turns))
    spread = op.Mul(keep, op.Constant(value_float=2 * DITHER))
    dithered = op.Add(change, op.Mul(spread, op.Sub(fraction, op.Constant(value_float=0.5))))
    # [B, H, K, 1] * [B, H, 1, V] -> [B, H, K, V]
    update = op.Mul(op.Unsqueeze(op.Cast(key, to=1), [3]), v)
    present_state = op.Add(op.Mul(keep, past_state), op.Add(op.Mul(dithered, past_state), update))
    row = op.MatMul(op.Unsqueeze(op.Cast(query, to=1), [2]), present_state)
    output = op.CastLike(op.Squeeze(row, [2]), query)
    return output, present_state


def lower(model: ir.Model) -> None:
    """Replace the two ops by matrix products, in place."""
    add_functions(model, LightningAttention, LightningAttentionStep)
    InlinePass()(model)
