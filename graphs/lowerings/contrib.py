"""Lowering `contrib`: `com.microsoft::LinearAttention`, which ONNX Runtime has kernels for."""

import onnx_ir as ir

from tnllm_export.graphs.lowerings.around import suit_onnxruntime
from tnllm_export.graphs.lowerings.linear_attention import LowerToLinearAttention


def lower(model: ir.Model) -> None:
    """Replace the two ops by ONNX Runtime's LinearAttention, in place."""
    LowerToLinearAttention(domain="com.microsoft")(model)
    suit_onnxruntime(model)
