"""A table of kernels that are no code, and the library around them: enough for all that runs without a GPU."""

from itertools import product
from pathlib import Path

from filelock import FileLock

from tests.workers import shared_folder
from tnllm_export.kernels.compiled import CompiledKernel, KernelTable
from tnllm_export.kernels.lightning_attention.sweep_plan import RECOMPUTE_CHUNKS
from tnllm_export.plugins.library import build_library

CAPABILITIES = (80, 86, 120)
HEAD_SIZES = ((32, 16), (16, 16), (96, 48), (48, 48))
"""K and V of the tiny model and of the demo model, with and without LRPE."""

COSTS = {48: 1.0, 16: 0.5}
"""Time of a chunk by the columns of a program."""

WALKS = {48: 0.4, 16: 0.3}
"""Of one that is walked."""

CHUNK_ARGUMENTS = (
    *("query", "key", "value", "slope_rate", "past_state", "lengths", "output", "present_state", "carry", "progress"),
    *("T", "H", "query_stride_b", "past_stride_k", "scratch", "profile_scratch"),
)
MAP_ARGUMENTS = (
    *("query_map", *["unused"] * 8, "key_map", *["unused"] * 8, "value_map", *["unused"] * 8, "output_map"),
    *(*["unused"] * 8, "output", "slope_rate", "past_state", "lengths", "present_state", "carry", "progress"),
    *("T", "H", "output_stride_b", "output_stride_t", "scratch", "profile_scratch"),
)
"""Of a kernel that loads and stores by tensor maps."""

STEP_ARGUMENTS = (
    *("query", "key", "value", "slope_rate", "past_state", "output", "present_state"),
    *("H", "query_stride_b", "query_stride_h", "scratch", "profile_scratch"),
)


def fake_table() -> KernelTable:
    kernels = []
    for capability, dtype, (K, V) in product(CAPABILITIES, ("float32", "float16", "bfloat16"), HEAD_SIZES):
        # One architecture has a choice of tiles.
        for block, handover in product((48, 16) if capability == 120 else (16,), ("none", "recompute", "lookback")):
            kernels.append(fake("LightningAttention", capability, dtype, K, V, block, 64, handover, CHUNK_ARGUMENTS))
        for block in (16, 32, 64):
            kernels.append(fake("LightningAttentionStep", capability, dtype, K, V, block, 1, "none", STEP_ARGUMENTS))
    return KernelTable(tuple(kernels), recompute_chunks=RECOMPUTE_CHUNKS, step_programs=16)


def fake(op, capability, dtype, K, V, block, chunk, handover, arguments) -> CompiledKernel:
    return CompiledKernel(
        op=op,
        compute_capability=capability,
        dtype=dtype,
        key_dim=K,
        value_dim=V,
        key_block=1 << (K - 1).bit_length(),
        value_block=block,
        chunk=chunk,
        handover=handover,
        programs_per_processor=2,
        answer_cost=COSTS.get(block, 1.0),
        walk_cost=WALKS.get(block, 1.0),
        handover_cost=3.0,
        long_segment=100,
        entry=f"{op}_{handover}_{block}",
        cubin=f"no code for {capability} {dtype}".encode(),
        warps=4,
        overlaps=op == "LightningAttentionStep" and capability >= 90,
        shared_bytes=1 << 16,
        scratch_bytes=512 if capability == 120 else 0,
        scratch_alignment=128,
        arguments=arguments,
    )


def fake_library(base: Path) -> Path:
    """Compile the library once for all workers."""
    cache = shared_folder(base) / "plugin-cache"
    with FileLock(f"{cache}.lock"):
        return build_library(fake_table(), cache=cache)
