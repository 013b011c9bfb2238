"""The kernels on a GPU over the grid of sizes, dtypes and cuts. Most of the time goes into compiling: use `-n 12`.

The reference is the blocked form in float64, which `test_op.py` holds against the recurrence.
"""

from itertools import product

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.kernels.lightning_attention import lightning_attention, lightning_attention_step
from tnllm_export.kernels.lightning_attention.blocked import (
    lightning_attention_blocked,
    lightning_attention_blocked_backward,
)
from tnllm_export.kernels.lightning_attention.sweep_plan import SweepPlan, hopper_tiles

pytestmark = pytest.mark.gpu

# float32 products are IEEE; so are the sums.
FLOAT32 = 5e-6
# Half-precision results: no worse than the blocked form, which rounds once, and never above.
HALF, AGAINST_BLOCKED = 5e-3, 1.1
# States are float32 beside half-precision inputs, too; what is not an input goes into products in two parts, 2^-16. In
# float16 the second part of what has decayed to 1e-3 is subnormal, 2^-25, which makes 3e-5 of it.
STATE = 5e-5

SIZES = (16, 48, 64, 80, 128, 256)
TOKENS = (1, 63, 64, 257, 1024, 4096, 4999)  # one segment, some that are recomputed, and a look-back
FEW = ((16, 16), (48, 80), (64, 64), (128, 128), (16, 256), (256, 128), (256, 256))
PLANS = (SweepPlan("none", 1), SweepPlan("recompute", 3), SweepPlan("lookback", 5))
HALVES = (torch.bfloat16, torch.float16)
FORWARD = [
    *((torch.bfloat16, K, V) for K, V in product(SIZES, SIZES)),
    *((dtype, K, V) for dtype in (torch.float16, torch.float32) for K, V in FEW),
]
BACKWARD = list(product((torch.bfloat16, torch.float16, torch.float32), FEW, (63, 257, 4999)))


@pytest.fixture
def on_gpu(chunk_inputs):
    """Draw the chunk op's inputs on the GPU; one row has no tokens."""

    def draw(B, T, H, K, V, dtype=torch.bfloat16):
        inputs = [x.cuda() for x in chunk_inputs(B, T, H, K, V, dtype)]
        if B > 1:
            inputs[5][1] = 0
        return inputs

    return draw


def errors_within_limits(found, reference, blocked, dtype, relative_error):
    """Hold a result in the activations' dtype against the reference, and against the blocked form's own error."""
    error = relative_error(found, reference)
    if dtype == torch.float32:
        assert error <= FLOAT32
    else:
        assert error <= HALF
        assert error <= AGAINST_BLOCKED * relative_error(blocked, reference)


@pytest.mark.parametrize(("dtype", "K", "V"), FORWARD, ids=str)
def test_forward_is_as_good_as_the_blocked_form(on_gpu, in_float64, relative_error, dtype, K, V):
    for T in TOKENS:
        inputs = on_gpu(3, T, 2, K, V, dtype)
        expected_output, expected_state = lightning_attention_blocked(*in_float64(inputs))
        torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
        try:
            output, state = lightning_attention(*inputs)
        finally:
            torch.use_deterministic_algorithms(False)
        with use_kernels("pytorch"):
            blocked, _ = lightning_attention(*inputs)
        errors_within_limits(output, expected_output, blocked, dtype, relative_error)
        assert relative_error(state, expected_state) <= (FLOAT32 if dtype == torch.float32 else STATE)
        again = lightning_attention(*inputs)
        assert torch.equal(again[0], output)
        assert torch.equal(again[1], state)


@pytest.mark.parametrize(("dtype", "sizes", "T"), BACKWARD, ids=str)
def test_gradients_are_as_good_as_those_of_the_blocked_form(on_gpu, in_float64, relative_error, dtype, sizes, T):
    inputs = on_gpu(3, T, 2, *sizes, dtype)
    generator = torch.Generator("cuda").manual_seed(1)
    grad_output, grad_state = (
        torch.randn(x.shape, dtype=torch.float64, device="cuda", generator=generator).to(x.dtype)
        for x in (inputs[2], inputs[4])
    )

    def gradients():
        leaves = [x.detach().requires_grad_(i in (0, 1, 2, 4)) for i, x in enumerate(inputs)]
        results = lightning_attention(*leaves)
        return torch.autograd.grad(results, [leaves[i] for i in (0, 1, 2, 4)], (grad_output, grad_state))

    *expected, _, expected_state = lightning_attention_blocked_backward(
        *in_float64([grad_output, grad_state]), *in_float64(inputs)
    )
    *found, found_state = gradients()
    with use_kernels("pytorch"):
        *blocked, _ = gradients()
    for gradient, reference, peer in zip(found, expected, blocked, strict=True):
        errors_within_limits(gradient, reference, peer, dtype, relative_error)
    assert relative_error(found_state, expected_state) <= (FLOAT32 if dtype == torch.float32 else STATE)
    for gradient, again in zip((*found, found_state), gradients(), strict=True):
        assert torch.equal(gradient, again)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(("K", "V", "which"), [(64, 128, 0), (128, 128, 0), (128, 128, 1), (256, 128, 0), (128, 64, 0)])
def test_the_kernel_for_hopper_is_as_good_as_the_blocked_form_however_it_is_cut(
    on_gpu, in_float64, relative_error, K, V, which, plan
):
    sweep = pytest.importorskip("tnllm_export.kernels.lightning_attention.chunk").sweep
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only Hopper has this kernel")
    tile = hopper_tiles(K, V, "bfloat16")[which]
    for T in (1, 50, 64, 129, 700, 1500):
        inputs = on_gpu(3, T, 8, K, V)
        # Heads that hardly decay, that decay every few chunks, at each chunk, and within a chunk.
        inputs[3] = torch.logspace(-7, 0.7, 8, device="cuda")
        query, key, value, slope_rate, past_state, lengths = inputs
        expected_output, expected_state = lightning_attention_blocked(*in_float64(inputs))
        blocked, _ = lightning_attention_blocked(*inputs)
        output, state = torch.full_like(value, torch.nan), torch.full_like(past_state, torch.nan)
        sweep(*inputs, output, state, tile=tile, plan=plan)
        errors_within_limits(output, expected_output, blocked, value.dtype, relative_error)
        assert relative_error(state, expected_state) <= STATE
        # The gradient of values is a sweep backwards.
        grad_output = torch.randn_like(value)
        nothing = torch.zeros_like(past_state)
        arguments = [grad_output, past_state, query, key, value, slope_rate, nothing, lengths]
        expected_output = lightning_attention_blocked_backward(*in_float64(arguments))[2]
        blocked = lightning_attention_blocked_backward(*arguments)[2]
        output = torch.full_like(value, torch.nan)
        sweep(
            key, query, grad_output, slope_rate, past_state, lengths, output, state, reverse=True, tile=tile, plan=plan
        )
        errors_within_limits(output, expected_output, blocked, value.dtype, relative_error)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(
    ("K", "V", "which", "swept"),
    [(128, 128, 0, 3), (128, 128, 1, 3), (256, 256, 0, 3), (256, 128, 0, 2), (256, 128, 1, 2), (128, 256, 0, 2)],
)
def test_one_launch_of_a_backward_is_as_good_as_the_blocked_form(
    on_gpu, in_float64, relative_error, K, V, which, swept, plan
):
    sweep_back = pytest.importorskip("tnllm_export.kernels.lightning_attention.chunk").sweep_back
    tile = hopper_tiles(V, K, "bfloat16")[which]
    inputs = on_gpu(3, 1500, 2, K, V)
    query, key, value, slope_rate, past_state, lengths = inputs
    # Of a layout that a model's views have: batch and token swapped.
    grad_output = torch.randn(1500, 3, 2, V, device="cuda").to(value.dtype).transpose(0, 1)
    grad_state = torch.randn_like(past_state.mT).mT
    arguments = (query, key, value, grad_output, slope_rate, past_state, grad_state, lengths)
    found = [torch.full_like(x, torch.nan).contiguous() for x in (query, key, value, past_state)]
    written = sweep_back(arguments, tuple(found), tile=tile, plan=plan)
    if written == 0:
        assert torch.cuda.get_device_capability() != (9, 0)
        pytest.skip("only Hopper has this kernel")
    assert written == swept
    *expected, _, expected_state = lightning_attention_blocked_backward(
        *in_float64([grad_output, grad_state]), *in_float64(inputs)
    )
    *blocked, _, _ = lightning_attention_blocked_backward(grad_output, grad_state, *inputs)
    for gradient, reference, peer in list(zip(found, expected, blocked, strict=False))[:swept]:
        errors_within_limits(gradient, reference, peer, value.dtype, relative_error)
    if swept == 3:
        assert relative_error(found[3], expected_state) <= STATE
    # Without the past state's gradient, which may not be written elsewhere then.
    again, kept = [torch.full_like(x, torch.nan) for x in found[:3]], past_state.clone()
    assert sweep_back(arguments, (*again, None), tile=tile, plan=plan) == swept
    assert all(torch.equal(x, y) for x, y in list(zip(found, again, strict=False))[:swept])
    assert torch.equal(past_state, kept)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_the_step_is_exact_but_for_rounding(step_inputs, in_float64, relative_error, dtype):
    for B, (K, V) in product((1, 300), FEW):
        inputs = [x.cuda() for x in step_inputs(B, 4, K, V, dtype)]
        with use_kernels("pytorch"):
            expected_output, expected_state = lightning_attention_step(*in_float64(inputs))
        output, state = lightning_attention_step(*inputs)
        assert relative_error(output, expected_output) <= (
            1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        )
        assert relative_error(state, expected_state) <= 1e-6


def test_pieces_and_single_tokens_continue_each_other(on_gpu, relative_error):
    query, key, value, slope_rate, past_state, _ = on_gpu(1, 4096, 4, 128, 128)
    whole, state = lightning_attention(query, key, value, slope_rate, past_state, _lengths(4096))
    pieces, carried = [], past_state
    for start, stop in ((0, 1000), (1000, 1001), (1001, 4090)):
        piece = slice(start, stop)
        output, carried = lightning_attention(
            query[:, piece], key[:, piece], value[:, piece], slope_rate, carried, _lengths(stop - start)
        )
        pieces.append(output)
    for t in range(4090, 4096):
        output, carried = lightning_attention_step(query[:, t], key[:, t], value[:, t], slope_rate, carried)
        pieces.append(output[:, None])
    assert relative_error(torch.cat(pieces, 1), whole) <= HALF
    assert relative_error(carried, state) <= STATE


def test_a_look_back_finds_its_counters_at_0_however_often_it_is_launched(on_gpu):
    inputs = on_gpu(1, 4999, 4, 128, 128)
    expected, state = lightning_attention(*inputs)
    for _ in range(70):
        output, again = lightning_attention(*inputs)
        assert torch.equal(output, expected)
        assert torch.equal(again, state)


def test_look_backs_of_several_sizes_at_once_on_several_streams_keep_their_states_apart(on_gpu):
    calls = [on_gpu(1, T, 4, K, 128) for T, K in ((4999, 128), (16384, 128), (9001, 256))]
    expected = [lightning_attention(*inputs) for inputs in calls]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    found = []
    for _ in range(12):
        for stream in streams:
            with torch.cuda.stream(stream):
                found += [(i, lightning_attention(*inputs)) for i, inputs in enumerate(calls)]
    torch.cuda.synchronize()
    for i, results in found:
        assert all(torch.equal(x, y) for x, y in zip(results, expected[i], strict=True))


def test_a_row_gives_the_same_alone_and_in_a_batch_with_padding(on_gpu, relative_error):
    query, key, value, slope_rate, past_state, _ = on_gpu(4, 2048, 4, 128, 128)
    lengths = torch.tensor([2048, 1000, 1, 65], dtype=torch.int32, device="cuda")
    output, state = lightning_attention(query, key, value, slope_rate, past_state, lengths)
    for b, n in enumerate(lengths.tolist()):
        row = slice(b, b + 1)
        alone, alone_state = lightning_attention(
            query[row, :n], key[row, :n], value[row, :n], slope_rate, past_state[row], _lengths(n)
        )
        assert relative_error(output[row, :n], alone) <= HALF
        assert relative_error(state[row], alone_state) <= STATE
        assert output[b, n:].count_nonzero() == 0


@pytest.mark.parametrize("T", [64, 1024, 16384])
def test_a_replayed_cuda_graph_gives_the_same_bits(on_gpu, T):
    inputs = on_gpu(1, T, 4, 128, 128)
    leaves = [x.requires_grad_(i < 3) for i, x in enumerate(inputs)]
    grad = torch.randn_like(inputs[2])

    def run():
        output, state = lightning_attention(*leaves)
        return output, state, *torch.autograd.grad(output, leaves[:3], grad)

    expected = [x.detach().clone() for x in run()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        for x in captured:
            x.detach().fill_(torch.nan)
        graph.replay()
        for found, reference in zip(captured, expected, strict=True):
            assert torch.equal(found, reference)


def test_a_graph_of_many_look_backs_sets_their_counters_anew(on_gpu):
    inputs = on_gpu(1, 16384, 4, 128, 128)
    output, state = lightning_attention(*inputs)
    for _ in range(2):  # what one graph leaves is not taken by the next
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = [lightning_attention(*inputs) for _ in range(40)]
        for _ in range(3):
            for x in captured:
                x[0].fill_(torch.nan)
            graph.replay()
            assert all(torch.equal(found, output) and torch.equal(again, state) for found, again in captured)
        again, _ = lightning_attention(*inputs)
        assert torch.equal(again, output)


@pytest.mark.parametrize(("K", "V"), [(64, 128), (128, 128), (256, 128), (80, 48)], ids=str)
def test_what_stands_in_padding_is_never_read(on_gpu, K, V):
    query, key, value, slope_rate, past_state, _ = on_gpu(4, 700, 2, K, V)
    lengths = torch.tensor([700, 1, 65, 511], dtype=torch.int32, device="cuda")
    grad_output = torch.randn_like(value)

    def run():
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        output, state = lightning_attention(*leaves, slope_rate, past_state, lengths)
        return output.detach(), state.detach(), *torch.autograd.grad(output, leaves, grad_output)

    expected = run()
    for b, n in enumerate(lengths.tolist()):
        for x in (query, key, value, grad_output):
            x[b, n:] = torch.nan
    for found, reference in zip(run(), expected, strict=True):
        assert torch.equal(found, reference)


def test_a_step_in_place_can_be_captured(step_inputs):
    from tnllm_export.kernels.lightning_attention.step_kernel import step

    query, key, value, slope_rate, state = (x.cuda() for x in step_inputs(2, 4, 128, 128, torch.bfloat16))
    expected = state
    for _ in range(3):
        _, expected = lightning_attention_step(query, key, value, slope_rate, expected)
    output, start = torch.empty_like(value), state.clone()
    graph = torch.cuda.CUDAGraph()
    step(query, key, value, slope_rate, state, output, state)
    with torch.cuda.graph(graph):
        step(query, key, value, slope_rate, state, output, state)
    state.copy_(start)
    for _ in range(3):
        graph.replay()
    assert torch.equal(state, expected)


def test_kernels_that_start_early_wait_for_what_they_read(on_gpu, step_inputs):
    chunk_inputs = on_gpu(1, 2048, 4, 128, 128)
    step_tensors = [x.cuda() for x in step_inputs(4, 8, 128, 128, torch.bfloat16)]

    def chain():
        """Each kernel reads what the one before has just written."""
        query, key, value, slope_rate, state, lengths = chunk_inputs
        for _ in range(4):
            value, state = lightning_attention(query, key, value, slope_rate, state, lengths)
        q, k, v, slope, decoded = step_tensors
        for _ in range(16):
            v, decoded = lightning_attention_step(q, k, v, slope, decoded)
        return value, state, v, decoded

    expected = [x.clone() for x in _one_by_one(chain)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(20):
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        for found, reference in zip(captured, expected, strict=True):
            assert torch.equal(found, reference)


def test_two_streams_at_once_do_not_disturb_each_other(on_gpu):
    inputs = [on_gpu(1, T, 2, 128, 128) for T in (8192, 16384)]
    expected = [lightning_attention(*x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(20):
        for stream, x, kept in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(lightning_attention(*x))
    torch.cuda.synchronize()
    for kept, (output, state) in zip(results, expected, strict=True):
        assert len(kept) == 20
        for found_output, found_state in kept:
            assert torch.equal(found_output, output)
            assert torch.equal(found_state, state)


def test_compiled_checkpointed_and_eager_agree_under_autocast(on_gpu):
    inputs = on_gpu(2, 300, 2, 64, 64, torch.float32)

    def gradients(function):
        leaves = [x.detach().requires_grad_(i < 3) for i, x in enumerate(inputs)]
        with torch.autocast("cuda", torch.bfloat16):
            output, state = function(*leaves)
        assert output.dtype == torch.bfloat16
        assert state.dtype == torch.float32
        return output, state, *torch.autograd.grad(output.float().square().sum(), leaves[:3])

    expected = gradients(lightning_attention)
    compiled = torch.compile(lightning_attention, fullgraph=True)
    for function in (compiled, lambda *x: checkpoint(lightning_attention, *x, use_reentrant=False)):
        for found, reference in zip(gradients(function), expected, strict=True):
            assert torch.equal(found, reference)


# PyTorch captures an empty graph to keep its memory, whose warning it drops but for what makes errors of warnings.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_cuda_graphs_of_compiled_code_find_nothing_left_in_their_memory(on_gpu):
    inputs = on_gpu(1, 4999, 4, 128, 128)
    grad = torch.randn_like(inputs[2])

    def gradients(function):
        leaves = [x.detach().requires_grad_(i < 3) for i, x in enumerate(inputs)]
        output, _ = function(*leaves)
        return output.detach().clone(), *(x.clone() for x in torch.autograd.grad(output, leaves[:3], grad))

    expected = gradients(lightning_attention)
    compiled = torch.compile(lightning_attention, mode="reduce-overhead", fullgraph=True)
    for _ in range(5):  # warms up, records, replays
        for found, reference in zip(gradients(compiled), expected, strict=True):
            assert torch.equal(found, reference)


def test_ops_keep_the_rules_of_torch_library(on_gpu, step_inputs):
    inputs = on_gpu(2, 100, 2, 32, 16)
    leaves = [x.detach().requires_grad_(i in (0, 1, 2, 4)) for i, x in enumerate(inputs)]
    grads = [torch.ones_like(inputs[2]), torch.ones_like(inputs[4])]
    torch.library.opcheck(torch.ops.tnllm.lightning_attention.default, leaves)
    torch.library.opcheck(torch.ops.tnllm.lightning_attention_backward.default, [*grads, *inputs])
    torch.library.opcheck(
        torch.ops.tnllm.lightning_attention_step.default, [x.cuda() for x in step_inputs(2, 2, 32, 16)]
    )


@pytest.mark.gpu(alone=True)
def test_tensors_of_more_than_two_to_the_31_elements(relative_error):
    B, T, H, D = 2, (1 << 19) + 100, 32, 128
    x = 0.2 * torch.randn(B, T, H, D, dtype=torch.bfloat16, device="cuda")
    assert x.stride(0) > 1 << 31
    # So fast a decay that only the last tokens matter for the last tokens.
    slope_rate = torch.linspace(0.05, 1, H, device="cuda")
    past_state = torch.randn(B, H, D, D, device="cuda")
    lengths = torch.tensor([T, T - 37], dtype=torch.int32, device="cuda")
    output, state = lightning_attention(x, x, x, slope_rate, past_state, lengths)
    tail = x[:, -2048:].double()
    wanted = (tail, tail, tail, slope_rate.double(), torch.zeros_like(past_state).double(), lengths - (T - 2048))
    expected, expected_state = lightning_attention_blocked(*wanted)
    assert relative_error(output[:, -1024:], expected[:, -1024:]) <= HALF
    assert relative_error(state, expected_state) <= STATE


def test_the_gradient_of_slope_rate_takes_bounded_memory(on_gpu, relative_error, in_float64):
    inputs = on_gpu(1, 20_000, 4, 64, 64, torch.float32)
    slope_rate = inputs[3].requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with pytest.warns(UserWarning, match="slope_rate requires a gradient"):
        (found,) = torch.autograd.grad(lightning_attention(*inputs)[0].square().sum(), slope_rate)
    assert torch.cuda.max_memory_allocated() - before < 12 * inputs[0].nbytes
    leaves = in_float64(inputs)
    leaves[3].requires_grad_()
    (expected,) = torch.autograd.grad(lightning_attention(*leaves)[0].square().sum(), leaves[3])
    assert relative_error(found, expected) <= 1e-4


def _one_by_one(run, monkeypatch=pytest.MonkeyPatch):
    """Run with a synchronisation after each kernel."""
    from tnllm_export.kernels.lightning_attention import chunk, step_kernel
    from tnllm_export.kernels.lightning_attention.hopper_launch import HopperLaunch

    def waiting(launch):
        def launch_and_wait(*args, **kwargs):
            launch(*args, **kwargs)
            torch.cuda.synchronize()

        return launch_and_wait

    with monkeypatch.context() as patch:
        for module in (chunk, step_kernel):
            patch.setattr(module, "launch", waiting(module.launch))
        patch.setattr(HopperLaunch, "__call__", waiting(HopperLaunch.__call__))
        return run()


def _lengths(n):
    return torch.tensor([n], dtype=torch.int32, device="cuda")
