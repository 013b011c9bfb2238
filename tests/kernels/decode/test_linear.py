"""The linear maps against PyTorch in float64: both kernels, every prologue and epilogue, odd sizes."""

import pytest
import torch

pytest.importorskip("triton")

from tnllm_export.kernels.decode.linear import Scratch, linear, parts_size
from tnllm_export.kernels.decode.plan import Cut, Matrix, Vector, cut
from tnllm_export.kernels.decode.reference import linear_pytorch

FORMS = [("norm", "heads"), ("gate", "residual"), ("norm", "product"), ("plain", "residual"), ("norm", "store")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("triton")


def run(given, sizes=None):
    """Let `linear` write into a copy of the operands; return what it wrote, and the scratch memory."""
    mine = given.copy()
    N, K = given.weight.shape
    after, batch = given.options["after"], given.x.shape[0]
    scratch = Scratch(batch, [(after, N, K)], given.x.dtype, given.x.device)
    if isinstance(sizes, Matrix):
        scratch.parts = torch.full((parts_size(sizes, after, N, batch),), float("nan"), device=given.x.device)
        scratch.arrivals = torch.zeros(-(-N // sizes.rows), dtype=torch.int32, device=given.x.device)
        scratch.normed = torch.full((batch * K,), float("nan"), dtype=given.x.dtype, device=given.x.device)
    linear(mine.x, mine.weight, mine.output, scratch, sizes=sizes, **mine.options)
    return mine.written, scratch


def check(given, sizes=None):
    """Compare with float64, on the norm of each output; the plain form in the same dtype may not be much better."""
    truth, plain = given.copy(torch.float64), given.copy()
    linear_pytorch(truth.x, truth.weight, truth.output, **truth.options)
    linear_pytorch(plain.x, plain.weight, plain.output, **plain.options)
    found, scratch = run(given, sizes)
    for mine, other, right in zip(found, plain.written, truth.written, strict=True):
        error, allowed = ((x.double() - right).norm() / right.norm() for x in (mine, other))
        # Rotated by up to 10^5 radians, float32 angles are wrong by 2^-8 in both; all else is rounded here and there.
        assert error <= 1.2 * allowed + (2e-6 if mine.dtype == torch.float32 else rounding(mine)), (error, allowed)
    assert not scratch.arrivals.any()


def rounding(x):
    """Triton's interpreter cuts bfloat16 off, always towards zero, instead of rounding it: of both factors and here."""
    return 3 * 2.0**-8 if x.dtype == torch.bfloat16 and x.device.type != "cuda" else 0.0


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_agrees_with_float64(operands, form, batch):
    check(operands(*form, batch, rows=20, columns=72, heads=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 9])
def test_every_dtype_is_as_exact_as_plain_pytorch(operands, form, dtype, batch):
    check(operands(*form, batch, rows=24, columns=136, dtype=dtype, heads=3))


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_lrpe_doubles_query_and_key(operands, batch):
    check(operands("norm", "heads", batch, rows=36, columns=40, heads=3, rotated=True))


@pytest.mark.parametrize("columns", [1, 7, 255, 257, 600])
@pytest.mark.parametrize("sizes", [Vector(4, 256, 1, 1), Vector(8, 128, 1, 2), Vector(1, 512, 2, 4)])
def test_matvec_with_columns_that_fill_no_tile(operands, columns, sizes):
    check(operands("norm", "product", 3, rows=13, columns=columns), sizes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [Matrix(16, 32, 1, 2, 1), Matrix(32, 16, 4, 3, 2), Matrix(16, 16, 1, 2, 4)])
def test_matmul_with_and_without_shared_columns(operands, form, sizes):
    check(operands(*form, 5, rows=24, columns=90, heads=2), sizes)


def test_matmul_whose_last_parts_have_no_columns(operands):
    check(operands("plain", "residual", 5, rows=24, columns=33), Matrix(16, 16, 1, 2, 8))


def test_results_are_the_same_bits_again(operands):
    given = operands("gate", "residual", 9, rows=40, columns=96, dtype=torch.bfloat16)
    sizes = Matrix(16, 16, 1, 2, 4)
    (first,), _ = run(given, sizes)
    (second,), _ = run(given, sizes)
    assert torch.equal(first, second)
    assert not torch.equal(first, given.output)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("columns", [24, 1024, 4096, 11008])
def test_cuts_read_whole_accesses(itemsize, columns):
    for output in ("heads", "residual", "product", "store"):
        for batch in (1, 4, 5, 64):
            sizes: Cut = cut(output, batch, 4096, columns, itemsize, 132)
            if isinstance(sizes, Vector):
                assert sizes.columns >= 32 * sizes.warps * 16 // itemsize
                assert sizes.warps == 1 or sizes.columns < 2 * columns
            else:
                assert itemsize == 2
                assert sizes.split * -(-4096 // sizes.rows) <= 2 * 132
