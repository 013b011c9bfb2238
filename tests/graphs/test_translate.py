"""Each ATen operator as ONNX answers as torch does, and what has no translation is refused by name."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.export import Dim

from tnllm_export.errors import ExportError
from tnllm_export.graphs.operators import OPERATORS
from tnllm_export.graphs.passes.name_nodes import MODULE
from tnllm_export.graphs.traced import record
from tnllm_export.graphs.translate import translate

# Functions of x [B, T, 6] float32 and ids [B, T] int64, by the operator that they are there for.
CASES = {
    "aten.add.Tensor": lambda x, ids: (x + x.square(), x + 1e-6, 1 + x, ids + x.mean(-1, keepdim=False)),
    "aten.arange.default": lambda x, ids: (ids + torch.arange(ids.shape[1]), ids + torch.arange(1)),
    "aten.cat.default": lambda x, ids: (torch.cat((x, x.cos()), dim=-1), torch.cat((x, x.sin()), dim=1)),
    "aten.chunk.default": lambda x, ids: tuple(reversed(x.chunk(3, dim=-1))),
    "aten.clamp.default": lambda x, ids: (x.clamp(0.25), ids.clamp(min=3)),
    "aten.cos.default": lambda x, ids: (x.cos(),),
    "aten.elu.default": lambda x, ids: (F.elu(x), F.elu(x, 0.5)),
    "aten.expand.default": lambda x, ids: (torch.unflatten(ids, 1, (-1, 1)).expand(-1, -1, 6) + 0,),
    "aten.flatten.using_ints": lambda x, ids: (torch.unflatten(x, -1, (2, 3)).flatten(2), x.flatten(1)),
    "aten.gather.default": lambda x, ids: (x.gather(2, torch.unflatten(ids, 1, (-1, 1)).expand(-1, -1, 4)),),
    "aten.mean.dim": lambda x, ids: (x.mean(-1, keepdim=True),),
    "aten.mul.Tensor": lambda x, ids: (x * x.sin(), x * 2.5, ids * 3),
    "aten.rsqrt.default": lambda x, ids: ((x.square() + 1e-6).rsqrt(),),
    "aten.silu.default": lambda x, ids: (F.silu(x),),
    "aten.sin.default": lambda x, ids: (x.sin(),),
    "aten.square.default": lambda x, ids: (x.square(),),
    "aten.squeeze.dim": lambda x, ids: (x.unsqueeze(2).squeeze(2), x.unsqueeze(-1).squeeze(-1)),
    "aten.sub.Tensor": lambda x, ids: (x - x.square(), ids - 1),
    "aten.sym_size.int": lambda x, ids: (torch.arange(x.shape[0]), torch.arange(x.shape[1])),
    "aten.to.dtype": lambda x, ids: (ids.to(torch.float32), x.to(torch.float16), x.to(torch.float32) * 2),
    "aten.unflatten.int": lambda x, ids: (torch.unflatten(x, -1, (2, -1)), torch.unflatten(ids, 1, (-1, 1, 1))),
    "aten.unsqueeze.default": lambda x, ids: (x.unsqueeze(0), ids.unsqueeze(-1)),
}
# Shown elsewhere: operators with weights below, our own two in tests/graphs/lowerings.
WITH_WEIGHTS = {"aten.embedding.default", "aten.linear.default"}
OWN = {"tnllm.lightning_attention.default", "tnllm.lightning_attention_step.default"}


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, ids):
        return self.function(x, ids)


class Net(nn.Module):
    """Weights of every sort: tied, unused, of a linear layer over tokens and over rows."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 6)
        self.narrow = nn.Linear(6, 5, bias=False)
        self.unused = nn.Linear(6, 5, bias=False)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x, ids):
        hidden = x + self.embed(ids)
        return self.narrow(hidden), self.head(hidden.mean(1, keepdim=True).squeeze(1)), self.head(hidden)


def draw(B=2, T=5):
    generator = torch.Generator().manual_seed(B + T)
    return torch.randn(B, T, 6, generator=generator), torch.randint(0, 6, (B, T), generator=generator)


def trace(module):
    dims = {0: Dim("batch", min=1), 1: Dim("time", min=1)}
    return torch.export.export(module, draw(), dynamic_shapes={"x": dims, "ids": dims}, strict=False)


def translated(program, count, weight_names=None):
    outputs = [f"output.{index}" for index in range(count)]
    model = translate(record(program), input_names=["x", "ids"], output_names=outputs, weight_names=weight_names or {})
    for index, node in enumerate(model.graph):
        node.name = f"node.{index}"
    return model


def assert_answers(model, module):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    evaluator = ReferenceEvaluator(proto)
    for B, T in ((2, 5), (1, 1), (3, 63)):
        x, ids = draw(B, T)
        with torch.no_grad():
            expected = module(x, ids)
        found = evaluator.run(None, {"x": x.numpy(), "ids": ids.numpy()})
        assert len(found) == len(expected) > 0
        for one, other in zip(found, expected, strict=True):
            assert (one.shape, one.dtype) == (tuple(other.shape), other.numpy().dtype)
            assert np.allclose(one, other.numpy(), rtol=1e-6, atol=1e-6)


def test_every_operator_of_the_table_is_shown_to_be_right():
    assert CASES.keys() | WITH_WEIGHTS | OWN == OPERATORS.keys()


@pytest.mark.parametrize("name", CASES)
def test_an_operator_answers_as_torch_does(name):
    module = Function(CASES[name])
    program = trace(module)
    assert name in {str(node.target) for node in program.graph.nodes}
    assert_answers(translated(program, len(module(*draw()))), module)


def test_silu_of_a_half_dtype_is_rounded_once():
    module = Function(lambda x, ids: (F.silu(x.to(torch.float16)),))
    x, ids = draw(4, 64)
    x = (3 * x).clamp(-8, 8).half().float()
    evaluator = ReferenceEvaluator(ir.to_proto(translated(trace(module), 1)))
    [found] = evaluator.run(None, {"x": x.numpy(), "ids": ids.numpy()})
    exact = F.silu(x.double()).numpy()
    assert found.dtype == np.float16
    assert np.all(np.abs(found - exact) <= 1.001 * 2.0**-11 * np.abs(exact))


@pytest.fixture(scope="module")
def net():
    """A module with weights, and the names that they shall have in its graph."""
    torch.manual_seed(0)
    module = Net()
    names = {name: name for name, _ in module.named_parameters(remove_duplicate=False)}
    return module, names | {"embed.weight": "tied", "head.weight": "tied"}


def test_weights_are_used_as_they_are_stored_and_once(net):
    module, names = net
    model = translated(trace(module), 3, names)
    assert {v.name for v in model.graph.initializers.values() if v.const_value is None} == {"tied", "narrow.weight"}
    assert "Transpose" not in {node.op_type for node in model.graph}
    for name, weight in (("tied", module.embed.weight), ("narrow.weight", module.narrow.weight)):
        model.graph.initializers[name].const_value = ir.tensor(weight.detach().numpy(), name=name)
    assert_answers(model, module)


def test_nodes_know_their_module_and_what_many_modules_use_has_none(net):
    module, names = net
    model = translated(trace(module), 3, names)
    modules = {node.op_type: node.metadata_props.get(MODULE) for node in model.graph}
    assert modules["Gather"] == "embed"
    assert modules["ReduceMean"] == ""
    assert {node.metadata_props[MODULE] for node in model.graph if node.op_type == "Gemm"} == {"narrow", "head"}
    assert modules["Shape"] is modules["Concat"] is None
    assert [node.op_type for node in model.graph].count("Shape") == 1


def test_reshapes_copy_and_infer_by_constants():
    program = trace(Function(lambda x, ids: (torch.unflatten(x, -1, (2, 3)), torch.unflatten(x, 1, (-1, 1)))))
    targets = [node.inputs[1] for node in translated(program, 2).graph]
    assert [target.const_value.numpy().tolist() for target in targets] == [[0, 0, 2, 3], [0, 0, 1, 6]]


def test_an_operator_without_translation_is_named():
    with pytest.raises(ExportError, match=r"could not be translated to ONNX: aten.erf.default has no translation"):
        translated(trace(Function(lambda x, ids: (x.erf(),))), 1)


def test_arguments_without_translation_are_named():
    with pytest.raises(ExportError, match=r"aten.add.Tensor has arguments without a translation \(.*alpha"):
        translated(trace(Function(lambda x, ids: (torch.add(x, x, alpha=2),))), 1)


def test_a_reshape_to_dimensions_of_no_input_is_refused():
    with pytest.raises(ExportError, match="no input of the program has them"):
        translated(trace(Function(lambda x, ids: (torch.cat((x, x), dim=1).unsqueeze(0).flatten(0, 1),))), 1)
