"""What graphs for ONNX Runtime are given: norms that it fuses, no rounding between two casts, one number of tokens."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from tnllm_export.graphs.builder import Builder
from tnllm_export.graphs.passes.fusible_norm import FusibleNorm
from tnllm_export.graphs.passes.keep_wide import KeepWide
from tnllm_export.graphs.passes.shared_time import SharedTime

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def built(dtype, make):
    """A graph of x [B, T, 4] whose outputs `make` returns, made of a builder and x."""
    x = ir.Value(name="x", shape=ir.Shape(["B", "T", 4]), type=ir.TensorType(dtype))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="g")
    outputs = make(Builder(graph), x)
    for index, output in enumerate(outputs):
        output.name, output.shape = f"y{index}", output.shape or x.shape
    graph.outputs.extend(outputs)
    for index, node in enumerate(graph):
        node.name = f"node.{index}"
    return ir.Model(graph, ir_version=10)


def ops(model):
    return [node.op_type for node in model.graph]


def answers(model, x):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return ReferenceEvaluator(proto).run(None, {"x": x})


def norm(op, x, dtype):
    wide = op.cast(x, FLOAT)
    wide.shape, wide.dtype = x.shape, FLOAT
    mean = op("ReduceMean", op("Mul", wide, wide), op.ints(-1), keepdims=1)
    rate = op("Reciprocal", op("Sqrt", op("Add", mean, op.scalar(1e-6, FLOAT))))
    normed = op("Mul", wide, rate)
    normed.dtype = FLOAT
    cast = op.cast(normed, dtype)
    cast.dtype = dtype
    result = op("Identity", cast)
    result.dtype = dtype
    return result


def draw(dtype):
    return (3 * np.random.default_rng(5).standard_normal((2, 5, 4))).astype(dtype.numpy())


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_a_norm_gets_a_scale_of_ones_and_no_other_value(dtype):
    model = built(dtype, lambda op, x: [norm(op, x, dtype)])
    before = answers(model, draw(dtype))
    FusibleNorm()(model)
    core = ["Pow", "ReduceMean", "Add", "Sqrt", "Div"]
    casts = [] if dtype == FLOAT else ["Cast"]
    assert ops(model) == [*casts, *core, *casts, "Mul", "Identity"]
    [found] = answers(model, draw(dtype))
    assert found.dtype == dtype.numpy()
    assert np.allclose(found, before[0], rtol=2e-7 if dtype == FLOAT else 1e-3)
    assert np.allclose(np.square(found.astype(np.float64)).mean(-1), 1, rtol=2e-3)


def test_onnxruntime_makes_one_kernel_of_such_a_norm(tmp_path):
    model = built(FLOAT, lambda op, x: [norm(op, x, FLOAT)])
    FusibleNorm()(model)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx")
    assert [node.op_type for node in optimised.graph.node] == ["SimplifiedLayerNormalization"]


def test_a_product_of_other_form_is_no_norm():
    def other(op, x):
        mean = op("ReduceMean", op("Mul", x, x), op.ints(-1), keepdims=1)
        return [op("Mul", op("Neg", x), op("Reciprocal", op("Sqrt", op("Add", mean, op.scalar(1e-6, FLOAT)))))]

    model = built(FLOAT, other)
    before = ops(model)
    assert not FusibleNorm()(model).modified
    assert ops(model) == before


def rounded_and_widened(op, x, *, shown=False, normed=False):
    """Narrow 2 x, reshape, widen, negate; perhaps with the narrow value as a result, or squared as a norm does."""
    double = op("Add", x, x)
    double.dtype = FLOAT
    narrow = op.cast(double, HALF)
    narrow.dtype, narrow.shape = HALF, x.shape
    flat = op("Reshape", narrow, op.ints(0, -1))
    flat.dtype, flat.shape = HALF, ir.Shape(["B", "N"])
    wide = op.cast(flat, FLOAT)
    last = op("Pow", wide, op.scalar(2.0, FLOAT)) if normed else op("Neg", wide)
    last.dtype, last.shape = FLOAT, flat.shape
    return [last, narrow] if shown else [last]


def test_what_was_rounded_only_to_be_widened_stays_wide():
    model = built(FLOAT, rounded_and_widened)
    KeepWide()(model)
    assert ops(model) == ["Add", "Reshape", "Neg"]
    x = draw(FLOAT)
    assert np.array_equal(answers(model, x)[0], -2 * x.reshape(2, -1))


@pytest.mark.parametrize("how", ["shown", "normed"])
def test_what_somebody_else_sees_and_what_is_normed_stays_rounded(how):
    model = built(FLOAT, lambda op, x: rounded_and_widened(op, x, **{how: True}))
    before = ops(model)
    assert not KeepWide()(model).modified
    assert ops(model) == before


def test_sizes_that_the_input_has_are_asked_of_the_input():
    def sizes(op, x):
        moved = op("Transpose", x, perm=[1, 0, 2])
        moved.shape = ir.Shape(["T", "B", 4])
        other = op("Reshape", x, op.ints(-1))
        other.shape = ir.Shape(["N"])
        found = [op("Shape", moved, start=0, end=1), op("Shape", other, start=0, end=1), op("Shape", moved, start=1)]
        for value, count in zip(found, (1, 1, 2), strict=True):
            value.dtype, value.shape = ir.DataType.INT64, ir.Shape([count])
        return found

    model = built(FLOAT, sizes)
    SharedTime()(model)
    asked = [node.inputs[0].name == "x" for node in model.graph if node.op_type == "Shape"]
    assert asked == [True, False, False]
    assert [found.tolist() for found in answers(model, draw(FLOAT))] == [[5], [40], [2, 4]]
