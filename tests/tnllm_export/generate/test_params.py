"""Sampling parameters out of their range are named."""

import math

import pytest

from tnllm_export.errors import SamplingError
from tnllm_export.generate import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("seed", -1),
        ("seed", 2**63),
        ("max_new_tokens", -1),
        ("stop", "text"),
        ("stop", ("a", "")),
    ],
)
def test_a_value_out_of_its_range_is_named(field: str, value: object) -> None:
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{field} ")
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_ends_of_every_range_are_taken() -> None:
    params = SamplingParams(temperature=0, top_k=0, top_p=1, repetition_penalty=1e-9, seed=2**63 - 1, max_new_tokens=0)
    assert params.stop == ()
