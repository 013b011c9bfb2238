"""Lightning attention: the chunk op and the robust recurrent decode step."""

from tnllm_export.kernels.lightning_attention.op import (
    lightning_attention,
    lightning_attention_step,
    lightning_attention_step_in_place,
)

__all__ = ["lightning_attention", "lightning_attention_step", "lightning_attention_step_in_place"]
