"""Putting the ops whose kernels go into a package in the place of those that call kernels of ours."""

import operator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from tnllm_export.kernels.contract import LIGHTNING_ATTENTION, LIGHTNING_ATTENTION_STEP, NAMESPACE
from tnllm_export.kernels.lightning_attention.sweep_plan import Activation
from tnllm_export.kernels.lightning_attention.triton_ops import (
    PackagePlan,
    lightning_attention_packaged,
    lightning_attention_step_packaged,
    package_plan,
)

_OPS = getattr(torch.ops, NAMESPACE)
_ACTIVATIONS: dict[torch.dtype, Activation] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def use_triton_ops(program: ExportedProgram, capability: int, processors: int) -> ExportedProgram:
    """Replace both ops in a program as torch.export has traced it, in place, and return it.

    A decode step that is followed by a copy of the new state into the old one becomes a step in place.

    Args:
        program: It is not functional yet: it has `copy_` nodes.
        capability: Of the GPU, 90 for 9.0.
        processors: Its multiprocessors.
    """
    graph = program.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is getattr(_OPS, LIGHTNING_ATTENTION.torch_name).default:
            node.target = lightning_attention_packaged._opoverload
            node.args = (*node.args, *_plan(node, capability, processors).chunk)
        elif node.target is getattr(_OPS, LIGHTNING_ATTENTION_STEP.torch_name).default:
            _step_in_place(graph, node, _plan(node, capability, processors).step)
    graph.lint()
    program.graph_module.recompile()
    return program


def _plan(node: Node, capability: int, processors: int) -> PackagePlan:
    query, value = _example(node.args[0]), _example(node.args[2])
    K, V, H = int(query.shape[-1]), int(value.shape[-1]), int(query.shape[-2])
    return package_plan(K, V, H, _ACTIVATIONS[query.dtype], capability, processors)


def _step_in_place(graph: Graph, node: Node, plan: tuple[int, ...]) -> None:
    """Replace a step, (output, present_state), and the copy of its state, by a step in place, output."""
    state = node.args[4]
    with graph.inserting_before(node):
        output = graph.call_function(lightning_attention_step_packaged._opoverload, (*node.args, *plan))
    for item in list(node.users):
        assert item.target is operator.getitem
        if item.args[1] == 0:
            output.meta = dict(item.meta)
            item.replace_all_uses_with(output)
        else:
            for copy in list(item.users):
                assert copy.target is torch.ops.aten.copy_.default
                assert copy.args == (state, item)
                assert not copy.users
                graph.erase_node(copy)
        graph.erase_node(item)
    graph.erase_node(node)


def _example(argument: Any) -> Any:
    return argument.meta["val"]
