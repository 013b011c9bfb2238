"""Compiles the decode kernels for sm_90 and the 7B model in bfloat16, and prints one JSON line for each."""

import json
import re
import subprocess
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tnllm_export.kernels.decode.matmul import matmul_kernel
from tnllm_export.kernels.decode.matvec import matvec_kernel
from tnllm_export.kernels.decode.plan import ACCESS_BYTES, Cut, Matrix, Vector, cut, token_block
from tnllm_export.kernels.decode.recurrence import recurrence_kernel
from tnllm_export.kernels.decode.rows import normalise_kernel
from tnllm_export.kernels.lightning_attention.step_plan import step_tile

D, HEADS, GLU, VOCAB = 4096, 32, 11008, 64000
PROCESSORS = 132
MAPS = [
    ("norm", "heads", 4 * D, D, True),
    ("norm", "heads", 4 * D, D, False),
    ("gate", "residual", D, D, False),
    ("norm", "product", GLU, D, False),
    ("plain", "residual", D, GLU, False),
    ("norm", "store", VOCAB, D, False),
]
TYPES = {
    "p_theta": "*fp32",
    "p_positions": "*i64",
    "p_parts": "*fp32",
    "p_arrivals": "*i32",
    "p_state": "*fp32",
    "p_slope_rate": "*fp32",
}


def compile_kernel(kernel: Any, constants: dict[str, Any], warps: int, name: str) -> None:
    signature, attributes = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        else:
            wide = argument == "p_output" and constants.get("OUTPUT") == "store"
            signature[argument] = "*fp32" if wide else TYPES.get(argument, "*bf16")
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (registers, stack), *_ = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    before_wait = ptx[: ptx.index("griddepcontrol.wait")]
    line = {
        "name": name,
        "kernel": kernel.fn.__name__,
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "early_loads": len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", before_wait)),
        "early_prefetches": before_wait.count("prefetch.global.L2"),
        "copies": sorted(set(re.findall(r"cp\.async\.c\w\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx))),
        "tensor_cores": "wgmma.mma_async" in ptx,
        "lets_next_start": "griddepcontrol.launch_dependents" in ptx,
    }
    print(json.dumps(line))


def compile_map(sizes: Cut, batch: int, before: str, after: str, N: int, K: int, rotate: bool) -> None:
    constants = {"B": batch, "N": N, "K": K, "HEADS": HEADS, "OUTPUT": after, "ROTATE": rotate, "OVERLAP": True}
    constants |= {"BN": sizes.rows, "BK": sizes.columns}
    name = f"{after} {N} x {K}{', rotated' if rotate else ''}, batch {batch}"
    if isinstance(sizes, Vector):
        constants |= {"INPUT": before, "BB": sizes.tokens, "VEC": ACCESS_BYTES // 2}
        compile_kernel(matvec_kernel, constants, sizes.warps, name)
    else:
        assert isinstance(sizes, Matrix)
        constants |= {"BB": token_block(batch), "SPLIT": sizes.split, "STAGES": sizes.stages}
        compile_kernel(matmul_kernel, constants, sizes.warps, name)


def main() -> None:
    for before, after, N, K, rotate in MAPS:
        for batch in (1, 32):
            compile_map(cut(after, batch, N, K, 2, PROCESSORS), batch, before, after, N, K, rotate)
    for K in (128, 256):
        tile = step_tile(K, 128, HEADS, PROCESSORS)
        constants = {"H": HEADS, "K": K, "V": 128, "BK": K, "BV": tile.value_block, "OVERLAP": True}
        compile_kernel(recurrence_kernel, constants, tile.warps, f"recurrence, K {K}")
    compile_kernel(normalise_kernel, {"D": D, "GATE": True, "BD": D, "OVERLAP": True}, 8, "gate")


if __name__ == "__main__":
    main()
