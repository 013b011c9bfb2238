"""One number of tokens for all layers: what depends on it alone, masks of the padding say, is then computed once."""

import onnx_ir as ir


class SharedTime(ir.passes.InPlacePass):
    """Ask the graph's first input for its symbolic sizes, not each layer's activations, which have the same."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewire every Shape of a single symbolic dimension that the first input has too."""
        source = model.graph.inputs[0]
        assert source.shape is not None
        axes = {str(dim): axis for axis, dim in enumerate(source.shape) if isinstance(dim, ir.SymbolicDim)}
        changed = 0
        for node in model.graph:
            if node.op_type != "Shape" or node.inputs[0] in (None, source) or node.inputs[0].shape is None:
                continue
            start, end = (node.attributes[name].as_int() if name in node.attributes else None for name in _ENDS)
            if start is None or end != start + 1 or start < 0:
                continue
            axis = axes.get(str(node.inputs[0].shape[start]))
            if axis is not None:
                node.replace_input_with(0, source)
                for name, value in zip(_ENDS, (axis, axis + 1), strict=True):
                    node.attributes[name] = ir.AttrInt64(name, value)
                changed += 1
        return ir.passes.PassResult(model, changed > 0)


_ENDS = ("start", "end")
