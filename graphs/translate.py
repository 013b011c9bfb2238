"""From an ExportedProgram to an onnx-ir model in which each of our two ops is one node of the domain `tnllm`.

torch's own exporter would trace the program a second time, through the decompositions of all its operators, and first
compile some five hundred translations: several times what tracing the model takes. A TransNormerLLM consists of two
dozen operators; `operators.py` translates each as it is.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor, fx
from torch.export import ExportedProgram

from tnllm_export.errors import ExportError
from tnllm_export.graphs.builder import Builder, shape_of
from tnllm_export.graphs.operators import OPERATORS
from tnllm_export.graphs.schemas import register_schemas
from tnllm_export.kernels.contract import NAMESPACE, OPSET_VERSION

OPSET = 20
"""ai.onnx opset of translated graphs: the newest that every runtime we target has had for years."""

_IR_VERSION = 10

_ASSERTION = "aten._assert_tensor_metadata.default"
"""What torch.export puts before casts, to find programs that do not fit their inputs."""

_MEANINGLESS = ("device", "layout", "pin_memory")
"""Arguments of ATen operators that say nothing about a graph."""


def translate(
    program: ExportedProgram,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    weight_names: Mapping[str, str],
) -> ir.Model:
    """Translate a program; no weight is read, so the weights may be fake tensors.

    Args:
        program: What torch.export made.
        input_names: Names of the graph's inputs, in the program's order.
        output_names: Names of the graph's outputs, in the program's order.
        weight_names: The program's parameter and buffer names, and the name of each as an initializer.

    Returns:
        A model of opset 20. Its nodes know the module they come from (`passes.name_nodes.MODULE`); its weights are
        initializers with names, dtypes and shapes but no values.

    Raises:
        ExportError: An operator has no translation.
    """
    register_schemas()
    graph = ir.Graph((), (), nodes=(), opset_imports={"": OPSET, NAMESPACE: OPSET_VERSION}, name="main_graph")
    builder = Builder(graph)
    values: dict[fx.Node, Any] = {}
    signature = program.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    *nodes, results = program.graph.nodes
    for node in nodes:
        if node.op == "call_function":
            values[node] = _call(builder, node, values)
        elif node.name in stored:
            values[node] = _weight(graph, node, weight_names[stored[node.name]])
        else:
            values[node] = _describe(ir.Value(), node.meta["val"])
            graph.inputs.append(values[node])
    graph.outputs.extend(values[result] for result in results.args[0])
    _rename(graph.inputs, input_names)
    _rename(graph.outputs, output_names)
    return ir.Model(graph, ir_version=_IR_VERSION)


def _call(builder: Builder, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Append what an operator becomes, and return its value or values."""
    arguments = fx.map_arg(node.args, values.__getitem__)
    if node.target is operator.getitem:
        return operator.getitem(*arguments)
    name = str(node.target)
    if name == _ASSERTION:
        return None
    if name not in OPERATORS:
        raise ExportError(f"the program could not be translated to ONNX: {name} has no translation")
    options = {key: value for key, value in node.kwargs.items() if key not in _MEANINGLESS}
    result = node.meta["val"]
    modules = list(node.meta["nn_module_stack"].values())
    builder.module = modules[-1][0]
    try:
        made = OPERATORS[name](builder, result, *arguments, **options)
    except TypeError as error:
        raise ExportError(
            f"the program could not be translated to ONNX: {name} has arguments without a translation ({error})"
        ) from error
    for value, fake in [(made, result)] if isinstance(made, ir.Value) else zip(made, result, strict=True):
        _describe(value, fake)
    return made


def _weight(graph: ir.Graph, node: fx.Node, name: str) -> ir.Value | None:
    """Return a weight as an initializer without value; what the program shows but never uses is none."""
    if not node.users:
        return None
    if name not in graph.initializers:
        graph.initializers.add(_describe(ir.Value(name=name), node.meta["val"]))
    return graph.initializers[name]


def _describe(value: ir.Value, traced: Tensor | torch.SymInt) -> ir.Value:
    """Give a value the shape and dtype with which it was traced."""
    if isinstance(traced, Tensor):
        value.shape, value.dtype = shape_of(traced.shape), from_torch_dtype(traced.dtype)
    else:
        value.shape, value.dtype = ir.Shape(()), ir.DataType.INT64
    return value


def _rename(values: Sequence[ir.Value], names: Sequence[str]) -> None:
    for value, name in zip(values, names, strict=True):
        value.name = name
