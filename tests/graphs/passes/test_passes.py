"""Each pass on a graph small enough to read."""

import numpy as np
import onnx_ir as ir
import pytest

from tnllm_export.graphs.passes.external_weights import ExternalWeight, ExternalWeights
from tnllm_export.graphs.passes.name_dims import NameDims
from tnllm_export.graphs.passes.name_nodes import MODULE, NameNodes
from tnllm_export.graphs.passes.set_opset import SetOpset

FLOAT = ir.DataType.FLOAT


def value(name, shape, dtype=FLOAT):
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def linear_model():
    """X [B, T, 4], flattened, times a weight [6, 4]."""
    x, weight = value("x", ["B", "T", 4]), value("fc.weight", [6, 4])
    weight.const_value = ir.tensor(np.arange(24, dtype=np.float32).reshape(6, 4))
    rows = ir.Value(name="rows", const_value=ir.tensor([-1, 4]))
    flat, y = value("flat", ["N", 4]), value("y", ["N", 6])
    where = {MODULE: "lm.fc"}
    nodes = [
        ir.Node("", "Reshape", [x, rows], outputs=[flat], metadata_props=where),
        ir.Node("", "Gemm", [flat, weight], {"transB": ir.AttrInt64("transB", 1)}, outputs=[y], metadata_props=where),
    ]
    graph = ir.Graph([x], [y], nodes=nodes, initializers=[weight, rows], opset_imports={"": 20}, name="linear")
    return ir.Model(graph, ir_version=10)


def test_nodes_are_named_after_modules_and_lose_their_metadata():
    model = linear_model()
    NameNodes("lm")(model)
    assert [node.name for node in model.graph] == ["fc/Reshape", "fc/Gemm"]
    assert not any(node.metadata_props for node in model.graph)
    assert [output.name for output in model.graph.outputs] == ["y"]


def test_a_node_shared_by_modules_is_named_after_what_holds_them_all():
    x = value("x", ["B"])
    shared, left, right = value("s", ["B"]), value("l", ["B"]), value("r", ["B"])
    nodes = [
        ir.Node("", "Neg", [x], outputs=[shared]),
        ir.Node("", "Abs", [shared], outputs=[left], metadata_props={MODULE: "lm.layers.0.norm"}),
        ir.Node("", "Abs", [shared], outputs=[right], metadata_props={MODULE: "lm.layers.1.norm"}),
    ]
    model = ir.Model(ir.Graph([x], [left, right], nodes=nodes, opset_imports={"": 20}), ir_version=10)
    NameNodes("lm")(model)
    assert [node.name for node in model.graph] == ["layers/Neg", "layers.0.norm/Abs", "layers.1.norm/Abs"]


def test_dims_get_their_names_everywhere():
    model = linear_model()
    NameDims("batch", "time")(model)
    assert [str(dim) for dim in model.graph.inputs[0].shape] == ["batch", "time", "4"]
    assert [str(dim) for dim in model.graph.outputs[0].shape] == ["N", "6"]


def test_set_opset_imports_what_is_used_and_no_more():
    model = linear_model()
    model.graph.opset_imports["unused"] = 1
    SetOpset(27, {})(model)
    assert dict(model.opset_imports) == {"": 27}


def test_set_opset_refuses_an_op_that_changed():
    x, y = value("x", ["B"]), value("y", ["B"])
    node = ir.Node("", "Upsample", [x, x], outputs=[y])
    model = ir.Model(ir.Graph([x], [y], nodes=[node], opset_imports={"": 9}), ir_version=10)
    with pytest.raises(ir.passes.PreconditionError, match="Upsample"):
        SetOpset(27, {})(model)


def test_external_weights_point_into_the_file():
    model = linear_model()
    model.graph.initializers["fc.weight"].const_value = None
    ExternalWeights({"fc.weight": ExternalWeight("weights.safetensors", 4096, 96)})(model)
    tensor = model.graph.initializers["fc.weight"].const_value
    assert (tensor.location, tensor.offset, tensor.length) == ("weights.safetensors", 4096, 96)


def test_external_weights_of_another_size_are_refused():
    model = linear_model()
    model.graph.initializers["fc.weight"].const_value = None
    with pytest.raises(ir.passes.PassError, match="96 bytes in the graph, 48 in the file"):
        ExternalWeights({"fc.weight": ExternalWeight("weights.safetensors", 4096, 48)})(model)
