"""Every kernel becomes machine code without a GPU, moves 16 bytes at a time and spills no register.

The compiler runs in a process of its own, since this one may have defined the kernels for the interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.slow
def test_every_kernel_compiles_to_vector_accesses_without_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["sm"] for kernel in kernels} == {80, 90}
    assert len({kernel["name"] for kernel in kernels}) == 9
    for kernel in kernels:
        assert kernel["cubin_bytes"] > 0
        assert kernel["loads"], kernel
        assert kernel["stores"], kernel
        # Positions and theta's gradient are narrower; everything of a row's width goes by 16 bytes.
        assert "v4.b32" in kernel["loads"], kernel
        assert "v4.b32" in kernel["stores"], kernel
        assert not {"b16", "v2.b16"} & {*kernel["loads"], *kernel["stores"]}, kernel
        assert kernel["spilled_bytes"] == 0, kernel
