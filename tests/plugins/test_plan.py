"""The C++ rules that choose a kernel, its grid and its workspace are those of the Triton kernels."""

import ctypes
import subprocess
from itertools import product

import pytest

from tests.plugins.fake import COSTS, WALKS
from tnllm_export.kernels.lightning_attention.step_kernel import step_tile
from tnllm_export.kernels.lightning_attention.sweep_plan import SweepTile, sweep_plan
from tnllm_export.plugins.library import SOURCES
from tnllm_export.plugins.table import TABLE, write_table

SHIM = """
#include "plan.h"
using namespace tnllm;
struct Answer { int32_t capability, block, handover; int64_t columns, segments, workspace; };
static Call call(int op, int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, bool inPlace = false)
{
    return Call{Op(op), Dtype::bfloat16, B, T, H, K, V, inPlace};
}
extern "C" bool answer(
    int op, int64_t B, int64_t T, int64_t H, int64_t K, int64_t V, bool inPlace, int32_t sm, int32_t processors,
    Answer* out)
{
    Plan plan{};
    if (!choose(call(op, B, T, H, K, V, inPlace), sm, processors, plan)) return false;
    *out = Answer{plan.kernel->capability, plan.kernel->BV, int32_t(plan.kernel->handover), plan.columns, plan.segments,
        int64_t(plan.workspaceBytes)};
    return true;
}
extern "C" int64_t largest(int op, int64_t B, int64_t T, int64_t H, int64_t K, int64_t V)
{
    return int64_t(largestWorkspace(call(op, B, T, H, K, V)));
}
"""

CHUNK, STEP = 0, 1
HANDOVERS = ("none", "recompute", "lookback")
CALLS = [*product((1, 2, 7, 64), (1, 63, 64, 257, 2048, 16384, 65536), (1, 5, 32))]


class Answer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("capability", "block", "handover")),
        *((name, ctypes.c_int64) for name in ("columns", "segments", "workspace")),
    )


@pytest.fixture(scope="module")
def plans(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    write_table(table, folder)
    (folder / "shim.cpp").write_text(SHIM)
    sources = [SOURCES / "plan.cpp", folder / TABLE, folder / "shim.cpp"]
    command = ["g++", "-std=c++17", "-shared", "-fPIC", f"-I{SOURCES}", *sources, "-o", folder / "shim.so"]
    subprocess.run(command, check=True)
    shim = ctypes.CDLL(str(folder / "shim.so"))
    shim.answer.argtypes = [ctypes.c_int, *[ctypes.c_int64] * 5, ctypes.c_bool, *[ctypes.c_int32] * 2, ctypes.c_void_p]
    shim.answer.restype = ctypes.c_bool
    shim.largest.argtypes = [ctypes.c_int, *[ctypes.c_int64] * 5]
    shim.largest.restype = ctypes.c_int64
    return shim


def ask(shim, op, B, T, H, K, V, capability, processors, in_place=False):
    answer = Answer()
    found = shim.answer(op, B, T, H, K, V, in_place, capability, processors, ctypes.byref(answer))
    return answer if found else None


@pytest.mark.parametrize(("capability", "blocks"), [(86, (16,)), (120, (48, 16))])
@pytest.mark.parametrize("processors", [20, 132])
def test_the_chunk_op_is_cut_as_triton_cuts_it(plans, processors, capability, blocks):
    tiles = [
        SweepTile(
            chunk=64,
            value_block=block,
            warps=4,
            stages=1,
            state_stages=1,
            programs_per_processor=2,
            answer_cost=COSTS[block],
            walk_cost=WALKS[block],
            handover_cost=3.0,
            long_segment=100,
        )
        for block in blocks
    ]
    seen, most_programs = set(), 0
    for B, T, H in CALLS:
        found = ask(plans, CHUNK, B, T, H, 96, 48, capability, processors)
        tile, expected = sweep_plan(tiles, B * H, 48, T, processors)
        assert found.block == tile.value_block
        assert (found.columns, found.segments) == (B * H * (48 // tile.value_block), expected.segments)
        assert HANDOVERS[found.handover] == expected.handover
        seen.add((tile.value_block, expected.handover))
        if expected.segments > 1:
            most_programs = max(most_programs, found.columns * found.segments)
    assert {handover for _, handover in seen} == set(HANDOVERS)
    assert {block for block, _ in seen} == set(blocks)
    # A long call has more programs than fit the device at once.
    assert 2 * processors < most_programs <= 4 * processors


def test_a_state_in_place_is_never_read_by_one_segment_after_another_has_written_it(plans):
    beside_others, alone = set(), set()
    for capability, processors, (B, T, H) in product((86, 120), (20, 132), CALLS):
        beside_others.add(ask(plans, CHUNK, B, T, H, 96, 48, capability, processors).handover)
        alone.add(ask(plans, CHUNK, B, T, H, 96, 48, capability, processors, in_place=True).handover)
    assert {HANDOVERS[kind] for kind in beside_others} == set(HANDOVERS)
    assert {HANDOVERS[kind] for kind in alone} == {"none", "lookback"}


@pytest.mark.parametrize("processors", [20, 132])
def test_the_step_takes_the_block_that_triton_takes(plans, processors):
    seen = set()
    for B, H in product((1, 8, 64, 256, 1024), (1, 5, 32)):
        found = ask(plans, STEP, B, 1, H, 96, 48, 80, processors)
        expected = step_tile(96, 48, B * H, processors)
        assert found.block == expected.value_block
        assert (found.columns, found.segments) == (B * H * -(-48 // found.block), 1)
        seen.add(found.block)
    assert seen == {16, 32, 64}


def test_the_workspace_that_tensorrt_is_asked_for_is_enough_for_every_smaller_call_on_any_gpu(plans):
    B, T, H, K, V = 64, 65536, 32, 96, 48
    most = plans.largest(CHUNK, B, T, H, K, V)
    # A state for each program of a call that is cut: B * H * 3 columns here are too many for that.
    assert most < 64 << 20
    used = 0
    for (b, t, h), capability, processors in product(CALLS, (80, 86, 120), (1, 20, 132, 256)):
        if h == H:
            for in_place in (False, True):
                used = max(used, ask(plans, CHUNK, b, t, h, K, V, capability, processors, in_place).workspace)
    assert 0 < used <= most
    assert plans.largest(STEP, B, 1, H, K, V) >= ask(plans, STEP, B, 1, H, K, V, 120, 132).workspace


@pytest.mark.parametrize(
    ("capability", "runs"), [(80, 80), (86, 86), (89, 86), (87, 86), (120, 120), (121, None), (90, None), (75, None)]
)
def test_a_gpu_runs_code_of_its_own_architecture_only(plans, capability, runs):
    found = ask(plans, STEP, 1, 1, 5, 96, 48, capability, 20)
    assert (found and found.capability) == runs


def test_head_sizes_that_were_not_compiled_are_refused(plans):
    assert ask(plans, CHUNK, 1, 64, 5, 128, 128, 86, 20) is None
    assert plans.largest(CHUNK, 1, 64, 5, 128, 128) == 0
