"""The decode kernels become sm_90 machine code that spills nothing and asks for weights before it waits.

The compiler runs in a process of its own, since this one may have defined the kernels for the interpreter.
"""

from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.slow
def test_kernels_stream_weights_from_before_the_previous_kernel_ends(lines_of):
    kernels = lines_of(SCRIPT)
    assert len(kernels) == 15
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        assert kernel["lets_next_start"], kernel
        if kernel["kernel"] in ("matvec_kernel", "recurrence_kernel"):
            assert kernel["early_loads"] >= 4, kernel
            assert kernel["registers"] <= 128, kernel
        if kernel["kernel"] == "matmul_kernel":
            assert kernel["early_prefetches"], kernel
            assert kernel["copies"] == ["0x10"], kernel
            assert kernel["tensor_cores"], kernel
            assert kernel["shared"] <= 227 << 10, kernel
