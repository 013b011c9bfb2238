"""From a traced program to an onnx-ir model in which each of our two ops is one node of the domain `tnllm`.

torch's own exporter would trace the program a second time, through the decompositions of all its operators, and first
compile some five hundred translations: several times what tracing the model takes. A TransNormerLLM consists of two
dozen operators; `operators.py` translates each as it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.tensor_adapters import from_torch_dtype

from tnllm_export.errors import ExportError
from tnllm_export.graphs.builder import Builder
from tnllm_export.graphs.operators import OPERATORS
from tnllm_export.graphs.schemas import register_schemas
from tnllm_export.graphs.traced import GETITEM, Reference, TracedCall, TracedInput, TracedProgram, TracedTensor
from tnllm_export.kernels.contract import NAMESPACE, OPSET_VERSION

OPSET = 20
"""ai.onnx opset of translated graphs: the newest that every runtime we target has had for years."""

_IR_VERSION = 10


def translate(
    program: TracedProgram,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    weight_names: Mapping[str, str],
) -> ir.Model:
    """Translate a program; no weight is read.

    Args:
        program: What torch.export made, as `traced.record` gives it.
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
    values: dict[str, Any] = {}
    for value in program.inputs:
        if value.weight is None:
            values[value.name] = _describe(ir.Value(), value.tensor)
            graph.inputs.append(values[value.name])
        else:
            values[value.name] = _weight(graph, value, weight_names[value.weight])
    for call in program.calls:
        values[call.name] = _call(builder, call, values)
    graph.outputs.extend(values[name] for name in program.outputs)
    _rename(graph.inputs, input_names)
    _rename(graph.outputs, output_names)
    return ir.Model(graph, ir_version=_IR_VERSION)


def _call(builder: Builder, call: TracedCall, values: Mapping[str, Any]) -> Any:
    """Append what an operator becomes, and return its value or values."""
    arguments = _resolve(call.arguments, values)
    if call.operator == GETITEM:
        several, index = arguments
        return several[index]
    name = call.operator
    if name not in OPERATORS:
        raise ExportError(f"the program could not be translated to ONNX: {name} has no translation")
    builder.module = call.module
    try:
        made = OPERATORS[name](builder, call.result, *arguments, **_resolve(call.options, values))
    except TypeError as error:
        raise ExportError(
            f"the program could not be translated to ONNX: {name} has arguments without a translation ({error})"
        ) from error
    for value, result in [(made, call.result)] if isinstance(made, ir.Value) else zip(made, call.result, strict=True):
        _describe(value, result)
    return made


def _resolve(argument: Any, values: Mapping[str, Any]) -> Any:
    """Put values in the place of references."""
    if isinstance(argument, Reference):
        return values[argument.name]
    if isinstance(argument, dict):
        return {key: _resolve(value, values) for key, value in argument.items()}
    return [_resolve(value, values) for value in argument] if isinstance(argument, list | tuple) else argument


def _weight(graph: ir.Graph, weight: TracedInput, name: str) -> ir.Value | None:
    """Return a weight as an initializer without value; what the program shows but never uses is none."""
    if not weight.used:
        return None
    if name not in graph.initializers:
        graph.initializers.add(_describe(ir.Value(name=name), weight.tensor))
    return graph.initializers[name]


def _describe(value: ir.Value, traced: TracedTensor) -> ir.Value:
    """Give a value the shape and dtype with which it was traced."""
    value.shape, value.dtype = ir.Shape(traced.shape), from_torch_dtype(traced.dtype)
    return value


def _rename(values: Sequence[ir.Value], names: Sequence[str]) -> None:
    for value, name in zip(values, names, strict=True):
        value.name = name
