"""Compiles the kernels of packages for released sizes and prints one JSON line for each."""

import json
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tnllm_export.kernels.lightning_attention import triton_ops

HEADS, V = 32, 128
FLOAT32 = ("p_slope_rate", "p_past_state", "p_present_state", "p_state", "p_carry")
INT32 = ("p_lengths", "p_progress")


def compile_kernel(kernel, constants, warps, sm):
    signature, attributes = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument == "T":
            signature[argument] = "i64"
        else:
            signature[argument] = "*fp32" if argument in FLOAT32 else "*i32" if argument in INT32 else "*bf16"
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    line = {
        "name": kernel.__name__,
        "sm": sm,
        "K": constants["K"],
        "spilled_bytes": int(stack),
        "shared_bytes": compiled.metadata.shared,
        "scratch_bytes": compiled.metadata.global_scratch_size,
    }
    print(json.dumps(line))


def main():
    for sm, K in ((80, 128), (90, 128), (90, 256)):
        plan = triton_ops.package_plan(K, V, HEADS, "bfloat16", sm, 132)
        chunk, value_block, warps, stages, state_stages, segment_chunks = plan.chunk
        sizes = {"H": HEADS, "K": K, "V": V, "BK": K}
        constants = {
            **sizes,
            "BV": value_block,
            "C": chunk,
            "SEGMENT_CHUNKS": segment_chunks,
            "STATE_STAGES": state_stages,
            "STAGES": stages,
        }
        compile_kernel(triton_ops.packaged_sweep_kernel, constants, warps, sm)
        compile_kernel(triton_ops.packaged_step_kernel, {**sizes, "BV": plan.step[0]}, plan.step[1], sm)


if __name__ == "__main__":
    main()
