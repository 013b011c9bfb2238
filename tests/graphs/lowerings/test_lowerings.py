"""Each lowering of the two ops against the float64 recurrence, run by ONNX Runtime or ONNX's own evaluator."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from tnllm_export.graphs.lowerings import LOWERINGS
from tnllm_export.graphs.passes.set_opset import SetOpset
from tnllm_export.graphs.pipeline import DOMAINS
from tnllm_export.kernels.contract import LIGHTNING_ATTENTION, LIGHTNING_ATTENTION_STEP, NAMESPACE, OPSET_VERSION
from tnllm_export.kernels.lightning_attention.reference import (
    lightning_attention_reference,
    lightning_attention_step_reference,
)

# What float32 sums of these lengths give; float16 rounds the inputs' products' sum once, to 2^-11.
TOLERANCE = {"float32": 3e-6, "float16": 6e-4}
# A LinearAttention op multiplies by exp(-s) in float32 once per token, which is off by up to 3e-8 each time.
PER_TOKEN = {"contrib": 3e-8, "standard": 3e-8, "matmul": 0.0, "plugin": 0.0, "hybrid": 3e-8}
SHAPES = [(1, 1), (2, 63), (1, 64), (3, 65), (2, 257), (2, 700)]
H, K, V = 3, 32, 16


def one_op_model(contract, dtype):
    """A graph of a single op, with static head sizes and symbolic batch and time."""
    tokens = ["B", "T"] if contract is LIGHTNING_ATTENTION else ["B"]
    activation = ir.DataType[{"float32": "FLOAT", "float16": "FLOAT16"}[dtype]]
    shapes = {
        "query": [*tokens, H, K],
        "key": [*tokens, H, K],
        "value": [*tokens, H, V],
        "slope_rate": [H],
        "past_state": ["B", H, K, V],
        "lengths": ["B"],
        "output": [*tokens, H, V],
        "present_state": ["B", H, K, V],
    }
    dtypes = {"lengths": ir.DataType.INT32} | dict.fromkeys(
        ("slope_rate", "past_state", "present_state"), ir.DataType.FLOAT
    )
    values = {
        name: ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtypes.get(name, activation)))
        for name, shape in shapes.items()
    }
    outputs = [values[name] for name in contract.outputs]
    node = ir.Node(
        NAMESPACE, contract.onnx_name, [values[name] for name in contract.inputs], outputs=outputs, name="the_op"
    )
    graph = ir.Graph(
        node.inputs, outputs, nodes=[node], name="one_op", opset_imports={"": 20, NAMESPACE: OPSET_VERSION}
    )
    return ir.Model(graph, ir_version=10)


def lowered(contract, lowering, dtype="float32"):
    model = one_op_model(contract, dtype)
    LOWERINGS[lowering].lower(model)
    SetOpset(LOWERINGS[lowering].opset, DOMAINS)(model)
    onnx.checker.check_model(ir.to_proto(model))
    return model


def run(model, lowering, feeds):
    proto = ir.to_proto(model)
    if lowering == "standard":  # ONNX Runtime does not take opset 27 yet
        return ReferenceEvaluator(proto).run(None, feeds)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, feeds)


def draw(B, T, dtype):
    rng = np.random.default_rng(7)
    lengths = rng.integers(0, T + 1, B).astype(np.int32)
    lengths[0] = T
    return {
        "query": (rng.standard_normal((B, T, H, K)) / K**0.5).astype(dtype),
        "key": (rng.standard_normal((B, T, H, K)) / K**0.5).astype(dtype),
        "value": rng.standard_normal((B, T, H, V)).astype(dtype),
        "slope_rate": np.array([1e-4, 0.03, 2.5], np.float32),
        "past_state": rng.standard_normal((B, H, K, V)).astype(np.float32),
        "lengths": lengths,
    }


def in_float64(feeds, contract):
    tensors = [torch.from_numpy(feeds[name]) for name in contract.inputs]
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]


def relative_error(found, reference):
    assert found.shape == tuple(reference.shape)
    return float(np.linalg.norm(found.astype(np.float64) - reference.numpy()) / reference.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_chunk_op_is_the_recurrence_in_every_lowering(shape, lowering, dtype):
    feeds = draw(*shape, dtype)
    output, state = run(lowered(LIGHTNING_ATTENTION, lowering, dtype), lowering, feeds)
    expected_output, expected_state = lightning_attention_reference(*in_float64(feeds, LIGHTNING_ATTENTION))
    assert output.dtype == dtype
    assert state.dtype == np.float32
    drift = shape[1] * PER_TOKEN[lowering]
    assert relative_error(output, expected_output) < TOLERANCE[dtype] + drift
    assert relative_error(state, expected_state) < TOLERANCE["float32"] + drift


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_decode_step_is_the_recurrence_in_every_lowering(lowering, dtype):
    feeds = draw(3, 1, dtype)
    feeds = {name: feeds[name][:, 0] if name in {"query", "key", "value"} else feeds[name] for name in feeds}
    del feeds["lengths"]
    output, state = run(lowered(LIGHTNING_ATTENTION_STEP, lowering, dtype), lowering, feeds)
    expected = lightning_attention_step_reference(*in_float64(feeds, LIGHTNING_ATTENTION_STEP))
    assert relative_error(output, expected[0]) < TOLERANCE[dtype]
    assert relative_error(state, expected[1]) < TOLERANCE["float32"]


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_padding_is_harmless_even_where_it_is_not_finite(lowering):
    feeds = draw(2, 70, "float32")
    feeds["lengths"] = np.array([70, 3], np.int32)
    model = lowered(LIGHTNING_ATTENTION, lowering)
    clean_output, clean_state = run(model, lowering, feeds)
    for name in ("key", "value"):
        feeds[name][1, 3:] = np.nan
    output, state = run(model, lowering, feeds)
    assert np.array_equal(output, clean_output)
    assert np.array_equal(state, clean_state)
    assert not output[1, 3:].any()


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_lengths_beyond_the_end_mean_all_tokens(lowering):
    feeds = draw(2, 70, "float32")
    feeds["lengths"] = np.array([70, 70], np.int32)
    model = lowered(LIGHTNING_ATTENTION, lowering)
    expected = run(model, lowering, feeds)
    feeds["lengths"] = np.array([71, 1000], np.int32)
    for found, reference in zip(run(model, lowering, feeds), expected, strict=True):
        assert np.array_equal(found, reference)


def test_matmul_has_neither_loop_nor_scan_nor_ops_of_other_domains():
    for contract in (LIGHTNING_ATTENTION, LIGHTNING_ATTENTION_STEP):
        model = lowered(contract, "matmul")
        assert {node.domain for node in model.graph} == {""}
        assert not {node.op_type for node in model.graph} & {"Loop", "Scan", "If"}
        assert not model.functions


def test_matmul_intermediates_are_linear_in_time():
    def intermediate_bytes(T):
        model = lowered(LIGHTNING_ATTENTION, "matmul")
        model.graph.outputs.extend(
            output for node in model.graph for output in node.outputs if output not in model.graph.outputs
        )
        results = run(model, "matmul", draw(1, T, "float32"))
        return sum(result.nbytes for result in results), max(result.nbytes for result in results)

    short, long = intermediate_bytes(64 * 62), intermediate_bytes(4 * 64 * 62)
    assert long[0] < 4.1 * short[0]
    assert long[1] < 4.1 * short[1]


def test_plugin_keeps_one_node_and_carries_the_matmul_body():
    model = lowered(LIGHTNING_ATTENTION, "plugin")
    assert [node.op_identifier()[:2] for node in model.graph] == [(NAMESPACE, "LightningAttention")]
    assert [identifier[:2] for identifier in model.functions] == [(NAMESPACE, "LightningAttention")]


def test_hybrid_has_matrix_products_for_the_chunk_op_and_one_node_for_the_step():
    chunk, step = (lowered(contract, "hybrid").graph for contract in (LIGHTNING_ATTENTION, LIGHTNING_ATTENTION_STEP))
    assert {node.domain for node in chunk} == {""}
    assert [node.op_type for node in step if node.domain] == ["LinearAttention"]
