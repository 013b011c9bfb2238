"""Compiles the layer's kernels for bfloat16, 2048 wide in heads of 128, and prints one JSON line for each."""

import json
import re
import subprocess
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tnllm_export.kernels.layer.triton_kernels import gate, glu, heads, norm
from tnllm_export.kernels.layer.triton_kernels.rows import launch_for

WIDTH, HEAD_DIM = 2048, 128
ALIGNED = [["tt.divisibility", 16]]
TYPES = {"theta_ptr": "*fp32", "dtheta_ptr": "*fp32", "positions_ptr": "*i64"}


def compile_kernel(name: str, kernel: Any, constants: dict[str, Any], warps: int, sm: int) -> None:
    signature, attributes = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        signature[argument] = TYPES.get(argument, "*bf16" if argument.endswith("_ptr") else "i32")
        if argument not in ("R", "inner"):
            attributes[(index,)] = ALIGNED
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps})
    ptx = compiled.asm["ptx"]
    line = {
        "name": name,
        "sm": sm,
        "cubin_bytes": len(compiled.asm["cubin"]),
        "loads": sorted(set(re.findall(r"\bld\.global\.((?:v\d\.)?b\d+)", ptx))),
        "stores": sorted(set(re.findall(r"\bst\.global\.((?:v\d\.)?b\d+)", ptx))),
        "spilled_bytes": spilled_bytes(compiled.asm["cubin"]),
    }
    print(json.dumps(line))


def spilled_bytes(cubin: bytes) -> int:
    """Stack that a thread takes: registers that did not fit."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return int(stack)


def main() -> None:
    for sm in (80, 90):
        for module in (norm, gate):
            for direction, table, kernel in (
                ("forward", module.FORWARD, module.forward_kernel),
                ("backward", module.BACKWARD, module.backward_kernel),
            ):
                launch = launch_for(table, WIDTH)
                constants = launch.constants(WIDTH, 1e-6)
                warps = constants.pop("num_warps")
                compile_kernel(f"{module.__name__} {direction}", kernel, constants, warps, sm)
        tile = glu.BACKWARD
        compile_kernel("glu backward", glu.backward_kernel, {"BLOCK": tile.elements}, tile.warps, sm)
        for rotate in (False, True):
            for direction, table, kernel in (
                ("forward", heads.FORWARD, heads.forward_kernel),
                ("backward", heads.BACKWARD, heads.backward_kernel),
            ):
                tile = table[rotate]
                constants = {"D": HEAD_DIM, "BD": HEAD_DIM, "BT": tile.elements // HEAD_DIM, "ROTATE": rotate}
                if direction == "backward":
                    constants["LEARN"] = rotate
                if not rotate:
                    constants |= {"theta_ptr": None, "positions_ptr": None}
                compile_kernel(f"heads {direction} {rotate}", kernel, constants, tile.warps, sm)


if __name__ == "__main__":
    main()
