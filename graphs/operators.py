"""ATen operators in ONNX: one function for each operator that a traced TransNormerLLM consists of.

A function takes the builder, what the operator returned when it was traced (shape and dtype) and the operator's
arguments. Those that no model here uses are not in its signature, so that a program with them is refused.
"""

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype

from tnllm_export.graphs.builder import Builder
from tnllm_export.graphs.traced import TracedTensor
from tnllm_export.kernels.contract import LIGHTNING_ATTENTION, LIGHTNING_ATTENTION_STEP, NAMESPACE, OpContract

Number = int | float
Translation = Callable[..., ir.Value | Sequence[ir.Value]]


def _unary(op_type: str) -> Translation:
    """Return the translation of an operator of one tensor that ONNX has too."""

    def translation(op: Builder, result: TracedTensor, x: ir.Value) -> ir.Value:
        return op(op_type, x)

    return translation


def _arithmetic(op_type: str) -> Translation:
    """Return the translation of an operator of two tensors or numbers; both are cast to the result's dtype."""

    def translation(op: Builder, result: TracedTensor, x: ir.Value | Number, y: ir.Value | Number) -> ir.Value:
        dtype = from_torch_dtype(result.dtype)
        return op(op_type, *(op.cast(z, dtype) if isinstance(z, ir.Value) else op.scalar(z, dtype) for z in (x, y)))

    return translation


def _arange(op: Builder, result: TracedTensor, end: ir.Value | int) -> ir.Value:
    if isinstance(end, int):
        return op.ints(*range(end))
    return op("Range", op.scalar(0, ir.DataType.INT64), end, op.scalar(1, ir.DataType.INT64))


def _cat(op: Builder, result: TracedTensor, tensors: Sequence[ir.Value], dim: int) -> ir.Value:
    return op("Concat", *tensors, axis=dim)


def _chunk(op: Builder, result: Sequence[TracedTensor], x: ir.Value, chunks: int, dim: int) -> Sequence[ir.Value]:
    return op.many(len(result), "Split", [x], {"axis": dim, "num_outputs": chunks})


def _clamp(op: Builder, result: TracedTensor, x: ir.Value, minimum: Number) -> ir.Value:
    return op("Clip", x, op.scalar(minimum, from_torch_dtype(result.dtype)))


def _elu(op: Builder, result: TracedTensor, x: ir.Value, alpha: float = 1.0) -> ir.Value:
    return op("Elu", x, alpha=alpha)


def _embedding(op: Builder, result: TracedTensor, weight: ir.Value, indices: ir.Value) -> ir.Value:
    return op("Gather", weight, indices, axis=0)


def _expand(op: Builder, result: TracedTensor, x: ir.Value, size: Sequence[int]) -> ir.Value:
    # ATen keeps a dimension at -1; ONNX broadcasts, so that 1 keeps it.
    return op("Expand", x, op.ints(*(1 if dim == -1 else dim for dim in size)))


def _gather(op: Builder, result: TracedTensor, x: ir.Value, dim: int, index: ir.Value) -> ir.Value:
    return op("GatherElements", x, index, axis=dim)


def _linear(op: Builder, result: TracedTensor, x: ir.Value, weight: ir.Value) -> ir.Value:
    """Multiply by weightᵀ as a Gemm over the flattened tokens, with the weight as it is stored, [out, in].

    A Transpose of a weight would be folded by most runtimes, and the folded copy lives beside the original: twice the
    memory for the tied embedding, and no sharing of weights between the prefill and the decode graph.
    """
    if len(result.shape) == 2:
        return op("Gemm", x, weight, transB=1)
    assert weight.shape is not None
    flat = op("Reshape", x, op.ints(-1, weight.shape.numpy()[1]))
    product = op("Gemm", flat, weight, transB=1)
    flat.type = product.type = x.type
    return op.reshape(product, result.shape)


def _mean(op: Builder, result: TracedTensor, x: ir.Value, dim: Sequence[int], keepdim: bool = False) -> ir.Value:
    return op("ReduceMean", x, op.ints(*dim), keepdims=int(keepdim))


def _own(contract: OpContract) -> Translation:
    """Return the translation of one of our two ops: one node of the domain `tnllm`, for a lowering to replace."""

    def translation(op: Builder, result: Sequence[TracedTensor], *inputs: ir.Value) -> Sequence[ir.Value]:
        return op.many(len(contract.outputs), contract.onnx_name, inputs, domain=NAMESPACE)

    return translation


def _reshape(op: Builder, result: TracedTensor, x: ir.Value, *how: object) -> ir.Value:
    return op.reshape(x, result.shape)


def _rsqrt(op: Builder, result: TracedTensor, x: ir.Value) -> ir.Value:
    return op("Reciprocal", op("Sqrt", x))


def _silu(op: Builder, result: TracedTensor, x: ir.Value) -> ir.Value:
    """Compute in float32 and round once, as PyTorch does.

    Sigmoid in a half dtype is worse than one more rounding: ONNX Runtime's CUDA kernel rounds each of its steps, and
    1 - 1 / (1 + exp(x)), which it takes for x < 0, keeps few of bfloat16's 8 bits.
    """
    wide = op.cast(x, ir.DataType.FLOAT)
    product = op("Mul", wide, op("Sigmoid", wide))
    product.dtype = ir.DataType.FLOAT
    return op.cast(product, from_torch_dtype(result.dtype))


def _size(op: Builder, result: TracedTensor, x: ir.Value, dim: int) -> ir.Value:
    return op("Squeeze", op("Shape", x, start=dim, end=dim + 1))


def _square(op: Builder, result: TracedTensor, x: ir.Value) -> ir.Value:
    return op("Mul", x, x)


def _squeeze(op: Builder, result: TracedTensor, x: ir.Value, dim: int) -> ir.Value:
    return op("Squeeze", x, op.ints(dim))


def _to(op: Builder, result: TracedTensor, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    return op.cast(x, from_torch_dtype(dtype))


def _unsqueeze(op: Builder, result: TracedTensor, x: ir.Value, dim: int) -> ir.Value:
    return op("Unsqueeze", x, op.ints(dim))


OPERATORS: Mapping[str, Translation] = {
    "aten.add.Tensor": _arithmetic("Add"),
    "aten.arange.default": _arange,
    "aten.cat.default": _cat,
    "aten.chunk.default": _chunk,
    "aten.clamp.default": _clamp,
    "aten.cos.default": _unary("Cos"),
    "aten.elu.default": _elu,
    "aten.embedding.default": _embedding,
    "aten.expand.default": _expand,
    "aten.flatten.using_ints": _reshape,
    "aten.gather.default": _gather,
    "aten.linear.default": _linear,
    "aten.mean.dim": _mean,
    "aten.mul.Tensor": _arithmetic("Mul"),
    "aten.rsqrt.default": _rsqrt,
    "aten.silu.default": _silu,
    "aten.sin.default": _unary("Sin"),
    "aten.square.default": _square,
    "aten.squeeze.dim": _squeeze,
    "aten.sub.Tensor": _arithmetic("Sub"),
    "aten.sym_size.int": _size,
    "aten.to.dtype": _to,
    "aten.unflatten.int": _reshape,
    "aten.unsqueeze.default": _unsqueeze,
    f"{NAMESPACE}.{LIGHTNING_ATTENTION.torch_name}.default": _own(LIGHTNING_ATTENTION),
    f"{NAMESPACE}.{LIGHTNING_ATTENTION_STEP.torch_name}.default": _own(LIGHTNING_ATTENTION_STEP),
}
"""The translation of each operator, by the name that it has in a program."""
