"""The ops against the token-by-token recurrence in float64."""

import pytest
import torch

from tnllm_export.kernels.lightning_attention import lightning_attention, lightning_attention_step
from tnllm_export.kernels.lightning_attention.reference import (
    lightning_attention_reference,
    lightning_attention_step_reference,
)

# float32 sums of up to a few hundred terms; half dtypes round the output once (2^-9, 2^-12) and the inputs not at all.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
SHAPES = [(1, 1, 1, 16, 16), (2, 63, 3, 16, 32), (1, 64, 2, 48, 16), (3, 257, 4, 32, 16)]


def relative_error(found, reference):
    assert found.shape == reference.shape
    assert reference.norm() > 0
    return ((found.double() - reference.double()).norm() / reference.double().norm()).item()


def in_float64(inputs):
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_chunk_op_computes_the_recurrence(chunk_inputs, shape, dtype):
    inputs = chunk_inputs(*shape, dtype)
    output, state = lightning_attention(*inputs)
    expected_output, expected_state = lightning_attention_reference(*in_float64(inputs))
    assert output.dtype == dtype
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(output, expected_output) < TOLERANCE[dtype]
    # The state is never rounded to the activations' dtype.
    assert relative_error(state, expected_state) < min(TOLERANCE[dtype], 2e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_decode_step_computes_one_token_of_the_recurrence(step_inputs, dtype):
    inputs = step_inputs(3, 4, 32, 16, dtype)
    output, state = lightning_attention_step(*inputs)
    expected_output, expected_state = lightning_attention_step_reference(*in_float64(inputs))
    assert relative_error(output, expected_output) < TOLERANCE[dtype]
    assert relative_error(state, expected_state) < min(TOLERANCE[dtype], 2e-6)


def test_padding_gives_zero_and_changes_no_state_even_where_it_is_not_finite(chunk_inputs):
    query, key, value, slope_rate, past_state, _ = chunk_inputs(2, 100, 2, 16, 16)
    lengths = torch.tensor([100, 37], dtype=torch.int32)
    clean_output, clean_state = lightning_attention(query, key, value, slope_rate, past_state, lengths)
    for tensor in (query, key, value):
        tensor[1, 37:] = float("nan")
    output, state = lightning_attention(query, key, value, slope_rate, past_state, lengths)
    assert torch.equal(output, clean_output)
    assert torch.equal(state, clean_state)
    assert output[1, 37:].count_nonzero() == 0


def test_a_row_without_tokens_keeps_its_state(chunk_inputs):
    *inputs, past_state, _ = chunk_inputs(2, 65, 2, 16, 16)
    _, state = lightning_attention(*inputs, past_state, torch.tensor([0, 65], dtype=torch.int32))
    assert torch.equal(state[0], past_state[0])
    assert not torch.equal(state[1], past_state[1])


def test_lengths_beyond_the_end_mean_all_tokens(chunk_inputs):
    *inputs, _ = chunk_inputs(2, 65, 2, 16, 16)
    full, beyond = (torch.tensor(lengths, dtype=torch.int32) for lengths in ([65, 65], [66, 500]))
    for found, expected in zip(lightning_attention(*inputs, beyond), lightning_attention(*inputs, full), strict=True):
        assert torch.equal(found, expected)


def test_no_tokens_at_all_is_allowed(chunk_inputs):
    inputs = chunk_inputs(2, 0, 2, 16, 32)
    output, state = lightning_attention(*inputs)
    assert output.shape == (2, 0, 2, 32)
    assert torch.equal(state, inputs[4])


def test_results_share_no_memory_with_inputs(chunk_inputs, step_inputs):
    for op, inputs in (
        (lightning_attention, chunk_inputs(1, 0, 2, 16, 16)),
        (lightning_attention, chunk_inputs(1, 3, 2, 16, 16)),
        (lightning_attention_step, step_inputs(1, 2, 16, 16)),
    ):
        _, state = op(*inputs)
        assert state.data_ptr() != inputs[4].data_ptr()


def test_pieces_equal_the_whole(chunk_inputs):
    inputs = chunk_inputs(1, 300, 3, 32, 16)
    query, key, value, slope_rate, past_state, _ = inputs
    output, state = lightning_attention(*inputs)
    pieces, carried = [], past_state
    for start, stop in ((0, 64), (64, 192), (192, 300)):
        lengths = torch.tensor([stop - start], dtype=torch.int32)
        piece, carried = lightning_attention(
            query[:, start:stop], key[:, start:stop], value[:, start:stop], slope_rate, carried, lengths
        )
        pieces.append(piece)
    # Cut at chunk borders, the same numbers are added in the same order.
    assert torch.equal(torch.cat(pieces, 1), output)
    assert torch.equal(carried, state)


def test_strongest_decay_neither_overflows_nor_loses_the_current_token(chunk_inputs):
    query, key, value, _, past_state, lengths = chunk_inputs(1, 300, 1, 16, 16)
    output, state = lightning_attention(query, key, value, torch.tensor([200.0]), past_state, lengths)
    scores = (query * key).sum(-1, keepdim=True)
    assert torch.allclose(output, scores * value, atol=1e-6)
    assert torch.isfinite(state).all()


@pytest.mark.parametrize("shape", [(2, 70, 2, 16, 32), (1, 1, 1, 16, 16)])
def test_gradients_equal_those_of_the_recurrence(chunk_inputs, shape):
    inputs = chunk_inputs(*shape, torch.float64)
    differentiable = [tensor.requires_grad_() for tensor in inputs[:5]]
    grads = []
    for op in (lightning_attention, lightning_attention_reference):
        output, state = op(*inputs)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        loss = (output * weights).sum() + (state * state).sum()
        grads.append(torch.autograd.grad(loss, differentiable))
    for found, expected in zip(*grads, strict=True):
        assert relative_error(found, expected) < 1e-12


def test_gradients_in_float32_are_as_good_as_the_forward_pass(chunk_inputs):
    inputs = chunk_inputs(2, 257, 3, 32, 16)
    grads = []
    for tensors in (inputs, in_float64(inputs)):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:5]]
        output, state = lightning_attention(*leaves, tensors[5])
        grads.append(torch.autograd.grad(output.square().sum() + state.square().sum(), leaves))
    for found, expected in zip(*grads, strict=True):
        assert relative_error(found, expected) < 1e-5


def test_ops_keep_the_rules_of_torch_library(chunk_inputs, step_inputs):
    inputs = chunk_inputs(2, 70, 2, 16, 32)
    chunk, step = torch.ops.tnllm.lightning_attention.default, torch.ops.tnllm.lightning_attention_step.default
    torch.library.opcheck(chunk, inputs)
    strided = [inputs[0].transpose(1, 2).contiguous().transpose(1, 2), *inputs[1:]]
    torch.library.opcheck(chunk, [tensor.requires_grad_() for tensor in strided[:5]] + strided[5:])
    torch.library.opcheck(step, step_inputs(2, 2, 16, 32))


@pytest.mark.parametrize(
    ("index", "replacement", "message"),
    [
        (0, torch.zeros(2, 5, 2), "query has shape"),
        (1, torch.zeros(2, 5, 2, 17), "key has shape"),
        (2, torch.zeros(2, 4, 2, 16), "value has shape"),
        (3, torch.zeros(3), "slope_rate has shape"),
        (4, torch.zeros(2, 2, 16, 17), "past_state has shape"),
        (5, torch.zeros(3, dtype=torch.int32), "lengths has shape"),
        (5, torch.zeros(2, dtype=torch.int64), "lengths is torch.int64; expected torch.int32"),
        (1, torch.zeros(2, 5, 2, 16, dtype=torch.float16), "key is torch.float16"),
        (4, torch.zeros(2, 2, 16, 16, dtype=torch.float16), "past_state is torch.float16"),
        (4, torch.zeros(2, 2, 16, 16, device="meta"), "past_state is on meta; expected cpu like query"),
        (5, torch.zeros(2, dtype=torch.int32, device="meta"), "lengths is on meta; expected cpu like query"),
    ],
)
def test_inputs_that_break_the_contract_are_named(chunk_inputs, index, replacement, message):
    inputs = chunk_inputs(2, 5, 2, 16, 16)
    inputs[index] = replacement
    with pytest.raises((ValueError, TypeError), match=message):
        lightning_attention(*inputs)


def test_step_inputs_that_break_the_contract_are_named(step_inputs):
    inputs = step_inputs(2, 2, 16, 16)
    with pytest.raises(ValueError, match="value has shape"):
        lightning_attention_step(*inputs[:2], torch.zeros(2, 3, 16), *inputs[3:])
    with pytest.raises(TypeError, match=r"query is torch\.int32"):
        lightning_attention_step(inputs[0].to(torch.int32), *inputs[1:])
