"""The sampling functions against their formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tnllm_export.generate import SamplingParams, sampling
from tnllm_export.generate.choices import Chooser
from tnllm_export.generate.sampling import draw, keep_top_p, penalise_repetition, top_k_tokens
from tnllm_export.generate.sequence import RunningSequence


def logits(rows: int = 3, vocab: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def choose(row: Tensor, params: SamplingParams, draws: int, seen: Tensor | None = None) -> list[int]:
    rng = torch.Generator().manual_seed(params.seed)
    uniforms = torch.rand(draws, generator=rng, dtype=torch.float64) if params.temperature else None
    mask = None if seen is None else seen.expand(draws, -1)
    found: list[int] = sampling.choose(row.expand(draws, -1), params, mask, uniforms).tolist()
    return found


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    found = penalise_repetition(torch.tensor([[2.0, -2.0, 3.0, -3.0]]), torch.tensor([[True, True, False, False]]), 4.0)
    assert found.tolist() == [[0.5, -8.0, 3.0, -3.0]]


@given(k=st.integers(1, 50), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_top_k_keeps_exactly_the_k_largest(k: int, seed: int) -> None:
    before = logits(seed=seed)
    for old, kept in zip(before.tolist(), top_k_tokens(before, k).tolist(), strict=True):
        assert kept == sorted(sorted(range(50), key=lambda index: -old[index])[:k])


def test_top_k_keeps_k_of_equal_logits() -> None:
    assert len(set(top_k_tokens(torch.zeros(1, 9), 4)[0].tolist())) == 4


@pytest.mark.parametrize("top_k", [0, 1, 7, 50, 60])
@pytest.mark.parametrize("top_p", [0.6, 1.0])
def test_draws_are_those_from_the_whole_vocabulary_with_the_rest_ruled_out(top_k: int, top_p: float) -> None:
    params = SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p)
    before = logits(rows=1, seed=3)
    kept = before.topk(min(top_k or 50, 50), dim=-1)
    ruled = torch.full_like(before, -torch.inf).scatter(-1, kept.indices, kept.values).double() / 0.7
    uniforms = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = draw(keep_top_p(ruled, top_p).expand(300, -1), uniforms)
    found = sampling.choose(before.expand(300, -1), params, None, uniforms)
    assert found.tolist() == expected.tolist()


def test_where_logits_are_not_numbers_a_token_of_the_vocabulary_is_drawn() -> None:
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=4, top_p=0.5)):
        found = sampling.choose(torch.full((2, 50), torch.nan), params, None, torch.tensor([0.0, 0.99]).double())
        assert all(0 <= token < 50 for token in found.tolist())


@given(p=st.floats(0.01, 0.999), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_top_p_keeps_the_fewest_tokens_that_reach_p(p: float, seed: int) -> None:
    before = logits(seed=seed)
    after = keep_top_p(before, p)
    for old, new in zip(before, after, strict=True):
        probabilities = old.double().softmax(-1)
        kept = new > -torch.inf
        assert float(probabilities[kept].sum()) >= p - 1e-9
        assert float(probabilities[kept].sum() - probabilities[kept].min()) < p + 1e-9
        assert float(probabilities[kept].min()) >= float(probabilities[~kept].max() if (~kept).any() else 0)
        assert torch.equal(new[kept], old[kept])


def test_top_p_always_keeps_the_likeliest() -> None:
    kept = keep_top_p(torch.tensor([[0.0, 50.0, 1.0]]), 1e-6) > -torch.inf
    assert kept.tolist() == [[False, True, False]]


def test_draws_follow_the_distribution() -> None:
    row = torch.tensor([2.0, 0.0, -torch.inf, 1.0, -1.0])
    draws = 20_000
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(draw(row.expand(draws, -1), uniforms), minlength=5)
    expected = row.softmax(-1) * draws
    possible = expected > 0
    assert counts[2] == 0
    chi_square = float(((counts - expected).square() / expected)[possible].sum())
    assert chi_square < 16.3  # 3 degrees of freedom, 0.1 %


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_ruled_out_token_is_never_drawn(uniform: float) -> None:
    row = torch.full((1, 100), -torch.inf)
    row[0, 40:45] = torch.randn(5)
    assert 40 <= int(draw(row, torch.tensor([uniform], dtype=torch.float64))) < 45


def test_drawn_tokens_stay_within_top_k_and_top_p() -> None:
    row = logits(rows=1)[0]
    order = row.argsort(descending=True).tolist()
    assert set(choose(row, SamplingParams(temperature=3.0, top_k=4), 300)) == set(order[:4])
    probabilities = row.double().softmax(-1)[order].cumsum(-1)
    nucleus = order[: int((probabilities < 0.8).sum()) + 1]
    assert set(choose(row, SamplingParams(temperature=1.0, top_p=0.8), 2000)) <= set(nucleus)


def test_temperature_applies_before_top_p() -> None:
    row = torch.tensor([2.0, 1.0, 0.0])
    # At temperature 1 the first token alone has 0.67; at 4 it has 0.42, and two are needed.
    assert set(choose(row, SamplingParams(temperature=1.0, top_p=0.6), 200)) == {0}
    assert set(choose(row, SamplingParams(temperature=4.0, top_p=0.6), 200)) == {0, 1}


def test_a_tiny_temperature_is_greedy() -> None:
    row = logits(rows=1)[0]
    for temperature in (1e-30, 1e-310):  # too small to divide by in float32, and in float64
        for shifted in (row, row - 100):
            assert set(choose(shifted, SamplingParams(temperature=temperature), 20)) == {int(row.argmax())}


def test_the_penalty_works_on_greedy_choice() -> None:
    row = torch.tensor([1.0, 1.9])
    seen = torch.tensor([False, True])
    assert choose(row, SamplingParams(repetition_penalty=2.0), 1, seen) == [0]
    assert choose(row, SamplingParams(repetition_penalty=1.5), 1, seen) == [1]


def test_any_penalty_leaves_something_to_draw() -> None:
    row, everything = logits(rows=1)[0], torch.ones(logits().shape[1], dtype=torch.bool)
    for penalty in (1e-300, 1e-42, 1e42, 1e300):
        params = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=penalty)
        assert all(0 <= token < len(row) for token in choose(row, params, 5, everything))


def test_each_row_draws_from_its_own_generator() -> None:
    rows = logits()
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in (4, 5, 6)]
    sequences = [RunningSequence(place, [1], one, 50, None, None) for place, one in enumerate(params)]
    together = Chooser(sequences, torch.device("cpu")).choose(rows).tolist()
    alone = [choose(row, row_params, 1)[0] for row, row_params in zip(rows, params, strict=True)]
    assert together == alone
