"""The rest of the layer: SRMSNorm, the gate u ⊙ N(o), the split into heads with SiLU and LRPE, and SGLU's product."""

from tnllm_export.kernels.layer.form import fused
from tnllm_export.kernels.layer.gate import gated_norm
from tnllm_export.kernels.layer.glu import glu_product
from tnllm_export.kernels.layer.heads import rotate, split_heads
from tnllm_export.kernels.layer.norm import srmsnorm

__all__ = ["fused", "gated_norm", "glu_product", "rotate", "split_heads", "srmsnorm"]
