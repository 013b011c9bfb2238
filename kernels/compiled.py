"""What compiling a kernel ahead of time yields, as data: the seam between Triton and the plugin library.

No Triton here. `plugins/library.py` makes a C++ table of it, and `plugins/src/plan.cpp` chooses and launches.
"""

from dataclasses import dataclass
from typing import Literal

POINTERS = (
    "query",
    "key",
    "value",
    "slope_rate",
    "past_state",
    "lengths",
    "output",
    "present_state",
    "carry",
    "progress",
    "scratch",
    "profile_scratch",
)
"""Arguments that are addresses. The last two are Triton's own, behind all others: global scratch and profiling."""

MAPS = ("query_map", "key_map", "value_map", "output_map")
"""Arguments that are tensor maps (CUtensorMap, 128 bytes) of bfloat16 activations [B, T, H, D]: dimensions from D to B,
blocks of 64 columns and 64 tokens of one head, 128 bytes swizzled, 0 outside."""

UNUSED = "unused"
"""An argument of 64 bits or less that no kernel reads."""

INTEGERS = (
    "T",
    "H",
    *(f"{name}_stride_{axis}" for name in ("query", "key", "value", "output") for axis in "bth"),
    *(f"{name}_stride_{axis}" for name in ("past", "present") for axis in "bhkv"),
)
"""Arguments that are integers: strides of batches (`_stride_b`) of 64 bits, others of 32. Tensors are dense, so strides
follow from B, T, H, K and V."""


DESCRIPTION = "tnllm kernels: "
"""What stands in a plugin library before a line that names its kernels: "86 bfloat16 256x128, …", by compute
capability, dtype, K and V."""


@dataclass(frozen=True)
class CompiledKernel:
    """One variant of one kernel for one compute capability, as `triton.compile` leaves it.

    Pointers are multiples of 16 bytes, and so are the strides of rows: it may be compiled with that knowledge.

    Attributes:
        op: "LightningAttention" or "LightningAttentionStep".
        compute_capability: 80, 86, 89, 90, 100, 120, …
        dtype: Of query, key, value and output.
        key_dim: K.
        value_dim: V.
        key_block: BK.
        value_block: BV; the grid's first axis is B * H * ceil(V / BV).
        chunk: C, tokens per chunk; 1 for the step.
        handover: How segments of tokens get their state; "none" for the step.
        programs_per_processor: By which segments are counted.
        answer_cost: Time of a chunk with its output, relative to that of other tiles for the same sizes.
        walk_cost: Time of a chunk without output, in chunks with it.
        handover_cost: Time of a hand-over among four segments, in chunks with their output.
        long_segment: Chunks from which on segments are cut: halves have so many.
        entry: The kernel's symbol in the cubin.
        cubin: The code.
        warps: Of one program.
        overlaps: It may be launched while the kernel before it ends (programmatic dependent launch), and waits for that
            itself.
        shared_bytes: Dynamic shared memory.
        scratch_bytes: Triton's global scratch per program, 0 without.
        scratch_alignment: Of it.
        arguments: Names of all parameters that the compiled kernel has, in order, from `POINTERS`, `MAPS`, `UNUSED` and
            `INTEGERS`; those that were specialised away are left out.
    """

    op: str
    compute_capability: int
    dtype: Literal["float32", "float16", "bfloat16"]
    key_dim: int
    value_dim: int
    key_block: int
    value_block: int
    chunk: int
    handover: Literal["none", "recompute", "lookback"]
    programs_per_processor: int
    answer_cost: float
    walk_cost: float
    handover_cost: float
    long_segment: int
    entry: str
    cubin: bytes
    warps: int
    overlaps: bool
    shared_bytes: int
    scratch_bytes: int
    scratch_alignment: int
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class KernelTable:
    """All kernels of a library, and the constants of the rules that choose among them.

    Attributes:
        kernels: At least the handover "none" for each op, dtype, K, V and compute capability.
        recompute_chunks: `sweep_plan.RECOMPUTE_CHUNKS`.
        step_programs: `step_plan.STEP_PROGRAMS`.
    """

    kernels: tuple[CompiledKernel, ...]
    recompute_chunks: int
    step_programs: int
