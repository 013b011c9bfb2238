"""The split into heads against float64 autograd of its formula, with the float32 angles that it is defined by."""

import pytest
import torch

from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.kernels.layer import split_heads
from tnllm_export.kernels.layer.heads import split_heads_backward, split_heads_op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1, 1, 16), (3, 21, 3, 48), (2, 63, 2, 128), (1, 257, 1, 16)]
GPU_SHAPES = [(1, 1, 16, 128), (2, 257, 16, 128), (1, 1000, 8, 64), (3, 63, 3, 96), (2, 1025, 32, 128), (1, 63, 2, 256)]


def learned_theta(H, D, device):
    return (10000 ** (-2 / (H * D) * torch.arange(H * D, dtype=torch.float32))).reshape(H, 1, D).to(device)


def token_positions(B, T, device):
    """Each row starts elsewhere, the last one where a float16 or bfloat16 angle would mean nothing."""
    return torch.arange(T, device=device) + torch.linspace(100_000, 0, B, device=device).long()[:, None]


def reference(projected, heads, theta, positions, grads):
    projected = projected.detach().double().requires_grad_()
    q, k, v, gate = projected.chunk(4, dim=-1)
    q, k = (x * torch.sigmoid(x) for x in (q, k))
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    leaves = [projected]
    if theta is not None:
        theta = theta.detach().double().requires_grad_()
        leaves.append(theta)
        angles = positions[..., None, None] * theta[:, 0]
        # Rounded to float32, as everywhere; the gradient passes through.
        angles = angles + ((positions.float()[..., None, None] * theta[:, 0].float()).double() - angles).detach()
        q, k = (torch.cat((x * angles.cos(), x * angles.sin()), -1) for x in (q, k))
    outputs = (q, k, v, gate)
    return *outputs, *torch.autograd.grad(outputs, leaves, [grad.double() for grad in grads])


def check(projected, heads, rotated, tolerance, relative_error, draw):
    B, T, width = projected.shape
    D = width // 4 // heads
    theta = learned_theta(heads, D, projected.device).requires_grad_() if rotated else None
    positions = token_positions(B, T, projected.device) if rotated else None
    leaf = projected.detach().requires_grad_()
    outputs = split_heads(leaf, heads, theta, positions)
    grads = [draw(*output.shape, dtype=output.dtype, seed=10 + i) for i, output in enumerate(outputs)]
    leaves = [leaf, theta] if rotated else [leaf]
    found = (*outputs, *torch.autograd.grad(outputs, leaves, grads))
    names = ("query", "key", "value", "gate", "projected", "theta")
    expected = reference(projected, heads, theta, positions, grads)
    for name, one, other in zip(names, found, expected, strict=False):
        # theta's gradient stays in float32 and adds up terms as large as the positions, which cancel.
        limit = 5e-6 if name == "theta" else tolerance[projected.dtype]
        assert relative_error(one, other) < limit, name
    assert len(found) == len(expected) == 5 + rotated


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "LRPE"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_directions_are_the_formula(draw, tolerance, relative_error, shape, dtype, rotated):
    B, T, H, D = shape
    check(draw(B, T, 4 * H * D, dtype=dtype), H, rotated, tolerance, relative_error, draw)


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "LRPE"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_every_shape_is_the_formula_on_a_gpu(draw, tolerance, relative_error, shape, dtype, rotated):
    B, T, H, D = shape
    check(draw(B, T, 4 * H * D, dtype=dtype), H, rotated, tolerance, relative_error, draw)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "LRPE"])
def test_the_projection_lies_anywhere(draw, tolerance, relative_error, rotated):
    wide = draw(4, 9, 200)
    for view in (wide[..., :192], wide[:, 2:7, 8:], wide[::2, ::3, 8:], wide.transpose(0, 1)[..., :192]):
        check(view, 3, rotated, tolerance, relative_error, draw)


@pytest.mark.usefixtures("triton")
def test_value_and_gate_are_views_of_the_projection(draw):
    projected = draw(2, 5, 128)
    _, _, value, gate = split_heads(projected, 2)
    assert value.data_ptr() == projected[..., 64:].data_ptr()
    assert gate.data_ptr() == projected[..., 96:].data_ptr()


@pytest.mark.usefixtures("triton")
def test_parts_without_a_gradient_count_as_zero(draw):
    projected = draw(2, 5, 128).requires_grad_()
    query, *_ = split_heads(projected, 2)
    (grad,) = torch.autograd.grad(query.sum(), projected)
    assert grad[..., :32].count_nonzero() > 0
    assert grad[..., 32:].count_nonzero() == 0


@pytest.mark.usefixtures("triton")
def test_no_tokens_are_no_tokens(draw):
    projected = draw(2, 0, 128).requires_grad_()
    theta = learned_theta(2, 16, projected.device).requires_grad_()
    outputs = split_heads(projected, 2, theta, token_positions(2, 0, projected.device))
    assert [output.shape for output in outputs] == [(2, 0, 2, 32), (2, 0, 2, 32), (2, 0, 2, 16), (2, 0, 32)]
    grads = torch.autograd.grad(sum(output.sum() for output in outputs), (projected, theta))
    assert grads[0].shape == (2, 0, 128)
    assert grads[1].count_nonzero() == 0


@pytest.mark.usefixtures("triton")
def test_two_runs_are_bit_equal(draw):
    def run():
        projected = draw(2, 63, 192).requires_grad_()
        theta = learned_theta(3, 16, projected.device).requires_grad_()
        query, key, _, _ = split_heads(projected, 3, theta, token_positions(2, 63, projected.device))
        return query, key, *torch.autograd.grad((query * key).sum(), (projected, theta))

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


@pytest.mark.parametrize("choice", ["triton", "pytorch"])
def test_the_ops_keep_the_rules_of_torch_library(draw, choice):
    projected = draw(2, 5, 192)
    theta, positions = learned_theta(3, 16, projected.device), token_positions(2, 5, projected.device)
    with use_kernels(choice):
        for angles, where, width in ((theta, positions, 32), (None, None, 16)):
            torch.library.opcheck(split_heads_op, (projected, 3, angles, where))
            grads = [draw(2, 5, 3, width), draw(2, 5, 3, width), draw(2, 5, 3, 16), draw(2, 5, 48)]
            for learn in {False, angles is not None}:
                torch.library.opcheck(split_heads_backward, (*grads, projected, 3, angles, where, learn))


def test_the_backward_in_pytorch_is_the_formula_too(draw, relative_error):
    projected = draw(2, 5, 192, dtype=torch.float64)
    theta = learned_theta(3, 16, projected.device).double()
    positions = token_positions(2, 5, projected.device) % 1000  # where float32 and float64 angles hardly differ
    for angles, width in ((theta, 32), (None, 16)):
        shapes = ((2, 5, 3, width), (2, 5, 3, width), (2, 5, 3, 16), (2, 5, 48))
        grads = [draw(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes)]
        with use_kernels("pytorch"):
            found = split_heads_backward(*grads, projected, 3, angles, positions, angles is not None)
            leaf = projected.detach().requires_grad_()
            leaves = [leaf] if angles is None else [leaf, angles.requires_grad_()]
            expected = torch.autograd.grad(split_heads(leaf, 3, angles, positions), leaves, grads)
        for one, other in zip(found, expected, strict=False):
            assert relative_error(one, other) < 1e-12


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_positions_may_be_one_row_for_all_and_of_any_integers(device, draw, kind):
    projected, theta = draw(3, 21, 4 * 32), learned_theta(2, 16, device)
    row = torch.arange(100, 121, device=device)[None]
    expected = split_heads(projected, 2, theta, row.expand(3, 21).contiguous())
    for found, other in zip(split_heads(projected, 2, theta, row.to(kind)), expected, strict=True):
        assert torch.equal(found, other)


@pytest.mark.usefixtures("triton")
def test_positions_that_are_no_integers_are_refused(device, draw):
    with pytest.raises(TypeError, match=r"positions is torch.float32; expected torch.int64"):
        split_heads(draw(1, 3, 64), 1, learned_theta(1, 16, device), torch.zeros(1, 3, device=device))
