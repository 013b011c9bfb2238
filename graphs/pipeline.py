"""From a traced program to a finished ONNX graph: translate, lower, tidy up, name, attach weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass
from torch import Tensor

from tnllm_export.graphs.lowerings import LOWERINGS
from tnllm_export.graphs.passes.external_weights import ExternalWeight, ExternalWeights
from tnllm_export.graphs.passes.name_dims import NameDims
from tnllm_export.graphs.passes.name_nodes import NameNodes
from tnllm_export.graphs.passes.optimize import Optimize
from tnllm_export.graphs.passes.set_opset import SetOpset
from tnllm_export.graphs.passes.unroll_layers import UnrollLayers
from tnllm_export.graphs.traced import TracedProgram
from tnllm_export.graphs.translate import translate
from tnllm_export.kernels.contract import NAMESPACE, OPSET_VERSION

DOMAINS = {NAMESPACE: OPSET_VERSION, "com.microsoft": 1}


@dataclass(frozen=True)
class Program:
    """A traced program and the names that its graph shall have.

    Attributes:
        traced: What was traced.
        input_names: Graph inputs, in order.
        output_names: Graph outputs, in order.
        module_prefix: Name under which the program holds the model; not part of any name in the graph.
        weight_names: Parameter and buffer names of the program, and the initializer name of each.
        constants: Values of initializers that stay in the graph, by initializer name.
        layer_kinds: Which of the program's layers each layer of the graph is like; see `UnrollLayers`.
    """

    traced: TracedProgram
    input_names: Sequence[str]
    output_names: Sequence[str]
    module_prefix: str
    weight_names: Mapping[str, str]
    constants: Mapping[str, Tensor]
    layer_kinds: Sequence[int]


def build_graph(program: Program, lowering: str, weights: Mapping[str, ExternalWeight]) -> ir.Model:
    """Make the ONNX graph of a program.

    Args:
        program: The traced program.
        lowering: "contrib", "standard", "matmul", "plugin" or "hybrid".
        weights: Where each weight will lie; no weight is read.

    Returns:
        A model that passes onnx.checker once the weights file is beside it.

    Raises:
        ExportError: The program could not be translated.
    """
    chosen = LOWERINGS[lowering]
    model = translate(
        program.traced,
        input_names=program.input_names,
        output_names=program.output_names,
        weight_names=program.weight_names,
    )
    chosen.lower(model)
    Optimize()(model)
    for tidy in (
        RemoveUnusedNodesPass(),
        NameDims("batch", "time"),
        NameNodes(program.module_prefix),
        UnrollLayers(program.layer_kinds),
        TopologicalSortPass(),
        SetOpset(chosen.opset, DOMAINS),
    ):
        tidy(model)
    # Only now, so that nothing large was folded into the graph: decay masks of every layer, say.
    for name, tensor in program.constants.items():
        model.graph.initializers[name].const_value = ir.tensor(tensor.numpy(), name=name)
    ExternalWeights(weights)(model)
    model.producer_name = "tnllm-export"
    model.producer_version = None
    return model
