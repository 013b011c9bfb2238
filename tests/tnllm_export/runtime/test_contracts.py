"""What holds for every runtime: cutting, batching, padding and moving a state change nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tnllm_export.runtime import Runtime, State

# Other shapes add the same float32 products in another order, a few roundings of 6e-8 per layer.
TOLERANCE = 5e-6


def ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def feed(runtime: Runtime, input_ids: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, State]:
    B, T = input_ids.shape
    if lengths is None:
        lengths = torch.full((B,), T, dtype=torch.int32)
    return runtime.prefill(input_ids, lengths, torch.zeros(B, dtype=torch.int64), runtime.initial_state(B))


def feed_in_pieces(runtime: Runtime, input_ids: Tensor, cuts: list[int]) -> tuple[Tensor, State]:
    B, T = input_ids.shape
    state = runtime.initial_state(B)
    logits = torch.empty(0)
    for start, end in zip([0, *cuts], [*cuts, T], strict=True):
        lengths = torch.full((B,), end - start, dtype=torch.int32)
        positions = torch.full((B,), start)
        logits, state = runtime.prefill(input_ids[:, start:end], lengths, positions, state)
    return logits, state


def decode_all(runtime: Runtime, input_ids: Tensor, position: int, state: State) -> tuple[Tensor, State]:
    B, T = input_ids.shape
    logits = torch.empty(0)
    for t in range(T):
        logits, state = runtime.decode(input_ids[:, t : t + 1], torch.full((B,), position + t), state)
    return logits, state


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert expected.abs().max() > 0
    return float((found - expected).norm() / expected.norm())


def assert_same(runtime: Runtime, found: tuple[Tensor, State], expected: tuple[Tensor, State]) -> None:
    assert error(found[0], expected[0]) < TOLERANCE
    states = zip(runtime.host_state(found[1]), runtime.host_state(expected[1]), strict=True)
    for layer, (one, other) in enumerate(states):
        assert error(one, other) < TOLERANCE, f"state of layer {layer}"


@pytest.mark.parametrize("tokens", [2, 63, 257])
def test_a_prompt_in_pieces_answers_as_the_whole(runtime: Runtime, tokens: int) -> None:
    input_ids = ids(2, tokens)
    whole = feed(runtime, input_ids)
    for cuts in ([1], [tokens // 2] if tokens > 3 else [], [64, 128] if tokens > 128 else []):
        assert_same(runtime, feed_in_pieces(runtime, input_ids, cuts), whole)


@settings(max_examples=10, deadline=None)
@given(cuts=st.sets(st.integers(1, 99)))
def test_any_cuts_answer_as_the_whole(runtime: Runtime, cuts: set[int]) -> None:
    input_ids = ids(1, 100)
    assert_same(runtime, feed_in_pieces(runtime, input_ids, sorted(cuts)), feed(runtime, input_ids))


def test_each_sequence_of_a_batch_answers_as_alone(runtime: Runtime) -> None:
    input_ids = ids(3, 70)
    logits, state = feed(runtime, input_ids)
    for row in range(3):
        alone, alone_state = feed(runtime, input_ids[row : row + 1])
        assert error(logits[row], alone[0]) < TOLERANCE
        for one, other in zip(runtime.host_state(state), runtime.host_state(alone_state), strict=True):
            assert error(one[row], other[0]) < TOLERANCE


def test_the_order_of_a_batch_changes_nothing(runtime: Runtime) -> None:
    input_ids = ids(3, 20)
    order = torch.tensor([2, 0, 1])
    logits, _ = feed(runtime, input_ids)
    reordered, _ = feed(runtime, input_ids[order])
    assert error(reordered, logits[order]) < TOLERANCE


@pytest.mark.parametrize("filler", [0, 96])
def test_padding_changes_neither_logits_nor_state(runtime: Runtime, filler: int) -> None:
    lengths = torch.tensor([5, 66, 1], dtype=torch.int32)
    input_ids = ids(3, 67)
    for row, length in enumerate(lengths.tolist()):
        input_ids[row, length:] = filler
    logits, state = feed(runtime, input_ids, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, alone_state = feed(runtime, input_ids[row : row + 1, :length])
        assert error(logits[row], alone[0]) < TOLERANCE
        for one, other in zip(runtime.host_state(state), runtime.host_state(alone_state), strict=True):
            assert error(one[row], other[0]) < TOLERANCE


def test_a_row_of_length_zero_keeps_its_state_bit_for_bit(runtime: Runtime) -> None:
    _, state = feed(runtime, ids(2, 9))
    before = runtime.host_state(state)
    lengths = torch.tensor([0, 4], dtype=torch.int32)
    _, after = runtime.prefill(ids(2, 4, seed=1), lengths, torch.tensor([9, 9]), state)
    for one, other in zip(runtime.host_state(after), before, strict=True):
        assert torch.equal(one[0], other[0])
        assert not torch.equal(one[1], other[1])


@pytest.mark.parametrize(("prompt", "decoded"), [(1, 1), (63, 3), (64, 70)])
def test_prefill_then_decode_answers_as_one_long_prefill(runtime: Runtime, prompt: int, decoded: int) -> None:
    input_ids = ids(2, prompt + decoded)
    _, state = feed(runtime, input_ids[:, :prompt])
    assert_same(runtime, decode_all(runtime, input_ids[:, prompt:], prompt, state), feed(runtime, input_ids))


def test_a_state_taken_to_the_host_and_back_goes_on_bit_for_bit(runtime: Runtime) -> None:
    _, state = feed(runtime, ids(2, 33))
    moved = runtime.device_state(runtime.host_state(state))
    more = ids(2, 5, seed=1)
    logits, state = decode_all(runtime, more, 33, state)
    moved_logits, moved = decode_all(runtime, more, 33, moved)
    assert torch.equal(logits, moved_logits)
    for one, other in zip(runtime.host_state(state), runtime.host_state(moved), strict=True):
        assert torch.equal(one, other)


def test_prefill_leaves_the_state_it_was_given_as_it_was(runtime: Runtime) -> None:
    _, state = feed(runtime, ids(2, 6))
    before = runtime.host_state(state)
    arguments = (ids(2, 6, seed=1), torch.tensor([6, 6], dtype=torch.int32), torch.tensor([6, 6]))
    first, _ = runtime.prefill(*arguments, state)
    second, _ = runtime.prefill(*arguments, state)
    assert torch.equal(first, second)
    assert all(torch.equal(one, other) for one, other in zip(runtime.host_state(state), before, strict=True))


def test_two_sequences_decoded_in_turns_do_not_disturb_each_other(runtime: Runtime) -> None:
    one, other = ids(1, 12), ids(1, 12, seed=1)
    expected = [decode_all(runtime, tokens, 0, runtime.initial_state(1))[0] for tokens in (one, other)]
    states = [runtime.initial_state(1), runtime.initial_state(1)]
    logits = [torch.empty(0), torch.empty(0)]
    for t in range(12):
        for which, tokens in enumerate((one, other)):
            logits[which], states[which] = runtime.decode(tokens[:, t : t + 1], torch.tensor([t]), states[which])
    assert torch.equal(logits[0], expected[0])
    assert torch.equal(logits[1], expected[1])


def test_logits_stay_as_they_are_while_decoding_goes_on(runtime: Runtime) -> None:
    _, state = feed(runtime, ids(1, 3))
    first, state = runtime.decode(ids(1, 1), torch.tensor([3]), state)
    kept = first.clone()
    for t in range(3):
        _, state = runtime.decode(ids(1, 1, seed=t), torch.tensor([4 + t]), state)
    assert torch.equal(first, kept)


def test_a_copy_of_a_state_does_not_follow_it(runtime: Runtime) -> None:
    _, state = feed(runtime, ids(1, 3))
    copy = runtime.host_state(state)
    kept = [tensor.clone() for tensor in copy]
    decode_all(runtime, ids(1, 4), 3, state)
    assert all(torch.equal(one, other) for one, other in zip(copy, kept, strict=True))


def test_the_state_has_the_same_size_after_any_number_of_tokens(runtime: Runtime) -> None:
    config = runtime.info.config
    for tokens in (1, 200):
        _, state = feed(runtime, ids(2, tokens))
        shapes = [tuple(tensor.shape) for tensor in runtime.host_state(state)]
        assert shapes == [config.state_shape(layer, 2) for layer in range(config.decoder_layers)]
