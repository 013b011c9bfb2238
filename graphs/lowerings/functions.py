"""Adding ONNX functions written in onnxscript to a model."""

import onnx_ir as ir
from onnxscript.values import OnnxFunction


def add_functions(model: ir.Model, *functions: OnnxFunction) -> None:
    """Add each function that a node of the graph calls, in place, with its opset imports."""
    called = {node.op_identifier() for node in model.graph}
    for function in functions:
        body = ir.from_proto(function.to_function_proto())
        if body.identifier() in called:
            model.functions[body.identifier()] = body
            model.opset_imports.update({body.domain: 1})
