"""All layers from one of each kind: layers of one kind are the same nodes with other weights and another state.

Tracing costs seconds per layer, repeating nodes costs nothing. The traced model, the template, has one layer of each
kind; here its nodes are repeated for every layer of the real one. A test holds the result against a model that was
traced in full.
"""

from collections.abc import Sequence

import onnx_ir as ir

_LAYERS = "model.layers"


class UnrollLayers(ir.passes.InPlacePass):
    """Repeat the template's layers; nodes must have been named by `NameNodes`.

    Args:
        kinds: For each layer of the real model, which layer of the template it is like. Kinds appear in ascending
            order: the first layer is of kind 0, the first one unlike it of kind 1, and so on.
    """

    def __init__(self, kinds: Sequence[int]) -> None:
        super().__init__()
        self.kinds = tuple(kinds)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the template's layers by the real model's."""
        if self.kinds == tuple(range(len(self.kinds))):
            return ir.passes.PassResult(model, False)
        graph = model.graph
        templates = [_Template(graph, kind) for kind in range(max(self.kinds) + 1)]
        weights = {name: value for name, value in graph.initializers.items() if name.startswith(f"{_LAYERS}.")}
        for name in weights:
            graph.initializers.pop(name)
        logits, *present_states = graph.outputs
        past_states = graph.inputs[-len(templates) :]
        del graph.inputs[-len(templates) :]

        residual = templates[0].residual_in
        # What a layer computes and others use too, a mask of the padding say: the first copy serves all.
        shared: dict[ir.Value, ir.Value] = {}
        new_states = []
        for layer, kind in enumerate(self.kinds):
            template = templates[kind]
            values = shared | {template.residual_in: residual}
            past_state = _copy(past_states[kind], f"past_state.{layer}")
            graph.inputs.append(past_state)
            values[past_states[kind]] = past_state
            for name, weight in weights.items():
                if name.startswith(template.prefix):
                    values[weight] = _copy(weight, f"{_LAYERS}.{layer}.{name.removeprefix(template.prefix)}")
                    graph.initializers.add(values[weight])
            for node in template.nodes:
                graph.append(_copy_node(node, values, template, layer))
            for node in template.nodes:
                for output in node.outputs:
                    shared.setdefault(output, values[output])
            residual = values[template.residual_out]
            new_states.append(values[present_states[kind]])
            new_states[-1].name = f"present_state.{layer}"

        graph.outputs.clear()
        graph.outputs.extend((logits, *new_states))
        shared[templates[-1].residual_out] = residual
        for old, new in shared.items():
            ir.convenience.replace_all_uses_with(old, new)
        for template in templates:
            graph.remove(template.nodes)
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """Check that each layer has its state."""
        states = [value.name for value in model.graph.inputs if str(value.name).startswith("past_state.")]
        if states != [f"past_state.{layer}" for layer in range(len(self.kinds))]:
            raise ir.passes.PostconditionError(f"the states of {len(self.kinds)} layers are {states}")


class _Template:
    """One layer of the traced model: its nodes in order, and the residual stream where it enters and leaves."""

    def __init__(self, graph: ir.Graph, kind: int) -> None:
        self.prefix = f"{_LAYERS}.{kind}."
        own = f"{_LAYERS}.{kind}/"
        self.nodes = [node for node in graph if str(node.name).startswith((self.prefix, own))]
        # The layer's own two sums, x + GLA(N(x)) and x + SGLU(N(x)): the residual stream goes through both.
        first, last = (node for node in self.nodes if str(node.name).startswith(f"{own}Add"))
        stream = first.inputs[0]
        assert stream is not None
        self.residual_in = stream
        self.residual_out = last.outputs[0]


def _copy(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type)


def _copy_node(node: ir.Node, values: dict[ir.Value, ir.Value], template: _Template, layer: int) -> ir.Node:
    """Copy a node for a layer, entering its outputs' copies into `values`."""

    def rename(name: str | None) -> str:
        old = template.prefix[:-1]
        return f"{_LAYERS}.{layer}{str(name).removeprefix(old)}" if str(name).startswith(old) else str(name)

    outputs = [_copy(output, rename(output.name)) for output in node.outputs]
    values.update(zip(node.outputs, outputs, strict=True))
    return ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else values.get(value, value) for value in node.inputs],
        attributes=node.attributes.values(),
        overload=node.overload,
        outputs=outputs,
        name=rename(node.name),
    )
