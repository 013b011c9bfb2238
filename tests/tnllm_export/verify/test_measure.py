import math

import pytest
import torch

from tnllm_export.errors import PromptError, UnsupportedTargetError
from tnllm_export.verify.cases import SAMPLE_TEXT, random_case, text_case
from tnllm_export.verify.measure import kl_divergence, max_abs_error, relative_error, top_gap
from tnllm_export.verify.records import Check, GreedyAgreement, worst
from tnllm_export.verify.tolerances import TOLERANCES, tolerance


def test_relative_error_is_that_of_each_row():
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    found = torch.tensor([[3.0, 4.5], [0.0, 0.0], [0.0, 1.0]])
    assert relative_error(found, expected).tolist() == [0.1, 0.0, math.inf]


def test_kl_divergence_agrees_with_torch():
    torch.manual_seed(0)
    expected, found = torch.randn(2, 5, 11)
    p = expected.double().log_softmax(-1)
    q = found.double().log_softmax(-1)
    reference = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(kl_divergence(found, expected), reference)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_never_measures_small(bad):
    expected = torch.ones(1, 4)
    found = torch.tensor([[1.0, bad, 1.0, 1.0]])
    for measure in (relative_error, max_abs_error, kl_divergence):
        for error in (measure(found, expected), measure(found, found), measure(expected, found)):
            assert not error.item() <= 1e300


def test_top_gap_is_between_first_and_second():
    assert top_gap(torch.tensor([[1.0, 5.0, 3.5]])).tolist() == [1.5]


def test_worst_keeps_nan_wherever_it_stands():
    assert worst([1.0, 3.0, 2.0]) == 3.0
    assert math.isnan(worst([1.0, math.nan, 2.0]))
    assert math.isnan(worst([math.nan, 2.0]))


def test_nan_and_nothing_compared_pass_no_check():
    assert Check("claim", 1.0, 1.0, 5).passed
    assert not Check("claim", math.nan, 1.0, 5).passed
    assert not Check("claim", 0.0, 1.0, 0).passed


def test_only_a_near_tie_explains_a_difference():
    assert GreedyAgreement("case", 0, 8, 8).explained
    assert GreedyAgreement("case", 0, 8, 3, gap=0.1, tie=0.2).explained
    assert not GreedyAgreement("case", 0, 8, 3, gap=0.3, tie=0.2).explained
    assert not GreedyAgreement("case", 0, 8, 3, gap=math.nan, tie=0.2).explained


def test_every_export_dtype_has_a_tolerance():
    assert set(TOLERANCES) == {"float32", "float16", "bfloat16"}
    with pytest.raises(UnsupportedTargetError, match="float64"):
        tolerance("float64")


def test_random_inputs_depend_on_the_seed_alone():
    first, again, other = (random_case(1000, seed, (1, 9), 4, 3, 0) for seed in (1, 1, 2))
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.continuation, again.continuation)
    assert not torch.equal(first.input_ids, other.input_ids)


def test_a_text_is_continued_by_its_own_words():
    case = text_case(range(100), "a text", longest=60, decoded=20, piece=7, greedy=0)
    assert case.lengths.tolist() == [60, 20]
    for row, length in enumerate(case.lengths.tolist()):
        assert case.input_ids[row, :length].tolist() == list(range(length))
        assert case.continuation[row].tolist() == list(range(length, length + 20))


def test_a_short_text_is_split_and_a_tiny_one_refused():
    case = text_case(range(9), "a text", longest=60, decoded=20, piece=7, greedy=0)
    assert case.lengths.tolist() == [5, 1]
    assert case.continuation.shape == (2, 4)
    with pytest.raises(PromptError, match="7 tokens; expected at least 8"):
        text_case(range(7), "a text", longest=60, decoded=20, piece=7, greedy=0)


def test_the_sample_text_is_long_enough_for_any_tokenizer():
    assert len(SAMPLE_TEXT.split()) > 150
