"""The compiled library on a GPU against float64: sizes, lengths, dtypes, pieces."""

import pytest
import torch

from tests.kernels.lightning_attention.test_gpu import AGAINST_BLOCKED, FLOAT32, HALF, STATE
from tests.plugins.on_gpu import CHUNK, DTYPES, HEAD_SIZES, STEP, draw, relative_error, run, wide
from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.kernels.lightning_attention import lightning_attention, lightning_attention_step
from tnllm_export.kernels.lightning_attention.blocked import lightning_attention_blocked
from tnllm_export.kernels.lightning_attention.reference import (
    lightning_attention_reference,
    lightning_attention_step_reference,
)

pytestmark = pytest.mark.gpu

# B, T, H: one segment, some that are recomputed, look-backs over short and long ones; few columns and many.
SHAPES = (
    *((1, 1, 5), (3, 63, 2), (2, 64, 3), (64, 257, 3), (3, 1024, 2)),
    *((1, 4096, 2), (5, 4999, 1), (64, 2048, 1), (1, 16384, 3), (2, 16383, 1)),
)
RECURRENCE_TOKENS = 257
"""Up to so many tokens the recurrence itself is the reference; above, its blocked form."""


def check(inputs, *results):
    dtype, T = inputs[0].dtype, inputs[0].shape[1]
    reference = lightning_attention_reference if T <= RECURRENCE_TOKENS else lightning_attention_blocked
    expected, expected_state = reference(*wide(inputs))
    with use_kernels("pytorch"):
        blocked, _ = lightning_attention(*inputs)
    limit = min(HALF, AGAINST_BLOCKED * relative_error(blocked, expected))
    shape = (*inputs[0].shape, inputs[2].shape[3])
    for output, state in results:
        error, state_error = relative_error(output, expected), relative_error(state, expected_state)
        print(f"{dtype} {shape}: output {error:.2e}, state {state_error:.2e}")
        assert error <= (FLOAT32 if dtype == torch.float32 else limit), shape
        assert state_error <= (FLOAT32 if dtype == torch.float32 else STATE), shape
        for b, length in enumerate(inputs[5].tolist()):
            assert output[b, length:].count_nonzero() == 0, shape


@pytest.mark.parametrize(("K", "V"), HEAD_SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_is_right_for_all_lengths_and_batches(plugins, dtype, K, V):
    beside, in_place = plugins.create(CHUNK), plugins.create(CHUNK, {"in_place": 1})
    for B, T, H in SHAPES:
        inputs = draw(CHUNK, B, T, H, K, V, dtype)
        check(inputs, run(beside, inputs), run(in_place, inputs, in_place=True))


@pytest.mark.gpu(alone=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_batch_of_the_longest_prompts_is_right(plugins, dtype):
    inputs = draw(CHUNK, 64, 16384, 1, 256, 128, dtype)
    check(inputs, run(plugins.create(CHUNK), inputs))


@pytest.mark.parametrize(("K", "V"), HEAD_SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_is_right_in_place_and_beside(plugins, dtype, K, V):
    plugin = plugins.create(STEP)
    for B, H in ((1, 5), (3, 32), (64, 8), (64, 33)):
        inputs = draw(STEP, B, 1, H, K, V, dtype)
        expected, expected_state = lightning_attention_step_reference(*wide(inputs))
        output, state = run(plugin, inputs)
        error, state_error = relative_error(output, expected), relative_error(state, expected_state)
        print(f"{dtype} {(B, H, K, V)}: output {error:.2e}, state {state_error:.2e}")
        assert error <= (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
        assert state_error <= 1e-6
        in_place, in_place_state = run(plugin, inputs, in_place=True)
        assert torch.equal(in_place, output)
        assert torch.equal(in_place_state, state)


@pytest.mark.parametrize("op", [CHUNK, STEP])
def test_the_plugin_gives_the_bits_of_the_kernels_that_triton_launches(plugins, op):
    function = lightning_attention if op == CHUNK else lightning_attention_step
    for T in (1, 257, 16384):
        inputs = draw(op, 2, T, 4, 128, 128, torch.bfloat16)
        with use_kernels("triton"):
            expected = function(*inputs)
        for found, reference in zip(run(plugins.create(op), inputs), expected, strict=True):
            assert torch.equal(found, reference)


def test_a_prompt_in_pieces_and_tokens_continues_as_one(plugins):
    query, key, value, slope_rate, past_state, _ = draw(CHUNK, 1, 4096, 4, 128, 128, torch.bfloat16)
    chunk, step = plugins.create(CHUNK), plugins.create(STEP)

    def piece(start, stop, state):
        rows = [x[:, start:stop].contiguous() for x in (query, key, value)]
        return run(chunk, [*rows, slope_rate, state, torch.tensor([stop - start], dtype=torch.int32, device="cuda")])

    whole, whole_state = piece(0, 4096, past_state)
    outputs, state = [], past_state
    for start, stop in ((0, 1000), (1000, 1001), (1001, 4090)):
        output, state = piece(start, stop, state)
        outputs.append(output)
    for t in range(4090, 4096):
        output, state = run(step, [x[:, t].contiguous() for x in (query, key, value)] + [slope_rate, state])
        outputs.append(output[:, None])
    assert relative_error(torch.cat(outputs, 1), whole) <= HALF
    assert relative_error(state, whole_state) <= STATE


@pytest.mark.gpu(alone=True)
def test_batches_of_more_than_two_to_the_31_elements_are_right(plugins):
    B, T, H, D = 2, (1 << 19) + 100, 32, 128
    x = 0.2 * torch.randn(B, T, H, D, dtype=torch.bfloat16, device="cuda")
    assert x.stride(0) > 1 << 31
    # So fast a decay that only the last tokens matter for the last tokens.
    slope_rate = torch.linspace(0.05, 1, H, device="cuda")
    past_state = torch.randn(B, H, D, D, device="cuda")
    lengths = torch.tensor([T, T - 37], dtype=torch.int32, device="cuda")
    output, state = run(plugins.create(CHUNK), [x, x, x, slope_rate, past_state, lengths])
    tail = x[:, -2048:].double()
    wanted = (tail, tail, tail, slope_rate.double(), torch.zeros_like(past_state).double(), lengths - (T - 2048))
    expected, expected_state = lightning_attention_blocked(*wanted)
    assert relative_error(output[:, -1024:], expected[:, -1024:]) <= HALF
    assert relative_error(state, expected_state) <= STATE
