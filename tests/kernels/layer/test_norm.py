"""SRMSNorm's op against float64 autograd of its formula."""

import pytest
import torch

from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.kernels.layer import form, srmsnorm
from tnllm_export.kernels.layer.norm import srmsnorm_op, srmsnorm_pytorch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 16), (63, 48), (2, 5, 257), (257, 64)]
GPU_SHAPES = [(1, 2048), (257, 2048), (3, 63, 1024), (31, 5120), (1000, 4096), (7, 12288), (5, 16384), (63, 16383)]


def reference(x, grad):
    x = x.detach().double().requires_grad_()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    return y.detach(), *torch.autograd.grad(y, x, grad.double())


def check(x, grad, tolerance, relative_error):
    leaf = x.detach().requires_grad_()
    y = srmsnorm(leaf)
    (dx,) = torch.autograd.grad(y, leaf, grad)
    for found, expected in zip((y, dx), reference(x, grad), strict=True):
        assert found.dtype == x.dtype
        assert found.is_contiguous()
        assert relative_error(found, expected) < tolerance[x.dtype]


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_directions_are_the_formula(draw, tolerance, relative_error, shape, dtype):
    check(draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1), tolerance, relative_error)


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_every_width_is_the_formula_on_a_gpu(draw, tolerance, relative_error, shape, dtype):
    x, grad = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    check(x, grad, tolerance, relative_error)
    assert relative_error(srmsnorm(x), reference(x, grad)[0]) <= 1.1 * relative_error(
        srmsnorm_pytorch(x, dtype), reference(x, grad)[0]
    ) + (1e-7 if dtype == torch.float32 else 0)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[..., 16:64],
        lambda x: x[:, 1:4, :48],
        lambda x: x[::2, ::3, 48:],
        lambda x: x.transpose(0, 1)[..., :48],
        lambda x: x.transpose(1, 2),
        lambda x: x[..., ::2],
    ],
    ids=["chunk", "some tokens", "every third token", "time first", "width strided", "every second element"],
)
def test_inputs_and_gradients_lie_anywhere(draw, tolerance, relative_error, view):
    check(view(draw(4, 7, 96)), view(draw(4, 7, 96, seed=1)), tolerance, relative_error)
    expanded = torch.ones((), device=draw(1).device).expand(4, 7, 96)
    check(draw(4, 7, 96), expanded, tolerance, relative_error)


@pytest.mark.usefixtures("triton")
def test_the_answer_comes_in_the_dtype_asked_for(draw, tolerance, relative_error):
    x = draw(3, 48).requires_grad_()
    y = srmsnorm(x, torch.bfloat16)
    (dx,) = torch.autograd.grad(y, x, draw(3, 48, dtype=torch.bfloat16, seed=1))
    expected, expected_dx = reference(x, draw(3, 48, dtype=torch.bfloat16, seed=1))
    assert y.dtype == torch.bfloat16
    assert dx.dtype == torch.float32
    assert relative_error(y, expected) < tolerance[torch.bfloat16]
    assert relative_error(dx, expected_dx) < tolerance[torch.float32]


@pytest.mark.usefixtures("triton")
def test_zeros_stay_zeros_and_large_float16_does_not_overflow(draw):
    assert torch.equal(srmsnorm(torch.zeros_like(draw(2, 48))), torch.zeros_like(draw(2, 48)))
    large = torch.full_like(draw(2, 48, dtype=torch.float16), 60000.0)
    assert torch.allclose(srmsnorm(large), torch.ones_like(large))


@pytest.mark.usefixtures("triton")
def test_no_rows_are_no_rows(draw):
    x = draw(2, 0, 48).requires_grad_()
    y = srmsnorm(x)
    assert y.shape == (2, 0, 48)
    assert torch.autograd.grad(y.sum(), x)[0].shape == (2, 0, 48)


@pytest.mark.usefixtures("triton")
def test_two_runs_are_bit_equal(draw):
    assert torch.equal(srmsnorm(draw(63, 257)), srmsnorm(draw(63, 257)))


@pytest.mark.usefixtures("triton")
def test_rows_that_are_too_wide_are_computed_in_pytorch_with_one_warning(draw, tolerance, relative_error, monkeypatch):
    monkeypatch.setattr(form, "MAX_WIDTH", 32)
    form._warn_of_width.cache_clear()
    x = draw(3, 48)
    with pytest.warns(UserWarning, match="found rows of 48 elements; its Triton kernel takes up to 32") as warnings:
        check(x, draw(3, 48, seed=1), tolerance, relative_error)
    assert len(warnings) == 1


def test_float64_is_computed_in_float64(draw):
    x = draw(3, 48, dtype=torch.float64)
    with use_kernels("auto"):
        assert torch.equal(srmsnorm(x), reference(x, x)[0])


@pytest.mark.parametrize("choice", ["triton", "pytorch"])
def test_the_op_keeps_the_rules_of_torch_library(draw, choice):
    with use_kernels(choice):
        for x in (draw(3, 5, 48), draw(3, 5, 96)[..., 16:64].requires_grad_()):
            torch.library.opcheck(srmsnorm_op, (x, torch.float32))
            torch.library.opcheck(srmsnorm_op, (x, torch.bfloat16))


@pytest.mark.usefixtures("triton")
def test_rows_of_no_elements_have_gradients_of_none(device):
    x = torch.empty(3, 0, device=device, requires_grad=True)
    srmsnorm(x).sum().backward()
    assert x.grad.shape == (3, 0)
