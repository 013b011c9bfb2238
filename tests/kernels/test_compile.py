"""Kernels become machine code for every architecture without a GPU."""

import pytest

pytest.importorskip("triton")

from tnllm_export.errors import PluginBuildError
from tnllm_export.kernels import compile as ahead_of_time
from tnllm_export.kernels.compile import SHARED_BYTES, compile_table
from tnllm_export.kernels.compiled import INTEGERS, MAPS, POINTERS, UNUSED
from tnllm_export.kernels.lightning_attention.hopper_launch import BLOCK_COLUMNS
from tnllm_export.kernels.lightning_attention.hopper_launch import CHUNK as CHUNK_TOKENS
from tnllm_export.kernels.lightning_attention.step_plan import STEP_PROGRAMS, step_tile
from tnllm_export.kernels.lightning_attention.sweep_plan import (
    RECOMPUTE_CHUNKS,
    hopper_tiles,
    sweep_plan,
    sweep_tile,
)

CHUNK, STEP = "LightningAttention", "LightningAttentionStep"


@pytest.mark.slow
def test_every_architecture_has_all_kernels_that_a_plan_may_choose():
    reports = []
    table = compile_table(tuple(SHARED_BYTES), ((32, 16),), ("bfloat16",), progress=lambda *a: reports.append(a))
    assert (table.recompute_chunks, table.step_programs) == (RECOMPUTE_CHUNKS, STEP_PROGRAMS)
    assert reports[-1][1] == reports[-1][2] == len(table.kernels)
    for sm in SHARED_BYTES:
        kernels = [kernel for kernel in table.kernels if kernel.compute_capability == sm]
        chunk = {kernel.handover: kernel for kernel in kernels if kernel.op == CHUNK}
        step = {kernel.value_block: kernel for kernel in kernels if kernel.op == STEP}
        assert len(chunk) + len(step) == len(kernels)
        tile = sweep_tile(32, 16, "bfloat16", sm)
        assert {kernel.long_segment for kernel in chunk.values()} == {tile.long_segment}
        plans = [sweep_plan([tile], heads, 16, T, 100) for heads in (1, 8, 1000) for T in (1, 300, 30000)]
        assert {plan.handover for _, plan in plans} == chunk.keys()
        assert {step_tile(32, 16, heads, 100).value_block for heads in (1, 1_000_000)} == step.keys()
        for kernel in kernels:
            assert kernel.cubin.startswith(b"\x7fELF")
            # The ELF header's flags name the architecture.
            flags = int.from_bytes(kernel.cubin[48:52], "little")
            assert sm in (flags & 0xFF, flags >> 8 & 0xFF)
            assert kernel.entry.encode() in kernel.cubin
            assert kernel.shared_bytes <= SHARED_BYTES[sm]
            assert set(kernel.arguments) <= {*POINTERS, *INTEGERS}
            assert kernel.arguments[-2:] == ("scratch", "profile_scratch")
            assert list(kernel.arguments) == sorted(
                kernel.arguments, key=lambda name: ("scratch" in name, (*POINTERS, *INTEGERS).index(name))
            )
            # From Hopper on, this kernel makes its tensor maps on the device.
            assert (kernel.scratch_bytes > 0) == (kernel.op == CHUNK and sm >= 90)
            assert kernel.scratch_alignment >= 1
            assert kernel.overlaps == (kernel.op == STEP and sm >= 90)
    assert len({kernel.cubin for kernel in table.kernels}) == len(table.kernels)


@pytest.mark.slow
def test_the_widest_released_heads_fit_where_memory_is_small_and_where_tensor_cores_are_new():
    # On 10.0 a larger tile compiles to a kernel that only traps.
    table = compile_table((86, 100), ((256, 128),), ("bfloat16",))
    assert len(table.kernels) == 2 * (3 + 2)
    assert min(len(kernel.cubin) for kernel in table.kernels if kernel.op == CHUNK) > 20_000


def test_hopper_has_its_own_kernel_for_the_released_head_sizes():
    table = compile_table((90,), ((64, 128), (80, 128), (128, 128), (256, 128)), ("bfloat16",))
    kernels = [kernel for kernel in table.kernels if kernel.op == CHUNK]
    found = {(kernel.key_dim, kernel.value_block, kernel.entry) for kernel in kernels}
    own = {(64, 128), (128, 128), (128, 64), (256, 64)}
    assert found == {(80, 64, "sweep_kernel"), *((*sizes, "sweep_hopper_kernel") for sizes in own)}
    assert len(kernels) == 3 * len(found)
    for kernel in table.kernels:
        own = kernel.entry == "sweep_hopper_kernel"
        assert (kernel.scratch_bytes > 0) == (kernel.op == CHUNK and not own)
        assert set(kernel.arguments) <= {*POINTERS, *MAPS, UNUSED, *INTEGERS}
        assert [name for name in kernel.arguments if name in MAPS] == (list(MAPS) if own else [])
        assert kernel.arguments[-2:] == ("scratch", "profile_scratch")


def test_the_plan_and_the_kernel_for_hopper_name_the_same_sizes():
    hopper = pytest.importorskip("tnllm_export.kernels.lightning_attention.hopper_buffers")
    arithmetic = pytest.importorskip("tnllm_export.kernels.lightning_attention.hopper_arithmetic")
    assert (hopper.C.value, hopper.HALF.value) == (CHUNK_TOKENS, BLOCK_COLUMNS)
    tiles = {(K, tile.parts): tile for K in (64, 128, 256) for tile in hopper_tiles(K, 128, "bfloat16")}
    assert set(tiles) == {(64, 1), (128, 1), (128, 2), (256, 2)}
    for (K, parts), tile in tiles.items():
        assert tile.chunk == hopper.C.value
        assert tile.value_block == hopper.halves_of(parts) * hopper.HALF.value
        assert (tile.stages, tile.state_stages) == (hopper.stages_of(K), hopper.walk_stages_of(K))
        assert 1 - 2 ** arithmetic.shorter(K) == pytest.approx(tile.walk_cost)


def test_missing_triton_and_unknown_architectures_are_named(monkeypatch):
    with pytest.raises(
        PluginBuildError, match="found compute capability 75; expected some of 80, 86, 89, 90, 100, 120"
    ):
        compile_table((75, 80), ((16, 16),), ("float32",))
    monkeypatch.setattr(ahead_of_time, "find_spec", lambda name: None)
    with pytest.raises(PluginBuildError, match=r"found no Triton.*pip install"):
        compile_table((80,), ((16, 16),), ("float32",))


def test_a_kernel_that_needs_too_much_shared_memory_is_named(monkeypatch):
    monkeypatch.setitem(SHARED_BYTES, 80, 16)
    with pytest.raises(PluginBuildError, match=r"in float32 with K = 16 and V = 16 .* capability 80: found \d+ bytes"):
        compile_table((80,), ((16, 16),), ("float32",), workers=1)


def test_what_triton_cannot_compile_is_named(monkeypatch):
    monkeypatch.setattr(ahead_of_time, "key_block", lambda K: 17)
    with pytest.raises(PluginBuildError, match=r"Triton could not compile it .*power of 2"):
        compile_table((80,), ((16, 16),), ("float32",), workers=1)


def test_a_compiler_that_dies_is_named(monkeypatch):
    monkeypatch.setattr(ahead_of_time, "_WORKER", "this")  # prints, and ends
    with pytest.raises(PluginBuildError, match="the compiler's process ended"):
        compile_table((80,), ((16, 16),), ("float32",), workers=1)
