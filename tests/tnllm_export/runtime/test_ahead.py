"""Steps started before the host has seen the token they feed answer as steps in turns, whatever comes between them."""

import math
from typing import cast

import pytest
import torch
from torch import Tensor

from tests.tnllm_export.runtime.runtimes import make_runtime
from tests.tnllm_export.runtime.states import some_state
from tnllm_export.errors import DeviceMemoryError, PromptError, RequestError, StateError
from tnllm_export.runtime import Runtime, TorchRuntime
from tnllm_export.runtime.ahead import RunsAhead
from tnllm_export.runtime.decode_graphs import MOST_GRAPHS


@pytest.fixture(
    params=[
        pytest.param("torch captured", id="captured"),
        pytest.param("torch-cuda", marks=pytest.mark.gpu),
        pytest.param("aotinductor-cuda", marks=pytest.mark.gpu),
    ]
)
def runtime(request: pytest.FixtureRequest) -> RunsAhead:
    return cast(RunsAhead, make_runtime(request))


def first(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, (batch, 1), generator=generator), torch.arange(batch) + 5 + seed


def in_turns(runtime: Runtime, batch: int, steps: int, seed: int = 0) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy tokens of each step, and the state behind them."""
    state = some_state(runtime, batch, seed)
    ids, positions = first(batch, seed)
    tokens = []
    for _ in range(steps):
        logits, state = runtime.decode(ids, positions, state)
        ids, positions = logits.argmax(-1, keepdim=True), positions + 1
        tokens.append(ids[:, 0].tolist())
    return tokens, runtime.host_state(state)


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """A padded batch adds the same float32 products in another order."""
    for one, other in zip(found, expected, strict=True):
        one, other = one.cpu(), other.cpu()  # noqa: PLW2901
        assert (one - other).norm() < 5e-6 * other.norm()


@pytest.mark.parametrize("batch", [1, 3, 9])
def test_tokens_and_states_are_those_of_steps_in_turns(runtime: RunsAhead, eager: TorchRuntime, batch: int) -> None:
    step, state = runtime.decode_ahead(*first(batch), some_state(runtime, batch))
    steps = [step]
    for _ in range(6):
        step, state = runtime.decode_ahead(None, None, state)
        steps.append(step)
    tokens, expected = in_turns(eager, batch, 7)
    assert [work.wait()[0] for work in steps] == tokens
    assert_close(runtime.host_state(state), expected)
    best, index = steps[-1].logits.max(-1)
    assert steps[-1].wait() == (index.tolist(), best.tolist())


def test_tokens_chosen_from_logits_are_fed_behind_the_step_before(runtime: RunsAhead, eager: TorchRuntime) -> None:
    ids, positions = first(2)
    work, state = runtime.decode_ahead(ids, positions, some_state(runtime, 2))
    expected, other = eager.decode(ids, positions, some_state(eager, 2))
    for behind in range(1, 4):
        assert_close([work.logits], [expected])
        ids = expected.argmin(-1, keepdim=True)
        work, state = runtime.decode_ahead(work.logits.argmin(-1, keepdim=True), None, state)
        expected, other = eager.decode(ids, positions + behind, other)
    assert_close(runtime.host_state(state), eager.host_state(other))


def test_states_in_turns_keep_their_next_tokens(runtime: RunsAhead, eager: TorchRuntime) -> None:
    seeds = (0, 1)
    steps = [runtime.decode_ahead(*first(2, seed), some_state(runtime, 2, seed)) for seed in seeds]
    tokens = [[steps[seed][0].wait()[0]] for seed in seeds]
    for _ in range(3):
        for seed in seeds:
            steps[seed] = runtime.decode_ahead(None, None, steps[seed][1])
            tokens[seed].append(steps[seed][0].wait()[0])
    for seed in seeds:
        expected, state = in_turns(eager, 2, 4, seed)
        assert tokens[seed] == expected
        assert_close(runtime.host_state(steps[seed][1]), state)


def test_a_state_goes_on_ahead_after_its_graph_is_gone(runtime: RunsAhead, eager: TorchRuntime) -> None:
    work, state = runtime.decode_ahead(*first(1), some_state(runtime, 1))
    for batch in (2, 4, 8, 16, 24)[:MOST_GRAPHS]:
        runtime.decode(*first(batch), some_state(runtime, batch))
    further, state = runtime.decode_ahead(None, None, state)
    tokens, expected = in_turns(eager, 1, 2)
    assert [work.wait()[0], further.wait()[0]] == tokens
    assert_close(runtime.host_state(state), expected)


def test_steps_ahead_and_in_turns_mix(runtime: RunsAhead, eager: TorchRuntime) -> None:
    ids, positions = first(3)
    state = some_state(runtime, 3)
    found = []
    for t in range(6):
        if t % 3 == 1:
            logits, state = runtime.decode(ids, positions, state)
            tokens = logits.argmax(-1).tolist()
        else:
            work, state = runtime.decode_ahead(ids, positions, state)
            tokens = work.wait()[0]
        found.append(tokens)
        ids, positions = torch.tensor(tokens)[:, None], positions + 1
    expected, behind = in_turns(eager, 3, 6)
    assert found == expected
    assert_close(runtime.host_state(state), behind)


def test_tokens_that_nobody_has_seen_are_moved_into_the_vocabulary(runtime: RunsAhead) -> None:
    logits = []
    for outside, inside in ((-5, 0), (97, 96)):
        for token in (outside, inside):
            _, state = runtime.decode_ahead(*first(1), some_state(runtime, 1))
            unseen = torch.tensor([[token]], device=runtime.info.device)
            work, _ = runtime.decode_ahead(unseen, None, state)
            logits.append(work.logits.clone())
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[2], logits[3])
    assert not torch.equal(logits[0], logits[2])


def test_logits_that_are_not_finite_are_told_with_a_token_of_the_vocabulary(runtime: RunsAhead) -> None:
    state = runtime.device_state([torch.full_like(x, torch.nan) for x in runtime.host_state(runtime.initial_state(2))])
    tokens, best = runtime.decode_ahead(*first(2), state)[0].wait()
    assert all(0 <= token < 97 for token in tokens)
    assert all(math.isnan(number) for number in best)


@pytest.mark.parametrize("lives", [False, True])
def test_some_sequences_of_a_state_are_copied_and_the_whole_goes_on(runtime: RunsAhead, lives: bool) -> None:
    state = some_state(runtime, 3)
    if lives:
        _, state = runtime.decode_ahead(*first(3), state)
    before = runtime.host_state(state)
    some = runtime.select(state, [2, 0])
    ids, positions = first(2)
    runtime.decode(ids, positions, runtime.select(state, [2, 0]))
    for one, other, whole in zip(runtime.host_state(some), runtime.host_state(state), before, strict=True):
        assert torch.equal(one, whole[[2, 0]])
        assert torch.equal(other, whole)
    for places in ([], [3], [0, -1]):
        with pytest.raises(StateError, match=r"expected at least one, each of 0 … 2"):
            runtime.select(state, places)


def test_what_cannot_run_ahead_is_refused_and_the_state_stays(runtime: RunsAhead, eager: TorchRuntime) -> None:
    state = some_state(runtime, 2)
    ids, positions = first(2)
    with pytest.raises(StateError, match="state has no step under way that chose its next token"):
        runtime.decode_ahead(None, None, state)
    with pytest.raises(StateError, match="expected one from decode_ahead"):
        runtime.decode_ahead(ids, None, state)
    with pytest.raises(RequestError, match="positions given without input_ids"):
        runtime.decode_ahead(None, positions, state)
    with pytest.raises(PromptError, match="token id 97"):
        runtime.decode_ahead(torch.full((2, 1), 97), positions, state)
    with pytest.raises(StateError, match="state has 2 sequences; expected 3"):
        runtime.decode_ahead(*first(3), state)
    _, behind = runtime.decode(ids, positions, state)
    with pytest.raises(StateError, match="has no step under way"):
        runtime.decode_ahead(None, None, behind)
    assert not eager.info.runs_ahead
    with pytest.raises(RequestError, match="torch on cpu does not run ahead"):
        eager.decode_ahead(ids, positions, some_state(eager, 2))


def test_memory_that_ends_at_the_second_capture_leaves_the_state_that_lives_there(
    runtime: RunsAhead, eager: TorchRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80 * 2**30))
    ids, positions = first(2)
    logits, state = runtime.decode(ids, positions, some_state(runtime, 2))
    before = runtime.host_state(state)

    def no_memory(*arguments: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "max", no_memory)
        with pytest.raises(DeviceMemoryError, match="the CUDA graph of decode for 2 sequences"):
            runtime.decode_ahead(logits.argmax(-1, keepdim=True), positions + 1, state)
    assert all(torch.equal(one, other) for one, other in zip(runtime.host_state(state), before, strict=True))
    work, state = runtime.decode_ahead(logits.argmax(-1, keepdim=True), positions + 1, state)
    tokens, expected = in_turns(eager, 2, 2)
    assert work.wait()[0] == tokens[1]
    assert_close(runtime.host_state(state), expected)
