"""How outputs leave shared memory in `sweep_hopper.py`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from tnllm_export.kernels.lightning_attention.hopper_buffers import HALF, C, block_of


@gluon.jit
def copy_out(answer, output, t0, column):
    """Start to copy the output of the chunk from token t0 on, [C, HALF], which all threads see, to its place."""
    tensor, i_b, i_h, p_output, stride_t = output
    if t0 >= 0:
        tma.async_copy_shared_to_global(tensor, [i_b, t0, i_h, column], block_of(answer, 0))
    else:
        # The copy engine writes no block that begins before token 0.
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        token = t0 + gl.arange(0, C, layout=gl.SliceLayout(1, layout))
        place = column + gl.arange(0, HALF, layout=gl.SliceLayout(0, layout))
        p_rows = p_output + (token.to(gl.int64) * stride_t)[:, None] + place[None, :]
        gl.store(p_rows, answer.load(layout), mask=(token >= 0)[:, None])


@gluon.jit
def copy_zeros(zeros, output, t0, column):
    """Start to copy zeros, [C, HALF], to the tokens from t0 >= 0 on."""
    tensor, i_b, i_h, _, _ = output
    tma.async_copy_shared_to_global(tensor, [i_b, t0, i_h, column], block_of(zeros, 0))
