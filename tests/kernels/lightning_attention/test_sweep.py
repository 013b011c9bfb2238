"""The sweep kernel, each way to cut it, against the recurrence in float64."""

import pytest
import torch

pytest.importorskip("triton")

from tnllm_export.kernels.lightning_attention import lightning_attention
from tnllm_export.kernels.lightning_attention.chunk import sweep
from tnllm_export.kernels.lightning_attention.reference import lightning_attention_reference
from tnllm_export.kernels.lightning_attention.sweep_plan import (
    RECOMPUTE_CHUNKS,
    WALK_COST,
    SweepPlan,
    SweepTile,
    sweep_plan,
)

# The interpreter computes with numpy, which warns of what is masked afterwards.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")

# Output and state. float32: sums of a few hundred terms. The halves: the output is rounded once, 2^-11 and 2^-8 at
# most, and bfloat16 is cut off, 2^-7, by Triton's interpreter; products of wide numbers are taken in two parts, 2^-16.
TOLERANCE = {torch.float32: (2e-6, 2e-6), torch.float16: (5e-4, 2e-5), torch.bfloat16: (2.0**-7, 3e-5)}

# B, T, H, K, V, C, BV, hand-over, segments
CUTS = [
    (1, 1, 1, 16, 16, 16, 16, "none", 1),
    (3, 63, 1, 48, 32, 32, 16, "none", 1),
    (2, 257, 1, 16, 48, 16, 32, "none", 1),
    (3, 63, 2, 32, 16, 16, 16, "recompute", 2),
    (2, 257, 1, 80, 16, 32, 16, "recompute", 3),
    (3, 63, 1, 16, 32, 16, 16, "lookback", 4),
    (3, 257, 1, 16, 80, 32, 64, "lookback", 5),
    (1, 257, 2, 48, 16, 16, 16, "lookback", 4),
    (1, 40, 1, 16, 16, 16, 16, "lookback", 7),
]


def reverse_reference(query, key, value, slope_rate, past_state, lengths):
    """The sweep from the last valid token to the first: o_t = q_tᵀ G_t, G_t = exp(-s) G_{t+1} + k_t v_tᵀ."""
    output = torch.zeros_like(value)
    state = past_state.clone()
    decay = torch.exp(-slope_rate)[:, None, None]
    for b, length in enumerate(lengths.tolist()):
        for t in reversed(range(length)):
            carried = state[b] + key[b, t, :, :, None] * value[b, t, :, None, :]
            output[b, t] = (query[b, t, :, :, None] * carried).sum(-2)
            state[b] = decay * carried
    return output, state


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("dtype", "reverse"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, False), (torch.bfloat16, True)],
    ids=["float32-forward", "float32-reverse", "float16-forward", "bfloat16-reverse"],
)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_cut_computes_the_recurrence(chunk_inputs, in_float64, relative_error, device, cut, dtype, reverse):
    B, T, H, K, V, C, BV, handover, segments = cut
    inputs = chunk_inputs(B, T, H, K, V, dtype)
    if B == 3:
        inputs[5][1] = 0
    reference = reverse_reference if reverse else lightning_attention_reference
    expected_output, expected_state = reference(*in_float64(inputs))
    inputs = [x.to(device) for x in inputs]
    output, state = torch.full_like(inputs[2], torch.nan), torch.full_like(inputs[4], torch.nan)
    tile = SweepTile(chunk=C, value_block=BV, warps=4, stages=1, state_stages=1, programs_per_processor=1)
    plan = SweepPlan(handover, segments)
    sweep(*inputs, output, state, reverse=reverse, tile=tile, plan=plan)
    output_tolerance, state_tolerance = TOLERANCE[dtype]
    assert relative_error(output, expected_output) < output_tolerance
    assert relative_error(state, expected_state) < state_tolerance
    for b, length in enumerate(inputs[5].tolist()):
        assert output[b, length:].count_nonzero() == 0


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("handover", ["none", "recompute", "lookback"])
def test_lengths_are_cut_to_the_tokens_that_are_there(chunk_inputs, device, handover):
    *inputs, _ = (x.to(device) for x in chunk_inputs(3, 70, 1, 16, 16))
    tile = SweepTile(chunk=16, value_block=16, warps=4, stages=1, state_stages=1, programs_per_processor=1)
    plan = SweepPlan(handover, 1 if handover == "none" else 3)
    results = []
    for lengths in ([70, 0, 0], [1000, -1, -1000]):
        output, state = torch.full_like(inputs[2], torch.nan), torch.full_like(inputs[4], torch.nan)
        sweep(*inputs, torch.tensor(lengths, dtype=torch.int32, device=device), output, state, tile=tile, plan=plan)
        results.append((output, state))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[1][1][1:], inputs[4][1:])
    assert results[1][0][0].isfinite().all()


@pytest.mark.usefixtures("triton")
def test_tensors_of_any_strides_and_alignment_are_read_right(chunk_inputs, device):
    query, key, value, slope_rate, past_state, _ = (x.to(device) for x in chunk_inputs(2, 40, 2, 16, 16))
    lengths = torch.tensor([40], dtype=torch.int32, device=device).expand(2)

    def run(*inputs):
        output, state = torch.full_like(value, torch.nan), torch.full_like(past_state, torch.nan)
        sweep(*inputs, output, state)
        return output, state

    def misaligned(x):
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    def odd_rows(x):
        return torch.nn.functional.pad(x, (0, 1))[..., :16]

    plain = run(query, key, value, slope_rate, past_state, lengths.contiguous())
    heads_first = query.transpose(1, 2).contiguous().transpose(1, 2)
    columns_first = key.transpose(2, 3).contiguous().transpose(2, 3)
    every_second = slope_rate.repeat_interleave(2)[::2]
    transposed = past_state.mT.contiguous().mT
    strange = (heads_first, columns_first, misaligned(value), every_second, transposed, lengths)
    for found, expected in zip(run(*strange), plain, strict=True):
        assert torch.equal(found, expected)
    strange = (
        odd_rows(query),
        misaligned(key),
        odd_rows(value),
        misaligned(slope_rate),
        misaligned(past_state),
        lengths,
    )
    for found, expected in zip(run(*strange), plain, strict=True):
        assert torch.equal(found, expected)
    one = value[:1, :1, :1]
    expanded = run(query, key, one.expand(value.shape), slope_rate, past_state[:1, :1].expand_as(past_state), lengths)
    copied = run(
        query, key, one.repeat(2, 40, 2, 1), slope_rate, past_state[:1, :1].repeat(2, 2, 1, 1), lengths.contiguous()
    )
    for found, expected in zip(expanded, copied, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("triton")
def test_nothing_to_do_is_allowed(chunk_inputs, device):
    for B, T, H in ((2, 0, 2), (0, 5, 2), (2, 5, 0)):
        query, key, value, slope_rate, past_state, _ = chunk_inputs(2, 5, 2, 16, 16)
        inputs = [query[:B, :T, :H], key[:B, :T, :H], value[:B, :T, :H], slope_rate[:H], past_state[:B, :H]]
        inputs = [x.to(device) for x in inputs]
        output, state = torch.full_like(inputs[2], torch.nan), torch.full_like(inputs[4], torch.nan)
        sweep(*inputs, torch.full((B,), T, dtype=torch.int32, device=device), output, state)
        assert torch.equal(state, inputs[4])


@pytest.mark.parametrize("T", [1, 64, 65, 2048, 2049, 1 << 20, (1 << 31) - 1])
@pytest.mark.parametrize("columns", [1, 64, 100_000])
def test_a_plan_has_no_more_segments_than_chunks_or_room(T, columns):
    tile = SweepTile(chunk=32, value_block=32, warps=4, stages=1, state_stages=1, programs_per_processor=2)
    _, plan = sweep_plan([tile], columns, 32, T, processors=132)
    assert 1 <= plan.segments <= min(-(-T // 32), 4 * 132)
    assert (plan.handover == "none") == (plan.segments == 1)
    if plan.handover == "recompute":
        left = (1 - WALK_COST) ** plan.segments
        assert -(-T // 32) * WALK_COST * left / (1 - WALK_COST) / (1 - left) >= 0.5
        assert T <= 32 * RECOMPUTE_CHUNKS


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("strides", [(1 << 32, 1 << 32, 1 << 28, 1), (1 << 32, 1 << 32, 1, 1 << 28)], ids=str)
def test_rows_of_a_state_may_be_more_than_2_to_the_31_numbers_apart(chunk_inputs, device, far_apart, strides):
    *activations, past_state, lengths = (x.to(device) for x in chunk_inputs(1, 20, 1, 16, 16))
    leaves = [x.requires_grad_() for x in activations[:3]]
    results = []
    for state in (past_state, far_apart(past_state, strides)):
        output, present_state = lightning_attention(*activations, state, lengths)
        results.append((output, present_state, *torch.autograd.grad(output.sum(), leaves)))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)
