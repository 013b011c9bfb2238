"""Derivatives of derivatives, forward mode, torch.func's transforms: right, or refused in one line, in every form."""

import pytest
import torch
from torch.autograd import forward_ad

from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.kernels.lightning_attention import (
    lightning_attention,
    lightning_attention_step,
    lightning_attention_step_in_place,
)
from tnllm_export.kernels.lightning_attention.reference import lightning_attention_reference

pytest.importorskip("triton")

LIMIT = 5e-6  # relative; float32 sums of a few hundred terms
OPS = {"eager": lightning_attention, "op": torch.ops.tnllm.lightning_attention}

# PyTorch's forward mode begins with a script.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@pytest.fixture(params=["pytorch", "triton"], autouse=True)
def form(request):
    with use_kernels(request.param):
        yield request.param


@pytest.fixture
def inputs(chunk_inputs, device):
    return [x.to(device) for x in chunk_inputs(2, 70, 2, 16, 16)]


@pytest.fixture
def token(step_inputs, device):
    return [x.to(device) for x in step_inputs(2, 2, 16, 16)]


def loss_of(op, inputs):
    return lambda query: op(query, *inputs[1:])[0].square().sum()


def expected_gradient(query, inputs):
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    leaf = query.detach().double().requires_grad_()
    return torch.autograd.grad(loss_of(lightning_attention_reference, wide)(leaf), leaf)[0]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("power", [1, 2])
def test_a_gradient_of_a_gradient_is_refused_even_where_the_loss_is_linear(inputs, op, power):
    query = inputs[0].requires_grad_()
    output, _ = OPS[op](*inputs)
    (gradient,) = torch.autograd.grad(output.pow(power).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="lightning_attention can be differentiated once"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_a_graph_of_the_gradient_that_nobody_differentiates_harms_nothing(inputs, relative_error, op):
    query = inputs[0].clone().requires_grad_()
    output, _ = OPS[op](query, *inputs[1:])
    (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    assert relative_error(gradient, expected_gradient(query, inputs)) < LIMIT


def test_transforms_differentiate_and_map(inputs, relative_error):
    loss, queries = loss_of(lightning_attention, inputs), torch.stack([inputs[0], inputs[1], inputs[2]])
    expected = torch.stack([expected_gradient(query, inputs) for query in queries])
    assert relative_error(torch.func.grad(loss)(queries[0]), expected[0]) < LIMIT
    assert relative_error(torch.func.jacrev(loss)(queries[0]), expected[0]) < LIMIT
    assert relative_error(torch.func.vmap(torch.func.grad(loss))(queries), expected) < LIMIT
    of_sum = torch.func.grad(lambda x: torch.func.vmap(loss)(x).sum())
    assert relative_error(of_sum(queries), expected) < LIMIT
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.func.grad(lambda query: torch.func.grad(loss)(query).sum())(queries[0])


def test_a_tangent_is_refused_not_lost(inputs, token):
    with pytest.raises(NotImplementedError, match=r"tangent.*reverse mode alone"):
        torch.func.jvp(loss_of(lightning_attention, inputs), (inputs[0],), (inputs[1],))
    with forward_ad.dual_level():
        for op, arguments in ((lightning_attention, inputs), (lightning_attention_step, token)):
            op(*arguments)  # none has a tangent
            dual = forward_ad.make_dual(arguments[0], arguments[1])
            with pytest.raises(NotImplementedError, match="tangent"):
                op(dual, *arguments[1:])


def test_a_step_that_is_asked_for_a_gradient_names_the_op_that_has_one(token):
    query, *others = token
    output, _ = lightning_attention_step(query.requires_grad_(), *others)
    with pytest.raises(RuntimeError, match=r"has no backward.*train with lightning_attention"):
        output.sum().backward()


def test_a_step_in_place_leaves_autograd_alone_but_for_the_states_version(token):
    query, key, value, slope_rate, state = token
    expected, expected_state = lightning_attention_step(query, key, value, slope_rate, state)
    version = state._version
    output = lightning_attention_step_in_place(query.requires_grad_(), key, value, slope_rate, state)
    assert torch.equal(output, expected)
    assert torch.equal(state, expected_state)
    assert not output.requires_grad
    assert not state.requires_grad
    assert state._version > version
    with torch.autocast(state.device.type, torch.bfloat16):
        assert lightning_attention_step_in_place(query, key, value, slope_rate, state).dtype == torch.bfloat16


def test_what_stands_in_padding_does_not_reach_a_gradient(inputs):
    *inputs, _ = inputs
    lengths = torch.tensor([33, 70], dtype=torch.int32, device=inputs[0].device)

    def gradients(padding):
        leaves = [x.clone() for x in inputs]
        for x in leaves[:3]:
            x[0, 33:] = padding
        leaves = [x.requires_grad_() for x in leaves]
        output, state = lightning_attention(*leaves, lengths)
        return torch.autograd.grad(output.sum() + state.sum(), leaves)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tnllm_export.kernels.lightning_attention.form._warn_of_slope_gradient", lambda: None)
        for found, expected in zip(gradients(float("nan")), gradients(0.0), strict=True):
            assert expected.count_nonzero()
            assert torch.equal(found, expected)


def test_a_state_that_is_lazily_negated_is_read_as_what_it_is(inputs):
    state = torch.randn(2, 2, 16, 16, dtype=torch.complex64, device=inputs[0].device).conj().imag
    assert state.is_neg()
    inputs[4] = state
    lazy = lightning_attention(*inputs)
    inputs[4] = state.resolve_neg()
    for found, expected in zip(lazy, lightning_attention(*inputs), strict=True):
        assert torch.equal(found, expected)
