"""Which form computes an op, and that all ways to call it agree: traced, differentiated, under autocast."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.kernels.lightning_attention import form, lightning_attention, lightning_attention_step
from tnllm_export.kernels.lightning_attention.blocked import lightning_attention_blocked_backward
from tnllm_export.kernels.lightning_attention.reference import lightning_attention_reference
from tnllm_export.kernels.lightning_attention.slope_gradient import slope_gradient_in_pieces

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")

# Output and gradients; see test_sweep.py. A gradient's inputs, do among them, have been rounded once more.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 2.0**-7}


@pytest.fixture
def calls(monkeypatch):
    """Names of the Triton forms in the order in which they ran."""
    pytest.importorskip("triton")
    seen = []
    for module in (form.triton_chunk(), form.triton_step()):
        for name in vars(module).copy():
            if name.startswith("lightning_attention") and "triton" in name:
                original = getattr(module, name)

                def called(*args, name=name, original=original, **options):
                    seen.append(name)
                    return original(*args, **options)

                monkeypatch.setattr(module, name, called)
    return seen


def leaves_of(inputs):
    """Inputs whose activations and state want gradients, as a model in training has them."""
    return [x.detach().clone().requires_grad_(i in (0, 1, 2, 4)) for i, x in enumerate(inputs)]


def loss_of(output: Tensor, state: Tensor) -> Tensor:
    return output.to(state.dtype).sin().sum() + state.square().sum()


def gradients(function, inputs, wanted=(0, 1, 2, 4)):
    leaves = leaves_of(inputs)
    results = function(*leaves)
    return torch.autograd.grad(loss_of(*results), [leaves[i] for i in wanted])


def test_the_cpu_computes_in_pytorch_unless_triton_is_asked_for(calls, chunk_inputs, step_inputs):
    chunk, step = chunk_inputs(1, 5, 1, 16, 16), step_inputs(1, 1, 16, 16)
    lightning_attention(*chunk)
    lightning_attention_step(*step)
    assert calls == []
    with use_kernels("triton"):
        gradients(lightning_attention, chunk)
        lightning_attention_step(*step)
    assert calls == [
        "lightning_attention_triton",
        "lightning_attention_triton_backward",
        "lightning_attention_step_triton",
    ]
    with use_kernels("pytorch"):
        lightning_attention(*chunk)
    assert len(calls) == 3


@pytest.mark.usefixtures("triton")
def test_float64_is_computed_in_pytorch_without_a_word(calls, chunk_inputs, step_inputs):
    lightning_attention(*chunk_inputs(1, 5, 1, 16, 16, torch.float64))
    lightning_attention_step(*step_inputs(1, 1, 16, 16, torch.float64))
    assert calls == []


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(("K", "V"), [(20, 16), (16, 8), (272, 16), (16, 272)])
def test_a_size_without_a_kernel_is_warned_of_once_and_computed_in_pytorch(calls, chunk_inputs, K, V):
    form._warn_of_size.cache_clear()
    inputs = chunk_inputs(1, 5, 1, K, V)
    with pytest.warns(UserWarning, match=f"found heads of {K} keys and {V} values.*multiples of 16 up to 256"):
        found = lightning_attention(*inputs)
    again = lightning_attention(*inputs)
    assert calls == []
    with use_kernels("pytorch"):
        expected = lightning_attention(*inputs)
    for results in (found, again):
        assert torch.equal(results[0], expected[0])
        assert torch.equal(results[1], expected[1])


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 2, 16, 32), (1, 1, 1, 48, 16), (2, 65, 1, 32, 80)], ids=str)
def test_gradients_of_triton_are_those_of_the_recurrence(
    chunk_inputs, in_float64, relative_error, device, shape, dtype
):
    inputs = chunk_inputs(*shape, dtype)
    expected = gradients(lightning_attention_reference, in_float64(inputs))
    found = gradients(lightning_attention, [x.to(device) for x in inputs])
    for name, gradient, reference in zip(("query", "key", "value", "past_state"), found, expected, strict=True):
        assert relative_error(gradient, reference) < TOLERANCE[dtype], name


@pytest.mark.usefixtures("triton")
def test_gradients_agree_with_differences_of_the_loss(chunk_inputs, device):
    inputs = [x.to(device) for x in chunk_inputs(2, 40, 1, 16, 16)]
    found = gradients(lightning_attention, inputs)
    generator = torch.Generator().manual_seed(1)
    for index, gradient in zip((0, 1, 2, 4), found, strict=True):
        direction = torch.randn(gradient.shape, generator=generator).to(device)
        direction = direction / direction.norm()
        step = 3e-3
        ends = []
        for sign in (step, -step):
            moved = [*inputs[:index], inputs[index] + sign * direction, *inputs[index + 1 :]]
            ends.append(loss_of(*(x.double() for x in lightning_attention(*moved))).item())
        # Results of float32, 1e-7 of a loss of a few hundred, over the step; and the step's square.
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((gradient * direction).sum().item(), abs=5e-3)


@pytest.mark.usefixtures("triton")
def test_an_absent_gradient_of_a_result_counts_as_zero(chunk_inputs, relative_error, in_float64, device):
    inputs = chunk_inputs(2, 40, 1, 16, 16)
    for select in (lambda output, state: output.square().sum(), lambda output, state: state.square().sum()):
        results = []
        for function, tensors in (
            (lightning_attention_reference, in_float64(inputs)),
            (lightning_attention, [x.to(device) for x in inputs]),
        ):
            leaves = leaves_of(tensors)
            results.append(torch.autograd.grad(select(*function(*leaves)), [leaves[1], leaves[2], leaves[4]]))
        for expected, found in zip(*results, strict=True):
            assert relative_error(found, expected) < 5e-6


def test_the_gradient_of_slope_rate_is_computed_when_it_is_learned(chunk_inputs, relative_error, in_float64, device):
    pytest.importorskip("triton")
    inputs = chunk_inputs(2, 40, 2, 16, 32)
    expected = gradients_with_slope(lightning_attention_reference, in_float64(inputs))
    form._warn_of_slope_gradient.cache_clear()
    with use_kernels("triton"), pytest.warns(UserWarning, match="slope_rate requires a gradient"):
        found = gradients_with_slope(lightning_attention, [x.to(device) for x in inputs])
    for gradient, reference in zip(found, expected, strict=True):
        assert relative_error(gradient, reference) < 5e-6


def gradients_with_slope(function, inputs):
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    return torch.autograd.grad(loss_of(*function(*leaves)), leaves[:5])


def test_the_gradient_of_slope_rate_in_pieces_is_that_of_the_whole(chunk_inputs, relative_error):
    inputs = chunk_inputs(2, 2100, 1, 16, 16, torch.float64)
    inputs[5][1] = 1500
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (inputs[2], inputs[4])]
    *_, expected, _ = lightning_attention_blocked_backward(*grads, *inputs)
    assert relative_error(slope_gradient_in_pieces(*grads, *inputs), expected) < 1e-12


def test_the_gradient_of_slope_rate_without_tokens_is_zero(chunk_inputs):
    inputs = chunk_inputs(2, 0, 2, 16, 16)
    grad = slope_gradient_in_pieces(inputs[2], inputs[4], *inputs)
    assert torch.equal(grad, torch.zeros(2))


@pytest.mark.parametrize("choice", ["pytorch", "triton"])
def test_autocast_casts_activations_and_nothing_else(chunk_inputs, step_inputs, device, choice):
    pytest.importorskip("triton")
    half = torch.bfloat16
    query, key, value, *rest = (x.to(device) for x in chunk_inputs(2, 40, 2, 16, 16))
    step_query, step_key, step_value, *step_rest = (x.to(device) for x in step_inputs(2, 2, 16, 16))
    with use_kernels(choice):
        expected = lightning_attention(query.to(half), key.to(half), value.to(half), *rest)
        step_expected = lightning_attention_step(
            step_query.to(half), step_key.to(half), step_value.to(half), *step_rest
        )
        with torch.autocast(device.type, half):
            found = lightning_attention(query, key.to(half), value, *rest)
            step_found = lightning_attention_step(step_query, step_key.to(half), step_value, *step_rest)
            wide = lightning_attention(*(x.double() for x in (query, key, value, *rest[:2])), rest[2])
    assert wide[0].dtype == torch.float64
    for results, references in ((found, expected), (step_found, step_expected)):
        assert results[0].dtype == half
        assert results[1].dtype == torch.float32
        assert torch.equal(results[0], references[0])
        assert torch.equal(results[1], references[1])


@pytest.mark.usefixtures("triton")
def test_autocast_returns_gradients_in_the_dtype_of_the_inputs(chunk_inputs, device):
    inputs = [x.to(device) for x in chunk_inputs(1, 20, 1, 16, 16)]
    with torch.autocast(device.type, torch.bfloat16):
        found = gradients(lightning_attention, inputs)
    halves = [x.bfloat16() if i < 3 else x for i, x in enumerate(inputs)]
    for gradient, expected in zip(found, gradients(lightning_attention, halves), strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected.float())


@pytest.mark.usefixtures("triton")
def test_activation_checkpointing_changes_no_bit(chunk_inputs, device):
    inputs = [x.to(device) for x in chunk_inputs(1, 20, 1, 16, 16)]
    plain = gradients(lightning_attention, inputs)
    again = gradients(lambda *x: checkpoint(lightning_attention, *x, use_reentrant=False), inputs)
    for gradient, expected in zip(again, plain, strict=True):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("choice", ["pytorch", "triton"])
def test_compiled_and_eager_agree(chunk_inputs, step_inputs, device, choice):
    pytest.importorskip("triton")
    inputs = [x.to(device) for x in chunk_inputs(2, 40, 2, 16, 16)]
    step = [x.to(device) for x in step_inputs(2, 2, 16, 16)]
    torch.compiler.reset()

    def chunk_and_more(*x):
        output, state = lightning_attention(*x)
        return 2 * output, state + 1

    compiled = torch.compile(chunk_and_more, fullgraph=True, backend="aot_eager")
    compiled_step = torch.compile(lightning_attention_step, fullgraph=True, backend="aot_eager")
    with use_kernels(choice):
        for found, expected in zip(compiled(*inputs), chunk_and_more(*inputs), strict=True):
            assert torch.equal(found, expected)
        for found, expected in zip(gradients(compiled, inputs), gradients(chunk_and_more, inputs), strict=True):
            assert torch.equal(found, expected)
        for found, expected in zip(compiled_step(*step), lightning_attention_step(*step), strict=True):
            assert torch.equal(found, expected)


def test_tracers_see_one_op(chunk_inputs):
    class Model(torch.nn.Module):
        def forward(self, *x):
            return lightning_attention(*x)

    inputs = tuple(chunk_inputs(2, 40, 2, 16, 16))
    for strict in (False, True):
        program = torch.export.export(Model(), inputs, strict=strict)
        ops = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert [name for name in ops if "getitem" not in name] == ["tnllm.lightning_attention.default"]


def test_transforms_see_the_op(chunk_inputs):
    pairs = list(zip(chunk_inputs(2, 20, 1, 16, 16, seed=0), chunk_inputs(2, 20, 1, 16, 16, seed=1), strict=True))
    found = torch.func.vmap(lightning_attention)(*(torch.stack(pair) for pair in pairs))
    for i in (0, 1):
        for batched, expected in zip(found, lightning_attention(*(pair[i] for pair in pairs)), strict=True):
            assert torch.equal(batched[i], expected)


@pytest.mark.usefixtures("triton")
def test_ops_on_triton_keep_the_rules_of_torch_library(chunk_inputs, step_inputs, device):
    ops = torch.ops.tnllm
    inputs = [x.to(device) for x in chunk_inputs(2, 20, 1, 16, 32)]
    grads = [torch.ones_like(inputs[2]), torch.ones_like(inputs[4])]
    torch.library.opcheck(ops.lightning_attention.default, leaves_of(inputs))
    torch.library.opcheck(ops.lightning_attention_backward.default, [*grads, *inputs])
    torch.library.opcheck(ops.lightning_attention_step.default, [x.to(device) for x in step_inputs(2, 1, 16, 32)])
    with use_kernels("pytorch"):
        torch.library.opcheck(ops.lightning_attention_slope_gradient.default, [*grads, *inputs])
