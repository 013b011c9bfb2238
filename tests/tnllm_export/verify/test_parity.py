"""What passes, and above all what does not."""

import copy
import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tnllm_export.errors import ParityError, RequestError, UnsupportedTargetError
from tnllm_export.runtime import Runtime, RuntimeInfo, State, TorchRuntime
from tnllm_export.verify import Workload, verify_runtime

SMALL = Workload(lengths=(1, 63, 130), decoded=6, greedy=6, piece=50)


class Wrong:
    """A runtime that changes what another one answers."""

    def __init__(
        self,
        honest: Runtime,
        *,
        prefill_logits: Callable[[Tensor], Tensor] = lambda logits: logits,
        decode_logits: Callable[[Tensor], Tensor] = lambda logits: logits,
        state: Callable[[list[Tensor]], list[Tensor]] = lambda state: state,
    ) -> None:
        self.honest = honest
        self.change_prefill = prefill_logits
        self.change_decode = decode_logits
        self.change_state = state

    @property
    def info(self) -> RuntimeInfo:
        return self.honest.info

    def initial_state(self, batch: int) -> State:
        return self.honest.initial_state(batch)

    def prefill(self, input_ids: Tensor, lengths: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        logits, state = self.honest.prefill(input_ids, lengths, positions, state)
        changed = self.change_state(self.honest.host_state(state))
        return self.change_prefill(logits), self.honest.device_state(changed)

    def decode(self, input_ids: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        logits, state = self.honest.decode(input_ids, positions, state)
        return self.change_decode(logits), state

    def host_state(self, state: State) -> list[Tensor]:
        return self.honest.host_state(state)

    def device_state(self, tensors: list[Tensor]) -> State:
        return self.honest.device_state(tensors)


def failed_claims(report):
    return {check.claim for check in report.checks if not check.passed}


def test_the_eager_model_agrees_with_itself_in_everything(eager):
    report = verify_runtime(eager, eager, text_ids=range(80), seed=3, workload=SMALL)
    assert report.passed
    report.require_pass()
    assert {item.stage for item in report.logits} == {"prefill", "pieces", "decode"}
    # Three random rows and two of text: one prompt end each, once whole, once in pieces; six tokens decoded.
    assert len(report.logits) == 5 * (1 + 1 + 6)
    assert len(report.states) == 3 * 3 * 2
    assert all(item.agreed == item.tokens == 6 for item in report.greedy)
    assert all(check.compared > 0 for check in report.checks)
    assert report.seed == 3


def test_all_positions_are_compared_where_prefill_gives_them(model):
    runtime = TorchRuntime(model, logits="all")
    report = verify_runtime(runtime, runtime, workload=Workload((1, 70), decoded=2, greedy=0, piece=33))
    found = [(item.row, item.position) for item in report.logits if item.stage == "prefill"]
    assert found == [(0, 0), *((1, position) for position in range(70))]
    assert sorted((item.row, item.position) for item in report.logits if item.stage == "pieces") == found
    assert report.passed


def test_seeds_are_fresh_unless_given(eager):
    quick = Workload((2,), decoded=1, greedy=0, piece=2)
    first, second = (verify_runtime(eager, eager, workload=quick) for _ in range(2))
    assert first.seed != second.seed


def scale_layer(layer):
    def change(state):
        return [tensor * 1.001 if index == layer else tensor for index, tensor in enumerate(state)]

    return change


@pytest.mark.parametrize("layer", [0, 2])
def test_one_layer_with_a_wrong_state_fails_and_is_named(eager, layer):
    report = verify_runtime(Wrong(eager, state=scale_layer(layer)), eager, workload=SMALL)
    assert "states, prompt at once: relative error" in failed_claims(report)
    wrong = {item.layer for item in report.states if item.stage == "prefill" and item.relative > 1e-5}
    assert wrong == {layer}
    with pytest.raises(ParityError, match=r"states, prompt at once.*seed") as caught:
        report.require_pass()
    assert caught.value.exit_code == 60


def one_wrong_logit(logits):
    changed = logits.clone()
    changed[-1, 5] += 0.01 * changed.abs().max()
    return changed


@pytest.mark.parametrize("where", ["prefill_logits", "decode_logits"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(one_wrong_logit, id="one wrong logit in one row"),
        pytest.param(lambda logits: logits.roll(1, -1), id="shifted"),
        pytest.param(lambda logits: logits * math.nan, id="NaN"),
        pytest.param(torch.zeros_like, id="zero"),
    ],
)
def test_wrong_logits_fail(eager, where, change):
    report = verify_runtime(Wrong(eager, **{where: change}), eager, workload=SMALL)
    stage = "prompt at once" if where == "prefill_logits" else "token by token"
    assert f"logits, {stage}: relative error" in failed_claims(report)
    assert not report.passed


def test_nan_becomes_null_in_json_and_still_fails(eager):
    report = verify_runtime(Wrong(eager, decode_logits=lambda logits: logits * math.nan), eager, workload=SMALL)
    fields = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert fields["passed"] is False
    assert any(check["measured"] is None and not check["passed"] for check in fields["checks"])


def test_both_answering_nan_is_no_agreement(eager):
    broken = Wrong(eager, decode_logits=lambda logits: logits * math.nan)
    assert not verify_runtime(broken, broken, workload=SMALL).passed


def test_another_greedy_text_fails_where_it_is_no_near_tie(eager):
    """A runtime that is right on every text it is fed, and wrong on its own."""
    calls = iter(range(10**6))

    def change(logits):
        return logits if next(calls) < SMALL.decoded else logits.roll(1, -1)

    report = verify_runtime(Wrong(eager, decode_logits=change), eager, workload=SMALL)
    assert failed_claims(report) == {"greedy texts that part at no near tie"}
    assert all(item.agreed == 1 and item.gap > item.tie for item in report.greedy)


def test_half_precision_is_judged_beside_float32(half):
    runtime, exact = half
    report = verify_runtime(runtime, runtime, exact=exact, workload=SMALL)
    assert report.passed
    assert [stick.quantity for stick in report.yardsticks] == ["logits", "state"]
    assert all(1e-4 < stick.reference < 0.1 and stick.candidate == stick.reference for stick in report.yardsticks)
    with pytest.raises(ParityError, match="judged beside float32"):
        verify_runtime(runtime, runtime, workload=SMALL)


def test_half_precision_is_no_excuse_for_a_larger_error(half):
    """Within the tolerance of every single position, but twice as far from float32 as the eager model."""
    runtime, exact = half
    torch.manual_seed(0)

    def blur(logits):
        return logits * (1 + 0.06 * torch.randn_like(logits))

    report = verify_runtime(
        Wrong(runtime, prefill_logits=blur, decode_logits=blur), runtime, exact=exact, workload=SMALL
    )
    assert "logits: error against float32, in units of the eager model's" in failed_claims(report)


def test_what_cannot_be_compared_is_an_error(eager, half):
    cut = Wrong(eager, prefill_logits=lambda logits: logits[:, :-1])
    with pytest.raises(ParityError, match=r"returned logits torch.float32 \[3, 96\]; expected torch.float32 \[3, 97\]"):
        verify_runtime(cut, eager, workload=SMALL)
    with pytest.raises(ParityError, match="the reference is bfloat16; expected float32"):
        verify_runtime(eager, half[0], workload=SMALL)


def test_a_dtype_without_tolerance_is_refused(model):
    double = TorchRuntime(copy.deepcopy(model).cast_weights(torch.float64))
    with pytest.raises((ParityError, UnsupportedTargetError), match="float64"):
        verify_runtime(double, double, workload=SMALL)


def test_progress_counts_every_token_once(eager):
    seen = {}

    def progress(stage, done, total, unit=""):
        assert unit == "tokens"
        seen.setdefault(stage, []).append((done, total))

    verify_runtime(eager, eager, text_ids=range(80), workload=SMALL, progress=progress)
    for counts in seen.values():
        assert counts[-1][0] == counts[-1][1]


@pytest.mark.parametrize(
    ("field", "value"), [("lengths", ()), ("lengths", (3, 0)), ("decoded", 0), ("piece", 0), ("greedy", -1)]
)
def test_a_workload_that_would_compare_nothing_is_refused(field, value):
    with pytest.raises(RequestError, match=f"workload: {field}"):
        Workload(**{field: value})
