"""Lowering `plugin`: the two ops stay single nodes of the domain `tnllm`, with the `matmul` form as function body.

A runtime with our plugin runs the node; one without inlines the body.
"""

import onnx_ir as ir

from tnllm_export.graphs.lowerings.functions import add_functions
from tnllm_export.graphs.lowerings.matmul import LightningAttention, LightningAttentionStep


def lower(model: ir.Model) -> None:
    """Add the function bodies of the ops in use, in place."""
    add_functions(model, LightningAttention, LightningAttentionStep)
