"""Each pass on a graph small enough to read."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tnllm_export.graphs.passes.external_weights import ExternalWeight, ExternalWeights
from tnllm_export.graphs.passes.linear_to_gemm import LinearToGemm
from tnllm_export.graphs.passes.name_dims import NameDims
from tnllm_export.graphs.passes.name_nodes import NameNodes
from tnllm_export.graphs.passes.set_opset import SetOpset
from tnllm_export.graphs.passes.static_reshapes import StaticReshapes

FLOAT = ir.DataType.FLOAT
SCOPES = "pkg.torch.onnx.name_scopes"


def value(name, shape, dtype=FLOAT):
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def linear_model(rank=3):
    """X [B, T, 4] times the transpose of a weight [6, 4]."""
    x = value("x", ["B", "T", 4] if rank == 3 else ["B", 4])
    weight = value("fc.weight", [6, 4])
    weight.const_value = ir.tensor(np.arange(24, dtype=np.float32).reshape(6, 4))
    transposed = value("transposed", [4, 6])
    y = value("y", [*list(x.shape)[:-1], 6])
    nodes = [
        ir.Node("", "Transpose", [weight], {"perm": ir.AttrInt64s("perm", [1, 0])}, outputs=[transposed], name="a"),
        ir.Node("", "MatMul", [x, transposed], outputs=[y], name="b", metadata_props={SCOPES: "['', 'lm.fc', 'op']"}),
    ]
    graph = ir.Graph([x], [y], nodes=nodes, initializers=[weight], opset_imports={"": 20}, name="linear")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("rank", [2, 3])
def test_linear_to_gemm_multiplies_by_the_stored_weight(rank):
    model = linear_model(rank)
    x = np.random.default_rng(0).standard_normal((2, 3, 4) if rank == 3 else (2, 4)).astype(np.float32)
    expected = x @ np.arange(24, dtype=np.float32).reshape(6, 4).T
    LinearToGemm()(model)
    RemoveUnusedNodesPass()(model)
    kinds = [node.op_type for node in model.graph]
    assert "Gemm" in kinds
    assert "Transpose" not in kinds
    assert model.graph.outputs[0].name == "y"
    found = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})[0]
    assert np.allclose(found, expected, atol=1e-6)


def test_linear_to_gemm_leaves_other_products_alone():
    a, b, c = value("a", [2, 3]), value("b", [3, 4]), value("c", [2, 4])
    graph = ir.Graph([a, b], [c], nodes=[ir.Node("", "MatMul", [a, b], outputs=[c])], opset_imports={"": 20})
    assert not LinearToGemm()(ir.Model(graph, ir_version=10)).modified


def reshape_model(source, target):
    x, shape, y = value("x", source), value("shape", [len(target)], ir.DataType.INT64), value("y", target)
    node = ir.Node("", "Reshape", [x, shape], {"allowzero": ir.AttrInt64("allowzero", 1)}, outputs=[y], name="r")
    return ir.Model(ir.Graph([x, shape], [y], nodes=[node], opset_imports={"": 20}), ir_version=10)


@pytest.mark.parametrize(
    ("source", "target", "constant"),
    [
        (["B", "T", 64], ["B", "T", 4, 16], [0, 0, 4, 16]),
        (["B", "T", 4, 16], ["B", "T", 64], [0, 0, 64]),
        (["B", 1, 8], ["M", 8], [-1, 8]),
    ],
)
def test_static_reshapes_copy_and_infer(source, target, constant):
    model = reshape_model(source, target)
    StaticReshapes()(model)
    node = model.graph[0]
    assert node.inputs[1].const_value.numpy().tolist() == constant
    assert node.attributes["allowzero"].value == 0


def test_static_reshapes_leave_what_shapes_do_not_determine():
    model = reshape_model(["B", "T", 64], ["M", "N", 64])
    assert not StaticReshapes()(model).modified


def test_nodes_are_named_after_modules_and_lose_the_exporters_metadata():
    model = linear_model()
    LinearToGemm()(model)
    RemoveUnusedNodesPass()(model)
    NameNodes("lm")(model)
    assert {node.name.split("/")[0] for node in model.graph} == {"fc"}
    assert len({node.name for node in model.graph}) == len(model.graph)
    assert not any(node.metadata_props for node in model.graph)
    assert [output.name for output in model.graph.outputs] == ["y"]


def test_a_node_shared_by_modules_is_named_after_what_holds_them_all():
    x = value("x", ["B"])
    shared, left, right = value("s", ["B"]), value("l", ["B"]), value("r", ["B"])
    nodes = [
        ir.Node("", "Neg", [x], outputs=[shared]),
        ir.Node("", "Abs", [shared], outputs=[left], metadata_props={SCOPES: "['', 'lm.layers.0.norm', 'op']"}),
        ir.Node("", "Abs", [shared], outputs=[right], metadata_props={SCOPES: "['', 'lm.layers.1.norm', 'op']"}),
    ]
    model = ir.Model(ir.Graph([x], [left, right], nodes=nodes, opset_imports={"": 20}), ir_version=10)
    NameNodes("lm")(model)
    assert [node.name for node in model.graph] == ["layers/Neg", "layers.0.norm/Abs", "layers.1.norm/Abs"]


def test_dims_get_their_names_everywhere():
    model = linear_model()
    NameDims("batch", "time")(model)
    for shape in (model.graph.inputs[0].shape, model.graph.outputs[0].shape):
        assert [str(dim) for dim in list(shape)[:2]] == ["batch", "time"]


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
