"""Every kernel becomes machine code without a GPU, moves 16 bytes at a time and spills no register.

The compiler runs in a process of its own, since this one may have defined the kernels for the interpreter.
"""

from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.slow
def test_every_kernel_compiles_to_vector_accesses_without_spills(lines_of):
    kernels = lines_of(SCRIPT)
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
