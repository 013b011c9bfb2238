"""Readable names: every node is called after the module it comes from, e.g. `model.layers.0.channel_mixer.l1/Gemm`."""

from collections import Counter
from itertools import takewhile

import onnx_ir as ir

MODULE = "tnllm.module"
"""Key of the metadata in which a translated node keeps the module it comes from."""


class NameNodes(ir.passes.InPlacePass):
    """Name nodes and their values after modules, and drop the metadata that says so.

    Args:
        prefix: The name under which the program holds the model; stripped from module names.
    """

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename everything but the graph's inputs, outputs and weights."""
        graph = model.graph
        modules: dict[ir.Node | None, str | None] = {node: self._module(node) for node in graph}
        # What a pass or the optimizer made belongs to whoever uses it, else to where its input comes from.
        for node in reversed(list(graph)):
            if modules[node] is None:
                users = [modules.get(user) for output in node.outputs for user, _ in output.uses()]
                modules[node] = _common_parent([module for module in users if module])
        for node in graph:
            if modules[node] is None:
                makers = [modules.get(value.producer()) for value in node.inputs if value and value.producer()]
                modules[node] = next((module for module in makers if module), None)
        fixed = {id(value) for value in (*graph.inputs, *graph.outputs)}
        seen: Counter[str] = Counter()
        for node in graph:
            stem = f"{modules[node] or 'model'}/{node.op_type}"
            seen[stem] += 1
            node.name = stem if seen[stem] == 1 else f"{stem}_{seen[stem]}"
            for index, value in enumerate(node.outputs):
                if id(value) not in fixed:
                    value.name = node.name if len(node.outputs) == 1 else f"{node.name}:{index}"
                value.metadata_props.clear()
            node.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        graph.metadata_props.clear()
        model.metadata_props.clear()
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """Check that every node has a name of its own that leads to a module."""
        names = [node.name for node in model.graph]
        if len(set(names)) != len(names) or any(not name or "/" not in name for name in names):
            raise ir.passes.PostconditionError("node names are not unique or lead to no module")

    def _module(self, node: ir.Node) -> str | None:
        module = node.metadata_props.get(MODULE, "")
        # What the tracer adds on its own, a symbolic size say, comes from no module of the program.
        if not module.startswith(self.prefix):
            return None
        return module.removeprefix(self.prefix).removeprefix(".") or None


def _common_parent(modules: list[str]) -> str | None:
    """Return the innermost module that holds all of these, or None where there is none."""
    if not modules:
        return None
    paths = [module.split(".") for module in modules]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared) or None
