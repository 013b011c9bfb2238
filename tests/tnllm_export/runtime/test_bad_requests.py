"""Every runtime refuses what makes no sense, in one line, and loses no state by it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tnllm_export.errors import PromptError, RequestError, StateError
from tnllm_export.runtime import Runtime, State, TorchRuntime


def prefill(runtime: Runtime, **changes: object) -> tuple[Tensor, State]:
    arguments: dict[str, object] = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
        "lengths": torch.tensor([3, 2], dtype=torch.int32),
        "positions": torch.tensor([0, 0]),
        "state": runtime.initial_state(2),
    }
    return runtime.prefill(**{**arguments, **changes})  # type: ignore[arg-type]


def decode(runtime: Runtime, **changes: object) -> tuple[Tensor, State]:
    arguments: dict[str, object] = {
        "input_ids": torch.tensor([[5], [8]]),
        "positions": torch.tensor([0, 0]),
        "state": runtime.initial_state(2),
    }
    return runtime.decode(**{**arguments, **changes})  # type: ignore[arg-type]


def message(caught: pytest.ExceptionInfo[Exception]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("call", [prefill, decode])
@pytest.mark.parametrize("token", [97, -1, 2**40])
def test_a_token_id_outside_the_vocabulary_is_named(runtime: Runtime, call: Callable[..., object], token: int) -> None:
    bad = torch.tensor([[5], [token]])
    changes = {"input_ids": bad} if call is decode else {"input_ids": torch.cat((bad, bad), dim=1)}
    if call is prefill:
        changes["lengths"] = torch.tensor([1, 2], dtype=torch.int32)
    with pytest.raises(PromptError) as caught:
        call(runtime, **changes)
    assert f"token id {token} at [1, 0]" in message(caught)
    assert "0 … 96" in message(caught)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"input_ids": torch.zeros(2, 3, dtype=torch.int32)}, "input_ids is torch.int32; expected torch.int64"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "input_ids has shape [3]; expected [B, T]"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, "input_ids has shape [2, 0]"),
        ({"input_ids": [[1, 2, 3]]}, "input_ids is a list"),
        ({"lengths": torch.tensor([3, 2])}, "lengths is torch.int64; expected torch.int32"),
        ({"lengths": torch.tensor([3], dtype=torch.int32)}, "lengths has shape [1]; expected [2]"),
        ({"lengths": torch.tensor([4, 2], dtype=torch.int32)}, "lengths holds 4; expected at most 3"),
        ({"lengths": torch.tensor([3, -1], dtype=torch.int32)}, "lengths holds -1; expected nothing below 0"),
        ({"positions": torch.tensor([0, -3])}, "positions holds -3"),
        ({"positions": torch.tensor([0.0, 1.0])}, "positions is torch.float32"),
        ({"positions": torch.tensor([[0], [0]])}, "positions has shape [2, 1]"),
    ],
)
def test_prefill_names_the_argument_that_does_not_fit(runtime: Runtime, changes: dict[str, object], found: str) -> None:
    with pytest.raises(RequestError) as caught:
        prefill(runtime, **changes)
    assert found in message(caught)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"input_ids": torch.zeros(2, 2, dtype=torch.int64)}, "input_ids has shape [2, 2]; expected [B, 1]"),
        ({"positions": torch.tensor([0])}, "positions has shape [1]; expected [2]"),
        ({"positions": torch.tensor([0, -1])}, "positions holds -1"),
    ],
)
def test_decode_names_the_argument_that_does_not_fit(runtime: Runtime, changes: dict[str, object], found: str) -> None:
    with pytest.raises(RequestError) as caught:
        decode(runtime, **changes)
    assert found in message(caught)


@pytest.mark.parametrize("call", [prefill, decode])
def test_a_state_of_another_batch_is_refused(runtime: Runtime, call: Callable[..., object]) -> None:
    with pytest.raises(StateError) as caught:
        call(runtime, state=runtime.initial_state(3))
    assert "state has 3 sequences; expected 2" in message(caught)


@pytest.mark.parametrize("call", [prefill, decode])
def test_what_is_no_state_is_refused(runtime: Runtime, call: Callable[..., object]) -> None:
    with pytest.raises(StateError) as caught:
        call(runtime, state=[torch.zeros(2, 3, 32, 16)])
    assert "state is a list" in message(caught)


def test_a_state_of_another_runtime_is_refused(runtime: Runtime, model: object) -> None:
    with pytest.raises(StateError) as caught:
        decode(runtime, state=TorchRuntime(model).initial_state(2))  # type: ignore[arg-type]
    assert "another runtime" in message(caught)


def test_a_state_that_decode_consumed_is_refused(runtime: Runtime) -> None:
    state = runtime.initial_state(2)
    decode(runtime, state=state)
    for call in (prefill, decode):
        with pytest.raises(StateError) as caught:
            call(runtime, state=state)
        assert "consumed by an earlier decode" in message(caught)


def test_a_decode_that_raises_leaves_the_state_as_it_was(runtime: Runtime) -> None:
    _, state = prefill(runtime)
    before = runtime.host_state(state)
    with pytest.raises(PromptError):
        decode(runtime, input_ids=torch.tensor([[5], [97]]), state=state)
    assert all(torch.equal(one, other) for one, other in zip(runtime.host_state(state), before, strict=True))
    decode(runtime, state=state)


def test_an_empty_batch_is_refused(runtime: Runtime) -> None:
    with pytest.raises(StateError) as caught:
        runtime.initial_state(0)
    assert "batch is 0" in message(caught)


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda tensors: tensors[:-1], "state has 1 layers; expected 2"),
        (lambda tensors: [tensors[1], *tensors[1:]], "state of layer 0 has shape [2, 3, 16, 16]; expected [2, 3, 32"),
        (lambda tensors: [tensors[0].double(), *tensors[1:]], "state of layer 0 is float64; expected float32"),
        (lambda tensors: [tensors[0], tensors[1][:1]], "state of layer 1 has shape [1, 3, 16, 16]; expected [2"),
        (lambda tensors: [tensor[:0] for tensor in tensors], "expected at least one sequence"),
    ],
)
def test_tensors_that_are_no_state_of_the_model_are_named(
    runtime: Runtime, spoil: Callable[[list[Tensor]], list[Tensor]], found: str
) -> None:
    tensors = runtime.host_state(runtime.initial_state(2))
    with pytest.raises(StateError) as caught:
        runtime.device_state(spoil(tensors))
    assert found in message(caught)
