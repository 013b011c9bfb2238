"""Norms in the form that ONNX Runtime makes one kernel of.

Its optimizer looks for x → Pow → ReduceMean → Add → Sqrt → Div → Mul by a scale, casts to and from float32 around it
included, and knows no norm without a scale. So a norm gets a scale of ones, which changes no bit of it.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_all_uses_with


class FusibleNorm(ir.passes.InPlacePass):
    """Rewrite x · 1 / sqrt(mean(x²) + eps), over the last dimension, as a norm with a scale."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every norm of the graph."""
        found = [norm for node in model.graph if (norm := _norm_of(node)) is not None]
        for square, reciprocal, normed in found:
            _rewrite(model.graph, square, reciprocal, normed)
        return ir.passes.PassResult(model, bool(found))


def _norm_of(reciprocal: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node] | None:
    """Return the square, the reciprocal and the product of the norm whose reciprocal this is."""
    chain = [reciprocal]
    for op_type, before in (("Reciprocal", "Sqrt"), ("Sqrt", "Add"), ("Add", "ReduceMean"), ("ReduceMean", "Mul")):
        node = chain[-1]
        maker = node.inputs[0].producer() if node.op_type == op_type and node.inputs[0] is not None else None
        if maker is None or maker.op_type != before or len(maker.outputs[0].uses()) != 1:
            return None
        chain.append(maker)
    square, users = chain[-1], [user for user, _ in reciprocal.outputs[0].uses()]
    if len(users) != 1 or users[0].op_type != "Mul" or square.inputs[0] is not square.inputs[1]:
        return None
    return (square, reciprocal, users[0]) if square.inputs[0] in users[0].inputs else None


def _rewrite(graph: ir.Graph, square: ir.Node, reciprocal: ir.Node, product: ir.Node) -> None:
    x, root = square.inputs[0], reciprocal.inputs[0]
    assert x is not None
    assert x.shape is not None
    two = _constant(graph, "float_2", np.array(2, np.float32), ir.DataType.FLOAT)
    squared = _node("Pow", [x, two], like=square)
    replace_all_uses_with(square.outputs[0], squared.outputs[0])
    graph.insert_before(square, squared)
    normed = _node("Div", [x, root], like=product)
    graph.insert_before(product, normed)
    last, added = product, [normed]
    users = [user for user, _ in product.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Cast":
        last = users[0]
        added.append(_node("Cast", [normed.outputs[0]], like=last))
        graph.insert_before(last, added[-1])
    dtype, width = last.outputs[0].dtype, x.shape[-1]
    assert dtype is not None
    assert isinstance(width, int), "norms are over a static width"
    ones = _constant(graph, f"ones_{dtype.name.lower()}_{width}", np.ones(width, np.float32), dtype)
    scaled = _node("Mul", [added[-1].outputs[0], ones], like=last)
    graph.insert_before(last, scaled)
    replace_all_uses_with(last.outputs[0], scaled.outputs[0])
    graph.remove([*dict.fromkeys((last, product)), reciprocal, square], safe=True)


def _node(op_type: str, inputs: list[ir.Value | None], like: ir.Node) -> ir.Node:
    """Return a node with the output type, attributes (of a cast) and origin of another."""
    attributes = like.attributes.values() if op_type == "Cast" else ()
    node = ir.Node("", op_type, inputs, attributes, num_outputs=1, metadata_props=dict(like.metadata_props))
    node.outputs[0].shape, node.outputs[0].type = like.outputs[0].shape, like.outputs[0].type
    return node


def _constant(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]
