"""Timing: the median of calls that take turns; enough sets of inputs to outgrow the cache."""

import time

import torch

from benchmarks.gpu_timing import CACHE_BYTES, ceilings, describe, milliseconds, peak_bytes, set_count


def test_the_median_is_that_of_one_call_and_calls_take_turns():
    seen = []
    calls = [lambda index=index: (seen.append(index), time.sleep(0.002)) for index in range(3)]
    assert 2 <= milliseconds(calls, "cpu", budget_ms=20) < 20
    assert seen[-3:] in ([0, 1, 2], [1, 2, 0], [2, 0, 1])


def test_sets_together_outgrow_the_cache():
    assert set_count(CACHE_BYTES) == set_count(10 * CACHE_BYTES) == 1
    assert set_count(CACHE_BYTES // 2 - 1) == 3


def test_ceilings_are_measured_once():
    assert ceilings("cpu") is ceilings("cpu")
    assert ceilings("cpu").bandwidth > 0


def test_a_failure_is_told_in_one_line():
    assert describe(ValueError("a\nb " + "c" * 999)).startswith("ValueError: a b ccc")
    assert len(describe(ValueError("c" * 999))) < 200
    assert describe(torch.OutOfMemoryError("long story")) == "out of memory"
    assert peak_bytes(lambda: None, "cpu") == 0
