"""Sampling parameters out of their range or of another type are named."""

import math

import numpy as np
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
        ("temperature", "0.7"),
        ("temperature", None),
        ("temperature", True),
        ("temperature", 1j),
        pytest.param("temperature", 10**400, id="temperature-beyond floats"),
        ("top_k", None),
        ("top_k", 1.5),
        ("top_k", np.float32(2)),
        ("top_p", "1"),
        ("repetition_penalty", [1.0]),
        ("seed", 1.5),
        ("seed", False),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", "5"),
        ("max_new_tokens", math.inf),
        ("stop", None),
        ("stop", 3),
        ("stop", [1]),
        ("stop", b"text"),
        ("stop_at_eos", None),
        ("stop_at_eos", "no"),
    ],
)
def test_a_value_out_of_its_range_or_of_another_type_is_named(field: str, value: object) -> None:
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{field} ")
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_ends_of_every_range_are_taken() -> None:
    params = SamplingParams(temperature=0, top_k=0, top_p=1, repetition_penalty=1e-9, seed=2**63 - 1, max_new_tokens=0)
    assert params.stop == ()


def test_the_numbers_of_numpy_are_taken_as_plain_ones() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int32(3),
        top_p=np.float64(0.25),
        seed=np.int64(7),
        max_new_tokens=np.uint8(2),
    )
    assert params == SamplingParams(temperature=0.5, top_k=3, top_p=0.25, seed=7, max_new_tokens=2)
    assert {type(getattr(params, name)) for name in ("temperature", "top_p")} == {float}
    assert {type(getattr(params, name)) for name in ("top_k", "seed", "max_new_tokens")} == {int}
