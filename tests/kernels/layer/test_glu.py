"""The product's backward kernel against the two multiplications that it replaces."""

import pytest
import torch

from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.kernels.layer import glu_product
from tnllm_export.kernels.layer.glu import glu_product_op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (3, 21, 48), (257, 63)])
def test_gradients_are_those_of_two_multiplications(draw, device, tolerance, relative_error, shape, dtype):
    factors = [draw(*shape, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1)]
    grad = draw(*shape, dtype=dtype, seed=2)
    product = glu_product(*factors)
    found = torch.autograd.grad(product, factors, grad)
    assert torch.equal(product, factors[0] * factors[1])
    for one, other in zip(found, reversed(factors), strict=True):
        assert relative_error(one, grad.double() * other.double()) < tolerance[dtype]
        if device.type == "cuda":
            assert torch.equal(one, grad * other)


@pytest.mark.usefixtures("triton")
def test_inputs_and_gradients_lie_anywhere(draw):
    a, b = draw(4, 7, 96)[..., 48:].requires_grad_(), draw(4, 48, 7, seed=1).transpose(1, 2).requires_grad_()
    grad = draw(4, 7, 96, seed=2)[..., ::2]
    found = torch.autograd.grad(glu_product(a, b), (a, b), grad)
    for one, other in zip(found, (b, a), strict=True):
        assert torch.equal(one, grad * other)


@pytest.mark.usefixtures("triton")
def test_factors_of_other_shapes_or_dtypes_are_left_to_pytorch(draw):
    a, b = draw(4, 1), draw(4, 16)
    assert torch.equal(glu_product(a.requires_grad_(), b.requires_grad_()), a * b)
    assert glu_product(a, b.half()).dtype == torch.float32


@pytest.mark.usefixtures("triton")
def test_no_elements_are_no_elements(draw):
    a, b = draw(0, 16).requires_grad_(), draw(0, 16).requires_grad_()
    assert torch.autograd.grad(glu_product(a, b).sum(), (a, b))[0].shape == (0, 16)


@pytest.mark.parametrize("choice", ["triton", "pytorch"])
def test_the_op_keeps_the_rules_of_torch_library(draw, choice):
    with use_kernels(choice):
        a, b = draw(3, 96)[:, 48:], draw(3, 48, seed=1)
        torch.library.opcheck(glu_product_op, (a, b))
        torch.library.opcheck(glu_product_op, (a.requires_grad_(), b.requires_grad_()))


def test_inputs_that_do_not_fit_are_named(draw):
    with pytest.raises(ValueError, match=r"a has shape \[3, 16\]; expected \[3, 48\] like b"):
        glu_product_op(draw(3, 16), draw(3, 48))
    with pytest.raises(TypeError, match=r"a is torch.float16; expected torch.float32 like b"):
        glu_product_op(draw(3, 48, dtype=torch.float16), draw(3, 48))
