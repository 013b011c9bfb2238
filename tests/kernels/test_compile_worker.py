"""What the compiler's process refuses of what the compiler has made."""

from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from tnllm_export.kernels.compile_worker import _check

METADATA = SimpleNamespace(profile_scratch_size=0, num_warps=4, num_ctas=1)
PTX = """.visible .entry kernel(
    .param .u64 kernel_param_0
)
{{
    {}
    ret;
}}"""
WAIT, LOAD, STORE = "griddepcontrol.wait;", "ld.global.b32 %r1, [%rd1];", "@%p1 st.relaxed.global.b32 [%rd1], %r1;"


@pytest.mark.parametrize("lines", [(LOAD, WAIT), (STORE, WAIT, LOAD), (LOAD,)])
def test_a_kernel_that_touches_memory_before_it_waits_is_refused(lines):
    variant = {"overlaps": True, "warps": 4}
    with pytest.raises(RuntimeError, match="touches memory before it waits"):
        _check(PTX.format("\n".join(lines)), METADATA, variant, 1)


def test_one_that_waits_first_is_taken():
    _check(
        PTX.format("\n".join(("ld.param.b64 %rd1, [kernel_param_0];", WAIT, LOAD, STORE))),
        METADATA,
        {"overlaps": True, "warps": 4},
        1,
    )
    _check(PTX.format("\n".join((LOAD, STORE))), METADATA, {"overlaps": False, "warps": 4}, 1)
