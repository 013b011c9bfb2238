"""What stands around the two ops, in graphs for ONNX Runtime: in the form that costs its CUDA provider few kernels."""

import onnx_ir as ir

from tnllm_export.graphs.passes.fusible_norm import FusibleNorm
from tnllm_export.graphs.passes.keep_wide import KeepWide
from tnllm_export.graphs.passes.shared_time import SharedTime


def suit_onnxruntime(model: ir.Model) -> None:
    """Rewrite norms, casts and sizes of a lowered model, in place."""
    for tidy in (FusibleNorm(), KeepWide(), SharedTime()):
        tidy(model)
