"""Whether a weight is finite, told from its bits."""

import pytest
import torch

from tnllm_export.models.finite import is_finite

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_sixteen_bits_is_told(dtype):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    found = [is_finite(number) for number in torch.split(numbers, 1)]
    assert found == numbers.isfinite().tolist()
    assert is_finite(numbers[numbers.isfinite()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_among_extremes_is_found(dtype, bad):
    limits = torch.finfo(dtype)
    numbers = torch.tensor([0.0, -0.0, limits.max, limits.min, limits.tiny, -limits.tiny], dtype=dtype).reshape(2, 3)
    for fine in (numbers, numbers.t(), numbers.abs(), -numbers.abs(), numbers[:0]):
        assert is_finite(fine)
        assert not is_finite(torch.cat((fine.reshape(-1), torch.tensor([bad], dtype=dtype))))
