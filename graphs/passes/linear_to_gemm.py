"""Linear layers as Gemm with the weight as it is stored, [out, in].

A Transpose of a weight would be folded by most runtimes, and the folded copy lives beside the original: twice the
memory for the tied embedding, and no sharing of weights between the prefill and the decode graph.
"""

import onnx_ir as ir


class LinearToGemm(ir.passes.InPlacePass):
    """Replace MatMul(x, Transpose(weight)) by Gemm(x, weight, transB=1) over the flattened tokens."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every linear layer; transposes left without a user are removed."""
        graph = model.graph
        tokens_shape: ir.Value | None = None
        modified = False
        for node in list(graph):
            weight = _transposed_weight(node)
            if weight is None or weight.shape is None:
                continue
            x, old = node.inputs[0], node.outputs[0]
            rank = len(x.shape) if x is not None and x.shape is not None else 0
            if x is None or rank not in (2, 3):
                continue
            tape = ir.tape.Tape()
            if rank == 2:
                new = tape.op("Gemm", [x, weight], {"transB": 1})
            else:
                if tokens_shape is None:
                    tokens_shape = _tokens_shape(graph)
                flat = tape.op("Reshape", [x, _constant(graph, "flat_shape", [-1, weight.shape.numpy()[1]])])
                product = tape.op("Gemm", [flat, weight], {"transB": 1})
                flat.type = product.type = x.type
                new = tape.op("Reshape", [product, tokens_shape])
            new.shape, new.type = old.shape, old.type
            for created in tape.nodes:
                created.metadata_props.update(node.metadata_props)
            ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, [old], [new])
            modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """Check that no weight is transposed any more."""
        for node in model.graph:
            if node.op_type == "MatMul" and _transposed_weight(node) is not None:
                raise ir.passes.PostconditionError(f"{node.name} still multiplies by a transposed weight")


def _transposed_weight(node: ir.Node) -> ir.Value | None:
    """Return the stored weight [out, in] that a MatMul uses transposed."""
    if node.op_type != "MatMul" or node.domain or node.inputs[1] is None:
        return None
    transpose = node.inputs[1].producer()
    if transpose is None or transpose.op_type != "Transpose" or transpose.inputs[0] is None:
        return None
    weight = transpose.inputs[0]
    return weight if weight.is_initializer() and weight.shape is not None and len(weight.shape) == 2 else None


def _tokens_shape(graph: ir.Graph) -> ir.Value:
    """Add [B, T, -1] from the first input, [B, T, …], computed once for all linear layers."""
    tape = ir.tape.Tape()
    batch_and_time = tape.op("Shape", [graph.inputs[0]], {"start": 0, "end": 2})
    shape = tape.op("Concat", [batch_and_time, _constant(graph, "inferred_dim", [-1])], {"axis": 0})
    batch_and_time.dtype = shape.dtype = ir.DataType.INT64
    graph.insert_before(graph[0], tape.nodes)
    return shape


def _constant(graph: ir.Graph, stem: str, values: list[int]) -> ir.Value:
    """Return an int64 initializer of these values, made once."""
    name = "_".join([stem, *(str(value).replace("-", "m") for value in values)])
    if name not in graph.initializers:
        constant = ir.Value(
            name=name,
            shape=ir.Shape([len(values)]),
            type=ir.TensorType(ir.DataType.INT64),
            const_value=ir.tensor(values, dtype=ir.DataType.INT64, name=name),
        )
        graph.register_initializer(constant)
    return graph.initializers[name]
