"""The plugin benchmark compares with float64 before it times, and with the same kernels launched by Triton."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import names, performance, report
from benchmarks.attention_cases import Shape
from benchmarks.plugin import CASES, Case, measure, triton_form

# The interpreter computes with numpy, which warns of what is masked afterwards.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")

CHUNK, STEP = (Case(Shape(2, 1, tokens, key_dim=32, value_dim=16), torch.float32) for tokens in (17, 1))


@pytest.mark.parametrize("case", [CHUNK, STEP], ids=["chunk", "step"])
def test_what_is_right_is_timed(device, case):
    found = list(measure(case, triton_form, device.type))
    assert [record.name for record in found] == [names.PLUGIN_PARITY, names.PLUGIN_PARITY, names.PLUGIN]
    assert [record.case for record in found[:2]] == [f"{case} | output", f"{case} | state"]
    assert all(0 < record.value <= record.floor and record.value == record.peer_value for record in found[:2])
    assert found[2].value > 0
    assert found[2].peer_value > 0
    assert found[2].floor > 0


def test_what_is_wrong_is_not_timed(device):
    def wrong(inputs, output, state):
        return lambda: (output.copy_(inputs[2]), state.copy_(inputs[4]))

    found = []
    with pytest.raises(RuntimeError, match=r"relative error of output is .*; expected at most 5e-06"):
        found.extend(measure(CHUNK, wrong, device.type))
    assert [record.name for record in found] == [names.PLUGIN_PARITY]
    assert found[0].value > 0.5 > found[0].peer_value


def test_cases_cover_every_hand_over_and_both_ops():
    assert {case.dtype for case in CASES} == {torch.float32, torch.float16, torch.bfloat16}
    assert {case.is_step for case in CASES} == {True, False}
    assert STEP.bytes == 2 * (2 * 4 * 32 * 16 + 4 * 2 * (32 + 16))
    assert len({str(case) for case in CASES}) == len(CASES)


def test_the_table_shows_the_ratio(device):
    records = [r for r in measure(STEP, triton_form, device.type) if r.name == names.PLUGIN]
    *_, line = performance.plugin_table(records).splitlines()
    assert line.startswith("| 2, 1, 1, K 32 | float32 | ")
    assert f"| {records[0].value / records[0].peer_value:.3f} |" in line


def test_the_page_has_a_place_for_every_table():
    page = (report.ROOT / "docs" / "tensorrt.md").read_text()
    places = {line[11:-4] for line in page.splitlines() if line.startswith("<!-- begin ")}
    assert places == set(report.PAGES["docs/tensorrt.md"]) > set(performance.PLUGIN_TABLES)
