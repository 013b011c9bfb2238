"""How outputs leave shared memory in `sweep_hopper.py`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tnllm_export.kernels.lightning_attention.hopper_buffers import HALF, C, async_store, block_of


@gluon.jit
def copy_out(answers, i, output, t0, column):
    """Start to copy the i-th of answers [N, C, HALF], which all threads see, to its place from token t0 on."""
    tensor, i_b, i_h, p_output, stride_t = output
    if t0 >= 0:
        async_store(tensor, [i_b, t0, i_h, column], block_of(answers, i, 0, HALF))
    else:
        # The copy engine writes no block that begins before token 0.
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        token = t0 + gl.arange(0, C, layout=gl.SliceLayout(1, layout))
        place = column + gl.arange(0, HALF, layout=gl.SliceLayout(0, layout))
        p_rows = p_output + (token.to(gl.int64) * stride_t)[:, None] + place[None, :]
        gl.store(p_rows, answers.index(i).load(layout), mask=(token >= 0)[:, None])


@gluon.jit
def copy_zeros(answers, i, output, t0, column):
    """Start to copy the i-th of answers, which holds zeros, to the tokens from t0 >= 0 on."""
    tensor, i_b, i_h, _, _ = output
    async_store(tensor, [i_b, t0, i_h, column], block_of(answers, i, 0, HALF))
