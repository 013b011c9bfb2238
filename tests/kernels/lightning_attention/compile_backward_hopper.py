"""Compiles the one launch of a backward for released sizes and prints one JSON line for each."""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from tnllm_export.kernels.lightning_attention.backward_hopper import backward_hopper_kernel as kernel

FLOAT32 = ("p_slope_rate", "p_past_state", "p_grad_state", "p_grad_past", "p_carry")
INT32 = ("p_lengths", "p_progress")


def type_of(argument):
    if argument in FLOAT32:
        return "*fp32"
    if argument in INT32:
        return "*i32"
    return "*bf16" if argument.startswith("p_") else "i32"


def main():
    for K, V, parts, sweeps, handovers in (
        (128, 128, 1, 3, ("none", "lookback")),
        (128, 128, 2, 3, ("recompute",)),
        (256, 256, 2, 3, ("none",)),
        (256, 128, 1, 2, ("none",)),
    ):
        for handover in handovers:
            constants = {"K": K, "V": V, "PARTS": parts, "SWEEPS": sweeps, "HANDOVER": handover}
            constants |= {"past_stride_v": 1, "grad_state_stride_v": 1}
            names = list(enumerate(kernel.arg_names))
            signature = {name: "constexpr" if name in constants else type_of(name) for _, name in names}
            attributes = {
                (index,): [["tt.divisibility", 16]]
                for index, name in names
                if name not in constants and (name.startswith("p_") or "stride" in name)
            }
            source = GluonASTSource(
                kernel, signature, {(i,): constants[name] for i, name in names if name in constants}, attributes
            )
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
            ptx = compiled.asm["ptx"]
            line = {
                "K": K,
                "V": V,
                "parts": parts,
                "handover": handover,
                "shared_bytes": compiled.metadata.shared,
                "products": ptx.count("wgmma.mma_async"),
                "traps": ptx.count("trap;"),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
