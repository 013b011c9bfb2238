"""Compiles kernel variants: one line of JSON in, one line of JSON out, until the input ends. See `compile.py`."""

import base64
import json
import os
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tnllm_export.kernels.contract import LIGHTNING_ATTENTION
from tnllm_export.kernels.lightning_attention.step_kernel import step_kernel
from tnllm_export.kernels.lightning_attention.sweep import sweep_kernel

_ELEMENT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_POINTERS = {"p_slope_rate": "*fp32", "p_lengths": "*i32", "p_progress": "*i32", "p_carry": "*fp32"}
_STATES = ("p_past_state", "p_present_state")
_ALIGNED = [["tt.divisibility", 16]]


def compile_variant(variant: dict[str, Any]) -> dict[str, Any]:
    """Compile one variant and return what `CompiledKernel` has besides."""
    if variant["op"] == LIGHTNING_ATTENTION.onnx_name and variant["kernel"] == "hopper":
        return _answer(*_compile_hopper(variant), variant)
    kernel, constants = _kernel(variant)
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = _pointer(name, variant["dtype"])
            attributes[(index,)] = _ALIGNED
        else:
            # From one sequence of a batch to the next may be more than 2^31 elements.
            signature[name] = "i64" if name.endswith("_stride_b") else "i32"
            if "stride" in name:  # rows of heads are multiples of 16
                attributes[(index,)] = _ALIGNED
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attributes)
    target = GPUTarget("cuda", variant["compute_capability"], 32)
    compiled = triton.compile(source, target=target, options={"num_warps": variant["compiled_warps"]})
    # Triton's own two come last.
    arguments = [name.removeprefix("p_") for name in signature if signature[name] != "constexpr"]
    return _answer(compiled, [*arguments, "scratch", "profile_scratch"], variant)


def _answer(compiled: Any, arguments: list[str], variant: dict[str, Any]) -> dict[str, Any]:
    metadata = compiled.metadata
    _check(compiled.asm["ptx"], metadata, variant, len(arguments))
    return {
        "entry": metadata.name,
        "cubin": base64.b64encode(compiled.asm["cubin"]).decode(),
        "shared_bytes": metadata.shared,
        "scratch_bytes": metadata.global_scratch_size,
        "scratch_alignment": metadata.global_scratch_align,
        "arguments": arguments,
    }


def _kernel(variant: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the function and its constants."""
    if variant["op"] != LIGHTNING_ATTENTION.onnx_name:
        return step_kernel, _step_constants(variant)
    return sweep_kernel, _sizes(variant) | _chunk_constants(variant) | _tile_constants(variant)


def _compile_hopper(variant: dict[str, Any]) -> tuple[Any, list[str]]:
    # Gluon comes with this version of Triton or another one: only who needs it imports it.
    from tnllm_export.kernels.lightning_attention.hopper_launch import compile_hopper  # noqa: PLC0415
    from tnllm_export.kernels.lightning_attention.sweep_hopper import sweep_hopper_kernel  # noqa: PLC0415

    constants = _sizes(variant) | _chunk_constants(variant) | {"PARTS": variant["parts"]}
    known = {name: value for name, value in constants.items() if name in sweep_hopper_kernel.arg_names}
    return compile_hopper(sweep_hopper_kernel, known)


def _pointer(name: str, dtype: str) -> str:
    return _POINTERS.get(name) or ("*fp32" if name in _STATES else f"*{_ELEMENT[dtype]}")


def _sizes(variant: dict[str, Any]) -> dict[str, Any]:
    """Head sizes and the strides that follow from them."""
    K, V = variant["key_dim"], variant["value_dim"]
    return {"K": K, "V": V, "query_stride_h": K, "key_stride_h": K, "value_stride_h": V}


def _chunk_constants(variant: dict[str, Any]) -> dict[str, Any]:
    K, V = variant["key_dim"], variant["value_dim"]
    states = {
        f"{state}_stride_{axis}": stride
        for state in ("past", "present")
        for axis, stride in (("v", 1), ("k", V), ("h", K * V))
    }
    kind = {"REVERSE": False, "HANDOVER": variant["handover"], "STORE_STATE": True}
    return {**states, **kind, "output_stride_h": V}


def _tile_constants(variant: dict[str, Any]) -> dict[str, Any]:
    return {
        "BK": variant["key_block"],
        "BV": variant["value_block"],
        "C": variant["chunk"],
        "STATE_STAGES": variant["state_stages"],
        "STAGES": variant["stages"],
    }


def _step_constants(variant: dict[str, Any]) -> dict[str, Any]:
    return _sizes(variant) | {"BK": variant["key_block"], "BV": variant["value_block"], "OVERLAP": variant["overlaps"]}


def _check(ptx: str, metadata: Any, variant: dict[str, Any], arguments: int) -> None:
    """Raise RuntimeError where another Triton lays a kernel out in a way that the table has no words for."""
    found = len(
        re.findall(r"^\s*\.param ", ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))], re.MULTILINE)
    )
    if found != arguments:
        raise RuntimeError(f"found {found} kernel parameters, expected {arguments}")
    if "trap;" in ptx:
        raise RuntimeError("found a kernel that only traps: the compiler gave up on this tile")
    before, wait, _ = ptx.partition("griddepcontrol.wait")
    if variant["overlaps"] and (not wait or re.search(r"\b(ld|st|atom|red)\.(\w+\.)*global", before)):
        raise RuntimeError("found a kernel that touches memory before it waits for the one before it")
    if metadata.profile_scratch_size:
        raise RuntimeError("found memory for profiling, expected none")
    if metadata.num_warps != variant["warps"] or getattr(metadata, "num_ctas", 1) != 1:
        raise RuntimeError(f"found {metadata.num_warps} warps, expected {variant['warps']}")


def main() -> None:
    """Answer until there is nothing more to do."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed must not be taken for an answer
    for line in sys.stdin:
        try:
            answer = compile_variant(json.loads(line))
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
            answer = {"error": f"{type(error).__name__}: {lines[-1]}"}  # the first lines of a long one quote the source
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
