"""The gate's op against float64 autograd of its formula."""

import pytest
import torch

from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.kernels.layer import gated_norm
from tnllm_export.kernels.layer.gate import gated_norm_op
from tnllm_export.kernels.layer.norm import srmsnorm_pytorch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1, 16), (3, 21, 48), (1, 5, 257), (1, 257, 64)]
GPU_SHAPES = [(1, 1, 2048), (2, 257, 2048), (3, 63, 1024), (1, 31, 5120), (2, 500, 4096), (1, 7, 12288), (1, 5, 16384)]


def reference(gate, x, grad):
    gate, x = (tensor.detach().double().requires_grad_() for tensor in (gate, x))
    g = gate * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
    return g.detach(), *torch.autograd.grad(g, (gate, x), grad.double())


def check(gate, x, grad, tolerance, relative_error):
    leaves = [tensor.detach().requires_grad_() for tensor in (gate, x)]
    g = gated_norm(*leaves)
    grads = torch.autograd.grad(g, leaves, grad)
    for found, expected in zip((g, *grads), reference(gate, x, grad), strict=True):
        assert found.dtype == x.dtype
        assert found.is_contiguous()
        assert relative_error(found, expected) < tolerance[x.dtype]


def inputs(draw, shape, dtype):
    """Gate and x and the gradient; the gate is the last chunk of a fused projection."""
    B, T, d = shape
    projected = draw(B, T, 4 * d, dtype=dtype)
    return projected.chunk(4, dim=-1)[3], draw(*shape, dtype=dtype, seed=1), draw(*shape, dtype=dtype, seed=2)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_directions_are_the_formula(draw, tolerance, relative_error, shape, dtype):
    check(*inputs(draw, shape, dtype), tolerance, relative_error)


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_every_width_is_the_formula_on_a_gpu(draw, tolerance, relative_error, shape, dtype):
    gate, x, grad = inputs(draw, shape, dtype)
    check(gate, x, grad, tolerance, relative_error)
    expected = reference(gate, x, grad)[0]
    plain = gate * srmsnorm_pytorch(x, dtype)
    slack = 1e-7 if dtype == torch.float32 else 0
    assert relative_error(gated_norm(gate, x), expected) <= 1.1 * relative_error(plain, expected) + slack


@pytest.mark.usefixtures("triton")
def test_inputs_and_gradients_lie_anywhere(draw, tolerance, relative_error):
    wide = [draw(4, 7, 96, seed=seed) for seed in range(3)]
    check(wide[0][..., 48:], wide[1][:, :, 16:64], wide[2][..., :48], tolerance, relative_error)
    check(wide[0][:, 1:5], wide[1][:, 3:], wide[2][:, :4], tolerance, relative_error)
    check(wide[0].transpose(1, 2), wide[1].transpose(1, 2), wide[2].transpose(1, 2), tolerance, relative_error)


@pytest.mark.usefixtures("triton")
def test_no_rows_are_no_rows(draw):
    gate, x = draw(2, 0, 48).requires_grad_(), draw(2, 0, 48).requires_grad_()
    assert [grad.shape for grad in torch.autograd.grad(gated_norm(gate, x).sum(), (gate, x))] == [(2, 0, 48)] * 2


@pytest.mark.usefixtures("triton")
def test_two_runs_are_bit_equal(draw):
    assert torch.equal(gated_norm(draw(63, 257), draw(63, 257)), gated_norm(draw(63, 257), draw(63, 257)))


@pytest.mark.parametrize("choice", ["triton", "pytorch"])
def test_the_op_keeps_the_rules_of_torch_library(draw, choice):
    with use_kernels(choice):
        gate = draw(3, 5, 192).chunk(4, dim=-1)[3]
        torch.library.opcheck(gated_norm_op, (gate, draw(3, 5, 48)))
        torch.library.opcheck(gated_norm_op, (gate.requires_grad_(), draw(3, 5, 48).requires_grad_()))


def test_inputs_that_do_not_fit_are_named(draw):
    with pytest.raises(ValueError, match=r"gate has shape \[3, 16\]; expected \[3, 48\] like x"):
        gated_norm_op(draw(3, 16), draw(3, 48))
    with pytest.raises(TypeError, match=r"gate is torch.float16; expected torch.float32 like x"):
        gated_norm_op(draw(3, 48, dtype=torch.float16), draw(3, 48))


@pytest.mark.usefixtures("triton")
def test_rows_of_no_elements_have_gradients_of_none(device):
    x = torch.empty(3, 0, device=device, requires_grad=True)
    gated_norm(x, x).sum().backward()
    assert x.grad.shape == (3, 0)
