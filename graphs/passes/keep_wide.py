"""What was rounded to a half dtype only to be widened again stays wide: two kernels fewer, and no rounding."""

import onnx_ir as ir
from onnx_ir.convenience import replace_all_uses_with

_LAYOUT = ("Reshape", "Squeeze", "Unsqueeze", "Transpose")


class KeepWide(ir.passes.InPlacePass):
    """Remove pairs of casts from float32 to a half dtype and back, with nothing between but changes of layout.

    But not before a norm: ONNX Runtime has a kernel for norms from bfloat16 to bfloat16, none from float32.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove every pair whose values nobody else uses."""
        removed = 0
        for node in list(model.graph):
            if node.op_type != "Cast" or node.attributes["to"].as_int() != ir.DataType.FLOAT:
                continue
            chain = _chain_to_float(node)
            if chain is None or any(user.op_type == "Pow" for user, _ in node.outputs[0].uses()):
                continue
            narrowing, layout = chain
            wide = narrowing.inputs[0]
            assert wide is not None
            if layout:
                layout[-1].replace_input_with(0, wide)
                for changed in layout:
                    changed.outputs[0].dtype = ir.DataType.FLOAT
                wide = layout[0].outputs[0]
            replace_all_uses_with(node.outputs[0], wide)
            model.graph.remove(node, safe=True)
            model.graph.remove(narrowing, safe=True)
            removed += 1
        return ir.passes.PassResult(model, removed > 0)


def _chain_to_float(widening: ir.Node) -> tuple[ir.Node, list[ir.Node]] | None:
    """Return the cast from float32 that a widening cast undoes, and the nodes between, the last of them first."""
    layout: list[ir.Node] = []
    value = widening.inputs[0]
    while value is not None and len(value.uses()) == 1 and not value.is_graph_output():
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Cast":
            source = node.inputs[0]
            return (node, layout) if source is not None and source.dtype == ir.DataType.FLOAT else None
        if node.op_type not in _LAYOUT:
            return None
        layout.append(node)
        value = node.inputs[0]
    return None
