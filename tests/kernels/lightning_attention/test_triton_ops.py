"""The ops that go into packages, against the recurrence in float64, and the form without a loop."""

from pathlib import Path

import pytest
import torch

from tnllm_export.kernels.compile import SHARED_BYTES
from tnllm_export.kernels.lightning_attention.blocked import lightning_attention_blocked
from tnllm_export.kernels.lightning_attention.loop_free import lightning_attention_loop_free
from tnllm_export.kernels.lightning_attention.reference import (
    lightning_attention_reference,
    lightning_attention_step_reference,
)

# Of the output and of the state, as in test_sweep.py.
TOLERANCE = {torch.float32: (2e-6, 2e-6), torch.float16: (5e-4, 2e-5), torch.bfloat16: (2.0**-7, 3e-5)}
DTYPES = tuple(TOLERANCE)

# B, T, H, K, V, chunks of a segment: one token, part of a chunk, several segments, head sizes that are no powers of two
CASES = [(1, 1, 2, 16, 16, 1), (2, 63, 1, 48, 16, 2), (3, 130, 2, 32, 48, 1), (1, 200, 1, 16, 32, 3)]


@pytest.mark.parametrize(("B", "T", "H", "K", "V"), [(1, 1, 2, 16, 16), (2, 63, 3, 32, 16), (3, 1300, 2, 16, 32)])
def test_without_a_loop_the_answer_is_that_of_the_blocked_form(chunk_inputs, relative_error, B, T, H, K, V):
    inputs = chunk_inputs(B, T, H, K, V)
    for found, expected in zip(
        lightning_attention_loop_free(*inputs), lightning_attention_blocked(*inputs), strict=True
    ):
        assert relative_error(found, expected) < 1e-6


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "T", "H", "K", "V", "segment"), CASES)
def test_the_packaged_chunk_op_agrees_with_the_recurrence(
    chunk_inputs, relative_error, in_float64, device, B, T, H, K, V, segment, dtype
):
    ops = pytest.importorskip("tnllm_export.kernels.lightning_attention.triton_ops")
    inputs = [tensor.to(device) for tensor in chunk_inputs(B, T, H, K, V, dtype)]
    plan = (16, 16, 4, 1, 1, segment)
    found = ops.lightning_attention_packaged(*inputs, *plan)
    expected = lightning_attention_reference(*in_float64(inputs))
    assert found[0].dtype == dtype
    output_tolerance, state_tolerance = TOLERANCE[dtype]
    assert relative_error(found[0], expected[0]) < output_tolerance
    assert relative_error(found[1], expected[1]) < state_tolerance
    for b, length in enumerate(inputs[5].tolist()):
        assert found[0][b, length:].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "H", "K", "V"), [(1, 2, 16, 16), (3, 1, 48, 80)])
def test_the_packaged_step_writes_the_new_state_over_the_old_one(
    step_inputs, relative_error, in_float64, device, B, H, K, V, dtype
):
    ops = pytest.importorskip("tnllm_export.kernels.lightning_attention.triton_ops")
    inputs = [tensor.to(device) for tensor in step_inputs(B, H, K, V, dtype)]
    expected = lightning_attention_step_reference(*in_float64(inputs))
    output = ops.lightning_attention_step_packaged(*inputs, 16, 2)
    assert relative_error(output, expected[0]) < TOLERANCE[dtype][0]
    assert relative_error(inputs[4], expected[1]) < 2e-6


def test_kernels_of_packages_fit_and_need_no_memory_of_ours(lines_of):
    pytest.importorskip("triton")
    lines = lines_of(Path(__file__).with_name("compile_triton_ops.py"))
    assert len(lines) == 6
    for line in lines:
        assert line["scratch_bytes"] == 0, line
        assert line["shared_bytes"] <= SHARED_BYTES[line["sm"]], line
        assert line["spilled_bytes"] <= 64, line
