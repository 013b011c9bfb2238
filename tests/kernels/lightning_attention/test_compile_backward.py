"""A backward's one launch on Hopper becomes machine code without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")


def test_the_launch_of_a_backward_fits_hopper():
    # Outside the interpreter, which this process may use.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_backward_hopper.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["K"], line["handover"]) for line in lines] == [(128, "none"), (128, "lookback"), (256, "none")]
    for line in lines:
        assert line["shared_bytes"] <= 227 * 1024, line
        assert line["products"] > 0, line
        assert line["traps"] == 0, line
