"""Compiles the one launch of a backward for released sizes and prints one JSON line for each."""

import json

from tnllm_export.kernels.lightning_attention.backward_hopper import backward_hopper_kernel
from tnllm_export.kernels.lightning_attention.hopper_launch import compile_hopper


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
            compiled, parameters = compile_hopper(backward_hopper_kernel, constants)
            ptx = compiled.asm["ptx"]
            line = {
                "K": K,
                "V": V,
                "parts": parts,
                "handover": handover,
                "shared_bytes": compiled.metadata.shared,
                "scratch_bytes": compiled.metadata.global_scratch_size,
                "products": ptx.count("wgmma.mma_async"),
                "traps": ptx.count("trap;"),
                "maps": sum(name.endswith("_map") for name in parameters),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
