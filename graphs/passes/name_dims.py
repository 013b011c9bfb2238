"""Readable symbolic dimensions: `batch` and `time` instead of the tracer's `s15` and `s70`."""

import onnx_ir as ir


class NameDims(ir.passes.InPlacePass):
    """Name the first input's dimensions, [batch, time], wherever they occur.

    Args:
        names: Names of the first input's dimensions, in order.
    """

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename dimensions of every value."""
        graph = model.graph
        first = graph.inputs[0].shape
        assert first is not None, "graph inputs have shapes"
        renamed = {
            dim.value: name for dim, name in zip(first, self.names, strict=False) if isinstance(dim, ir.SymbolicDim)
        }
        for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
            if value.shape is None:
                continue
            for axis, dim in enumerate(value.shape):
                if isinstance(dim, ir.SymbolicDim) and dim.value in renamed:
                    value.shape[axis] = ir.SymbolicDim(renamed[dim.value])
        return ir.passes.PassResult(model, bool(renamed))
