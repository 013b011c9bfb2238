"""Lowering `hybrid`: matrix products for the chunk op, `com.microsoft::LinearAttention` for the decode step.

Each program has one of the two ops, so prefill gets the form of `matmul` and decode that of `contrib`. ONNX Runtime's
CUDA kernel of LinearAttention walks a prompt token by token, but makes a single step in one launch.
"""

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from tnllm_export.graphs.lowerings.around import suit_onnxruntime
from tnllm_export.graphs.lowerings.functions import add_functions
from tnllm_export.graphs.lowerings.linear_attention import LowerToLinearAttention
from tnllm_export.graphs.lowerings.matmul import LightningAttention


def lower(model: ir.Model) -> None:
    """Replace the two ops, each by its own form, in place."""
    add_functions(model, LightningAttention)
    InlinePass()(model)
    LowerToLinearAttention(domain="com.microsoft")(model)
    suit_onnxruntime(model)
