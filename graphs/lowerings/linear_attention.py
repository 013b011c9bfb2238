"""What the lowerings `contrib` and `standard` share: our two ops as a LinearAttention op with the gated update rule.

The op has no lengths: a padded token is made harmless by key 0, value 0 and log decay 0. It runs in float32, since
kernels keep the state in the activations' dtype. Its default scale is 1/sqrt(K), so 1 is written out.
"""

import onnx_ir as ir

from tnllm_export.kernels.contract import LIGHTNING_ATTENTION, LIGHTNING_ATTENTION_STEP, NAMESPACE


class LowerToLinearAttention(ir.passes.InPlacePass):
    """Replace both ops by LinearAttention of a domain.

    Args:
        domain: "" for the standard op of opset 27, "com.microsoft" for ONNX Runtime's.
    """

    def __init__(self, domain: str) -> None:
        super().__init__()
        self.domain = domain

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every node of the domain `tnllm`."""
        lowerings = {LIGHTNING_ATTENTION.onnx_name: self._chunk, LIGHTNING_ATTENTION_STEP.onnx_name: self._step}
        nodes = [node for node in model.graph if node.domain == NAMESPACE]
        for node in nodes:
            tape = _Tape(model.graph)
            results = lowerings[node.op_type](tape, node)
            for new, old in zip(results, node.outputs, strict=True):
                new.shape, new.type = old.shape, old.type
            for created in tape.nodes:
                created.metadata_props.update(node.metadata_props)
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, results)
        return ir.passes.PassResult(model, bool(nodes))

    def _chunk(self, tape: "_Tape", node: ir.Node) -> list[ir.Value]:
        query, key, value, slope_rate, past_state, lengths = (_given(value) for value in node.inputs)
        heads, V = _static(query, 2), _static(value, 3)
        tokens = tape.op("Squeeze", [tape.op("Shape", [query], {"start": 1, "end": 2})])
        index = tape.op("Range", [tape.scalar(0), tokens, tape.scalar(1)])
        # [1, T] < [B, 1] -> [B, T, 1]
        before_end = tape.op(
            "Less",
            [tape.op("Unsqueeze", [index, tape.ints(0)]), tape.op("Unsqueeze", [tape.int64(lengths), tape.ints(1)])],
        )
        valid = tape.op("Unsqueeze", [before_end, tape.ints(2)])
        zero = tape.float(0.0)
        q = tape.packed(query)
        k = tape.op("Where", [valid, tape.packed(key), zero])
        v = tape.op("Where", [valid, tape.packed(value), zero])
        # [B, T, H]
        decay = tape.op("Where", [valid, tape.op("Neg", [slope_rate]), zero])
        mixed, present_state = self._linear_attention(tape, [q, k, v, past_state, decay], heads)
        masked = tape.op("Where", [valid, mixed, zero])
        output = tape.op("Reshape", [tape.cast(masked, query), tape.ints(0, 0, heads, V)])
        return [output, present_state]

    def _step(self, tape: "_Tape", node: ir.Node) -> list[ir.Value]:
        query, key, value, slope_rate, past_state = (_given(value) for value in node.inputs)
        heads, V = _static(query, 1), _static(value, 2)
        # [B, H, D] -> [B, 1, H D]
        q, k, v = (tape.op("Reshape", [tape.float32(x), tape.ints(0, 1, -1)]) for x in (query, key, value))
        batch = tape.op(
            "Concat", [tape.op("Shape", [past_state], {"start": 0, "end": 1}), tape.ints(1, heads)], {"axis": 0}
        )
        decay = tape.op("Expand", [tape.op("Neg", [slope_rate]), batch])
        mixed, present_state = self._linear_attention(tape, [q, k, v, past_state, decay], heads)
        output = tape.op("Reshape", [tape.cast(mixed, query), tape.ints(0, heads, V)])
        return [output, present_state]

    def _linear_attention(self, tape: "_Tape", inputs: list[ir.Value], heads: int) -> tuple[ir.Value, ir.Value]:
        attributes = {"q_num_heads": heads, "kv_num_heads": heads, "update_rule": "gated", "scale": 1.0}
        output, present_state = tape.op_multi_out(
            "LinearAttention", inputs, attributes, domain=self.domain, num_outputs=2
        )
        output.dtype = ir.DataType.FLOAT
        return output, present_state


class _Tape(ir.tape.Tape):
    """Records new nodes; constants become initializers of the graph, made once."""

    def __init__(self, graph: ir.Graph) -> None:
        super().__init__()
        self._graph = graph

    def ints(self, *values: int) -> ir.Value:
        return self._constant("ints_" + "_".join(map(str, values)).replace("-", "m"), ir.tensor(list(values)))

    def scalar(self, value: int) -> ir.Value:
        return self._constant(f"int_{value}", ir.tensor(value, dtype=ir.DataType.INT64))

    def float(self, value: float) -> ir.Value:
        return self._constant(f"float_{value}", ir.tensor(value, dtype=ir.DataType.FLOAT))

    def float32(self, x: ir.Value) -> ir.Value:
        return x if x.dtype == ir.DataType.FLOAT else self.op("Cast", [x], {"to": int(ir.DataType.FLOAT)})

    def int64(self, x: ir.Value) -> ir.Value:
        return self.op("Cast", [x], {"to": int(ir.DataType.INT64)})

    def cast(self, x: ir.Value, like: ir.Value) -> ir.Value:
        assert like.dtype is not None
        return x if like.dtype == ir.DataType.FLOAT else self.op("Cast", [x], {"to": int(like.dtype)})

    def packed(self, x: ir.Value) -> ir.Value:
        """[B, T, H, D] -> [B, T, H D] float32."""
        return self.op("Reshape", [self.float32(x), self.ints(0, 0, -1)])

    def _constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self._graph.initializers:
            value = ir.Value(
                name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.register_initializer(value)
        return self._graph.initializers[name]


def _given(value: ir.Value | None) -> ir.Value:
    assert value is not None, "both ops take all of their inputs"
    return value


def _static(value: ir.Value, axis: int) -> int:
    assert value.shape is not None, "the translated graph has shapes"
    dim = value.shape[axis]
    assert isinstance(dim, int), "heads and head widths are static"
    return dim
