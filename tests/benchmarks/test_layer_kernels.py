"""The layer benchmark compares with float64 before it times, and the sweep tries what the tables hold."""

from dataclasses import replace

import pytest

from benchmarks import layer_kernels
from benchmarks.layer_kernels import CASES, COMPILED, EAGER, measure
from tnllm_export.kernels.dispatch import use_kernels

pytest.importorskip("triton")

SIZE = {"batch": 2, "tokens": 5, "width": 256}


@pytest.fixture(autouse=True)
def _looser_on_the_interpreter(monkeypatch, device):
    """It cuts bfloat16 off instead of rounding it."""
    if device.type == "cpu":
        monkeypatch.setattr(layer_kernels, "ERROR_LIMIT", 1e-2)
        monkeypatch.setattr(layer_kernels, "PYTORCH_SHARE", 3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_right_is_timed_both_ways_beside_both_peers(case, device):
    records = list(measure(case, **SIZE, device=device.type, compiler=lambda function: function))
    times = [record for record in records if record.metric == "time"]
    assert [(record.case.split(" | ")[0].removeprefix(case.name).strip(), record.peer) for record in times] == [
        (direction, peer) for direction in ("forward", "backward") for peer in (COMPILED, EAGER)
    ]
    assert all(record.value > 0 and record.peer_value > 0 and record.floor > 0 for record in times)
    errors = [record for record in records if record.metric == "relative error"]
    assert len(errors) >= 2
    assert any(record.value > 0 for record in errors)


def test_a_peer_that_fails_is_named_with_its_reason(device):
    def broken(function):
        raise RuntimeError("no compiler here")

    records = list(measure(CASES[0], **SIZE, device=device.type, compiler=broken))
    absent = [record for record in records if record.peer.startswith(COMPILED)]
    assert [record.peer for record in absent] == [f"{COMPILED} (absent: RuntimeError: no compiler here)"] * 2
    assert all(record.value > 0 and record.peer_value is None for record in absent)


def test_nothing_is_timed_that_is_wrong(device):
    wrong = replace(CASES[0], fused=lambda x: x)
    with pytest.raises(RuntimeError, match="norm, width 256: relative error of output 0"):
        list(measure(wrong, **SIZE, device=device.type))


def test_the_sweep_times_every_kernel_as_the_tables_launch_it(device):
    from benchmarks.layer_sweep import sweep

    with use_kernels("triton"):
        results = list(sweep(256, batch=1, tokens=5, device=device.type, most=2))
    assert len({result["kernel"] for result in results}) == 9
    assert all(result["ms"] > 0 for result in results)
