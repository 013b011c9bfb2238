"""32,768 decoded tokens stay with float64, for the slowest and fastest heads of a 7B model's first and last layer."""

import pytest
import torch

from benchmarks.drift import LIMIT, TOKENS, extreme_rates, measure


@pytest.mark.slow
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
def test_a_float32_state_drifts_less_than_the_limit_and_a_float16_state_does_not(activations):
    forms = ("decode step", "matmul lowering", "float16 state")
    last = [drift for drift in measure(activations, width=16, forms=forms) if drift.tokens == TOKENS]
    assert len(last) == len(forms) * len(extreme_rates())
    for drift in last:
        if drift.form == "float16 state":
            assert drift.error > LIMIT
        else:
            # Not `> LIMIT` negated: NaN must fail.
            assert drift.error <= LIMIT, drift


def test_the_slowest_head_is_one_whose_decay_float32_can_not_hold():
    slowest = torch.tensor(min(extreme_rates().values()), dtype=torch.float64)
    exact, rounded = torch.exp(-slowest), torch.exp(-slowest.float()).double()
    assert (1 - rounded) / (1 - exact) > 1.3
