"""Compiling the kernels ahead of time, on a machine without a GPU, into the table that a plugin library is made of.

Triton runs in processes of its own (`compile_worker.py`): they work side by side, and this process may have defined the
kernels for Triton's interpreter. Triton's cache makes a second run short.
"""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import product
from queue import SimpleQueue
from typing import IO, Any, cast, get_args

from tnllm_export.errors import PluginBuildError
from tnllm_export.kernels.compiled import CompiledKernel, KernelTable
from tnllm_export.kernels.contract import LIGHTNING_ATTENTION, LIGHTNING_ATTENTION_STEP
from tnllm_export.kernels.lightning_attention.step_plan import (
    OLDEST_OVERLAP,
    STEP_PROGRAMS,
    step_blocks,
    tile_of_block,
)
from tnllm_export.kernels.lightning_attention.sweep_plan import (
    RECOMPUTE_CHUNKS,
    Activation,
    Handover,
    key_block,
    sweep_tiles,
)
from tnllm_export.progress import Progress, silent

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that one program may have, by compute capability (CUDA C++ Programming Guide)."""

_WORKER = "tnllm_export.kernels.compile_worker"

Variant = dict[str, Any]
"""What a worker is told: all fields of a `CompiledKernel` that are known before."""


def compile_table(
    capabilities: Sequence[int],
    head_sizes: Sequence[tuple[int, int]],
    dtypes: Sequence[str],
    *,
    progress: Progress = silent,
    workers: int | None = None,
) -> KernelTable:
    """Compile every variant of both ops that a plan may ask for.

    The grid of the chunk op is [B * H * ceil(V / BV), segments], with segments by
    `sweep_plan.sweep_plan`; that of the step is [B * H * ceil(V / BV)], with BV by `step_plan.step_tile`. The
    hand-over "lookback" takes two buffers: `carry`, float32 [programs, BK, BV], and `progress`, int32 [1 + programs],
    which must be 0, for the programs of the grid. Others are given any address. `scratch` is `scratch_bytes` for each
    program.

    Args:
        capabilities: Compute capabilities, 86 for 8.6, among those of `SHARED_BYTES`.
        head_sizes: Pairs of K and V, multiples of 16 up to 256.
        dtypes: Of activations: "float32", "float16", "bfloat16".
        progress: Told how many are compiled.
        workers: Processes; default: one for each core.

    Raises:
        PluginBuildError: Triton is missing or can't compile a kernel, a capability is unknown, or a kernel needs more
            shared memory than there is.
    """
    if find_spec("triton") is None:
        raise PluginBuildError(
            "found no Triton to compile kernels with; install it: pip install 'tnllm-export[triton]'"
        )
    unknown = [str(capability) for capability in capabilities if capability not in SHARED_BYTES]
    if unknown:
        known = ", ".join(map(str, SHARED_BYTES))
        raise PluginBuildError(f"found compute capability {', '.join(unknown)}; expected some of {known}")
    variants = [
        variant
        for capability, dtype, (K, V) in product(capabilities, dtypes, head_sizes)
        for variant in (*_chunk_variants(capability, dtype, K, V), *_step_variants(capability, dtype, K, V))
    ]
    kernels = []
    with _workers(min(workers or os.cpu_count() or 1, len(variants))) as compile_variant:
        for done, kernel in enumerate(compile_variant(variants)):
            progress("compiling kernels", done, len(variants))
            kernels.append(kernel)
    progress("compiling kernels", len(variants), len(variants))
    return KernelTable(
        kernels=tuple(kernels),
        recompute_chunks=RECOMPUTE_CHUNKS,
        step_programs=STEP_PROGRAMS,
    )


def _chunk_variants(capability: int, dtype: str, K: int, V: int) -> Iterator[Variant]:
    activation = cast(Activation, dtype)
    for tile, handover in product(sweep_tiles(K, V, activation, capability), get_args(Handover)):
        yield {
            "op": LIGHTNING_ATTENTION.onnx_name,
            "compute_capability": capability,
            "dtype": dtype,
            "key_dim": K,
            "value_dim": V,
            "key_block": key_block(K),
            "value_block": tile.value_block,
            "chunk": tile.chunk,
            "handover": handover,
            "programs_per_processor": tile.programs_per_processor,
            "answer_cost": tile.answer_cost,
            "walk_cost": tile.walk_cost,
            "handover_cost": tile.handover_cost,
            "long_segment": tile.long_segment,
            "warps": tile.warps + tile.further_warps,
            "overlaps": False,
            "compiled_warps": tile.warps,
            "stages": tile.stages,
            "state_stages": tile.state_stages,
            "kernel": tile.kernel,
            "parts": tile.parts,
        }


def _step_variants(capability: int, dtype: str, K: int, V: int) -> Iterator[Variant]:
    for block in step_blocks(K, V):
        yield {
            "op": LIGHTNING_ATTENTION_STEP.onnx_name,
            "compute_capability": capability,
            "dtype": dtype,
            "key_dim": K,
            "value_dim": V,
            "key_block": key_block(K),
            "value_block": block,
            "chunk": 1,
            "handover": "none",
            "programs_per_processor": 1,
            "answer_cost": 1.0,
            "walk_cost": 1.0,
            "handover_cost": 0.0,
            "long_segment": 1,
            "warps": tile_of_block(block).warps,
            "overlaps": capability >= OLDEST_OVERLAP,
            "compiled_warps": tile_of_block(block).warps,
        }


@contextmanager
def _workers(count: int) -> Iterator[Callable[[Sequence[Variant]], Iterator[CompiledKernel]]]:
    """Start worker processes; what is given compiles variants on them, in order."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # it would be most of a library
    idle: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
    processes = []
    for _ in range(count):
        process = subprocess.Popen(
            [sys.executable, "-m", _WORKER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        processes.append(process)
        idle.put(process)

    def compile_one(variant: Variant) -> CompiledKernel:
        process = idle.get()
        try:
            return _compile(process, variant)
        finally:
            idle.put(process)

    with ThreadPoolExecutor(max(count, 1)) as threads:
        try:
            yield lambda variants: threads.map(compile_one, variants)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
                process.communicate()


def _compile(process: "subprocess.Popen[str]", variant: Variant) -> CompiledKernel:
    stdin, stdout = cast(IO[str], process.stdin), cast(IO[str], process.stdout)
    name = (
        f"{variant['op']} in {variant['dtype']} with K = {variant['key_dim']} and V = {variant['value_dim']} "
        f"for compute capability {variant['compute_capability']}"
    )
    try:
        stdin.write(json.dumps(variant) + "\n")
        stdin.flush()
        answer = json.loads(stdout.readline())
    except (OSError, ValueError) as error:
        raise PluginBuildError(f"{name}: the compiler's process ended; try again with more memory") from error
    if "error" in answer:
        raise PluginBuildError(
            f"{name}: Triton could not compile it ({answer['error']}); "
            "expected Triton 3.6 or newer, and a cache that can be written (TRITON_CACHE_DIR)"
        )
    limit = SHARED_BYTES[variant["compute_capability"]]
    if answer["shared_bytes"] > limit:
        raise PluginBuildError(
            f"{name}: found {answer['shared_bytes']} bytes of shared memory, expected at most {limit}; "
            "use a smaller tile in sweep_plan.py"
        )
    internal = ("compiled_warps", "stages", "state_stages", "kernel", "parts")
    fields = {name: value for name, value in variant.items() if name not in internal}
    return CompiledKernel(
        **fields,
        entry=answer["entry"],
        cubin=base64.b64decode(answer["cubin"]),
        shared_bytes=answer["shared_bytes"],
        scratch_bytes=answer["scratch_bytes"],
        scratch_alignment=answer["scratch_alignment"],
        arguments=tuple(answer["arguments"]),
    )
