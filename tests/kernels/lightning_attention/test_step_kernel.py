"""The decode step in Triton against the recurrence and against PyTorch's form."""

import pytest
import torch

pytest.importorskip("triton")

from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.kernels.lightning_attention import lightning_attention_step, lightning_attention_step_in_place
from tnllm_export.kernels.lightning_attention.reference import lightning_attention_step_reference
from tnllm_export.kernels.lightning_attention.step import lightning_attention_step_pytorch
from tnllm_export.kernels.lightning_attention.step_kernel import step
from tnllm_export.kernels.lightning_attention.step_plan import StepTile, step_tile

SHAPES = [(1, 1, 16, 16), (3, 2, 48, 80), (2, 3, 128, 16), (2, 1, 16, 256), (1, 2, 256, 128)]
# The output is rounded once; bfloat16 is cut off by Triton's interpreter. The state is float32 whatever comes in.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_step_computes_one_token_of_the_recurrence(step_inputs, in_float64, relative_error, device, shape, dtype):
    inputs = step_inputs(*shape, dtype)
    expected_output, expected_state = lightning_attention_step_reference(*in_float64(inputs))
    output, state = lightning_attention_step(*(x.to(device) for x in inputs))
    assert output.dtype == dtype
    assert relative_error(output, expected_output) < TOLERANCE[dtype]
    assert relative_error(state, expected_state) < 1e-6


@pytest.mark.parametrize("value_block", [16, 32, 64])
def test_a_state_may_be_written_where_it_was_read(step_inputs, device, value_block):
    query, key, value, slope_rate, past_state = (x.to(device) for x in step_inputs(2, 2, 48, 80, torch.float16))
    tile = StepTile(value_block=value_block, warps=4)
    outputs, states = [], []
    for present in (torch.full_like(past_state, torch.nan), past_state.clone()):
        past = past_state if present.isnan().any() else present
        output = torch.full_like(value, torch.nan)
        step(query, key, value, slope_rate, past, output, present, tile=tile)
        outputs.append(output)
        states.append(present)
    assert outputs[0].isfinite().all()
    assert torch.equal(*outputs)
    assert torch.equal(*states)


@pytest.mark.parametrize("form", ["triton", "pytorch"])
def test_the_step_in_place_is_the_step_bit_for_bit(step_inputs, device, form):
    *inputs, past_state = (x.to(device) for x in step_inputs(3, 2, 48, 80, torch.bfloat16))
    with use_kernels(form):
        expected_output, expected_state = lightning_attention_step(*inputs, past_state)
        state = past_state.clone()
        output = lightning_attention_step_in_place(*inputs, state)
    assert torch.equal(output, expected_output)
    assert torch.equal(state, expected_state)
    assert not torch.equal(state, past_state)


def test_a_state_with_gaps_is_not_written_in_place(step_inputs, device):
    *inputs, past_state = (x.to(device) for x in step_inputs(1, 2, 16, 16, torch.float32))
    gaps = past_state.transpose(2, 3)
    with pytest.raises(ValueError, match="expected a contiguous one"):
        lightning_attention_step_in_place(*inputs, gaps)


@pytest.mark.usefixtures("triton")
def test_the_change_of_a_slow_head_is_dithered_as_in_pytorch(step_inputs, device):
    # Products of bfloat16 numbers have nothing below the last place of a state near 1000: only the dither acts there.
    query, key, value, _, past_state = (x.to(device) for x in step_inputs(2, 4, 32, 16, torch.bfloat16))
    slope_rate = torch.tensor([4e-8, 1e-7, 1e-6, 1e-4], device=device)
    past_state = 1000 + past_state
    _, expected = lightning_attention_step_pytorch(query, key, value, slope_rate, past_state)
    _, found = lightning_attention_step(query, key, value, slope_rate, past_state)
    _, undithered = lightning_attention_step_reference(query, key, value, slope_rate, past_state)
    differing = (undithered != expected).float().mean().item()
    assert differing > 0.01
    # A fused multiply-add rounds once where PyTorch rounds twice: now and then that turns the last bit.
    assert (found != expected).float().mean().item() < differing / 2
    assert ((found - expected).abs() <= 2 * torch.finfo(torch.float32).eps * expected.abs()).all()


@pytest.mark.usefixtures("triton")
def test_strides_of_inputs_do_not_matter(step_inputs, device):
    query, key, value, slope_rate, past_state = (x.to(device) for x in step_inputs(2, 3, 16, 32))
    expected = lightning_attention_step(query, key, value, slope_rate, past_state)
    strange = (
        query.transpose(0, 1).contiguous().transpose(0, 1),
        key.mT.contiguous().mT,
        torch.nn.functional.pad(value, (1, 0))[..., 1:],
        slope_rate.repeat_interleave(2)[::2],
        past_state.mT.contiguous().mT,
    )
    for found, reference in zip(lightning_attention_step(*strange), expected, strict=True):
        assert torch.equal(found, reference)


def test_few_heads_are_cut_fine_and_many_wide():
    assert step_tile(128, 128, heads=32, processors=132).value_block == 16
    assert step_tile(128, 128, heads=32 * 8, processors=132).value_block == 16
    assert step_tile(128, 128, heads=32 * 64, processors=132).value_block == 64
    assert step_tile(256, 128, heads=32 * 64, processors=132).value_block == 32
    assert step_tile(16, 16, heads=1, processors=132).value_block == 16


@pytest.mark.usefixtures("triton")
def test_heads_may_be_more_than_2_to_the_31_numbers_apart(step_inputs, device, far_apart):
    query, *others = (x.to(device) for x in step_inputs(1, 3, 16, 16, torch.float16))
    expected = lightning_attention_step(query, *others)
    found = lightning_attention_step(far_apart(query, (1 << 31, 1 << 30, 1)), *others)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
