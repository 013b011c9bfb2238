"""Lowering `standard`: `ai.onnx::LinearAttention` of opset 27, a function op that any runtime of that opset has."""

import onnx_ir as ir

from tnllm_export.graphs.lowerings.linear_attention import LowerToLinearAttention


def lower(model: ir.Model) -> None:
    """Replace the two ops by the standard LinearAttention, in place."""
    LowerToLinearAttention(domain="")(model)
