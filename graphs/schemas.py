"""Registration of the two ops' ONNX schemas: without one, the exporter and the checker don't know the domain."""

import onnx
from onnx.defs import OpSchema

from tnllm_export.kernels.contract import LIGHTNING_ATTENTION, LIGHTNING_ATTENTION_STEP, NAMESPACE, OPSET_VERSION

_FIXED_TYPES = {
    "slope_rate": "tensor(float)",
    "past_state": "tensor(float)",
    "present_state": "tensor(float)",
    "lengths": "tensor(int32)",
}


def register_schemas() -> None:
    """Register `tnllm::LightningAttention` and `tnllm::LightningAttentionStep`; calling it again changes nothing."""
    for contract in (LIGHTNING_ATTENTION, LIGHTNING_ATTENTION_STEP):
        if onnx.defs.has(contract.onnx_name, NAMESPACE):
            continue
        onnx.defs.register_schema(
            OpSchema(
                contract.onnx_name,
                NAMESPACE,
                OPSET_VERSION,
                inputs=[OpSchema.FormalParameter(name, _FIXED_TYPES.get(name, "T")) for name in contract.inputs],
                outputs=[OpSchema.FormalParameter(name, _FIXED_TYPES.get(name, "T")) for name in contract.outputs],
                type_constraints=[
                    ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "Dtype of the activations.")
                ],
            )
        )
