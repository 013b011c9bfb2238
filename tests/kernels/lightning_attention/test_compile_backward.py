"""A backward's one launch on Hopper becomes machine code without a GPU."""

from pathlib import Path

import pytest

from tnllm_export.kernels.compile import SHARED_BYTES

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")


def test_the_launch_of_a_backward_fits_hopper(lines_of):
    lines = lines_of(Path(__file__).with_name("compile_backward_hopper.py"))
    found = [(line["K"], line["V"], line["parts"], line["handover"]) for line in lines]
    assert found == [
        (128, 128, 1, "none"),
        (128, 128, 1, "lookback"),
        (128, 128, 2, "recompute"),
        (256, 256, 2, "none"),
        (256, 128, 1, "none"),
    ]
    for line in lines:
        assert line["shared_bytes"] <= SHARED_BYTES[90], line
        assert line["products"] > 0, line
        assert line["traps"] == 0, line
        assert line["scratch_bytes"] == 0, line
        assert line["maps"] == 7, line
