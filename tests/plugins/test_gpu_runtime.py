"""The compiled library on a GPU as a server uses it: many shapes, CUDA graphs, streams, and what goes wrong."""

import random

import pytest
import torch

from benchmarks.plugin_driver import PluginError, PluginLibrary
from tests.plugins.cuda_driver import CudaDriver
from tests.plugins.on_gpu import CHUNK, DTYPES, HEAD_SIZES, STEP, Guarded, draw, outputs_for, relative_error, run, wide
from tnllm_export.plugins.build import PluginOptions, build_plugin

pytestmark = pytest.mark.gpu

SHAPES, ENQUEUES = 1000, 10_000


@pytest.mark.gpu(alone=True)
def test_ten_thousand_enqueues_of_a_thousand_shapes_leave_memory_and_modules_as_they_were(
    gpu_library, plugin_driver, tmp_path
):
    cuda = CudaDriver(gpu_library, tmp_path)
    assert cuda.forward()
    plugins = PluginLibrary(plugin_driver, cuda.library)
    contexts = {op: plugins.create(op).recreate().attach() for op in (CHUNK, STEP)}
    choose = random.Random(0)
    # One buffer for each tensor and the workspace: torch allocates nothing on the way.
    buffers = [torch.zeros(1 << 28, dtype=torch.uint8, device="cuda") for _ in range(9)]

    def bound(op, B, T, H, K, V, dtype):
        rows = (B, H) if op == STEP else (B, T, H)
        shapes = [(dtype, (*rows, K))] * 2 + [(dtype, (*rows, V)), (torch.float32, (H,)), (torch.float32, (B, H, K, V))]
        shapes += [] if op == STEP else [(torch.int32, (B,))]
        shapes += [shapes[2], shapes[4]]
        tensors = []
        for buffer, (kind, shape) in zip(buffers, shapes, strict=False):
            size = kind.itemsize * torch.Size(shape).numel()
            tensors.append(buffer[:size].view(kind).view(shape))
        assert contexts[op].configure(tensors) <= buffers[8].numel()
        return op, tensors

    shapes = set()
    while len(shapes) < SHAPES:
        T = choose.choice((1, 2, 63, 64, 100, 257, 1000, 4096, 8192))
        B = choose.randint(1, min(64, 8192 // T))
        K, V = choose.choice(HEAD_SIZES)
        op = choose.choice((CHUNK, STEP))
        shapes.add((op, B, 1 if op == STEP else T, choose.randint(1, 8), K, V, choose.choice(DTYPES)))
    calls = [bound(*shape) for shape in sorted(shapes, key=str)]

    def enqueue(op, tensors):
        if op == CHUNK:
            tensors[5].fill_(tensors[0].shape[1])
        contexts[op].run(tensors, buffers[8], torch.cuda.current_stream().cuda_stream)

    for call in calls:
        enqueue(*call)
    torch.cuda.synchronize()
    free, modules = torch.cuda.mem_get_info()[0], cuda.state.count("module")
    launched = cuda.state.count("launch")
    for place in range(ENQUEUES):
        enqueue(*calls[place % SHAPES])
    torch.cuda.synchronize()
    print(f"{modules} modules; {free} bytes free before, {torch.cuda.mem_get_info()[0]} after")
    assert cuda.state.count("launch") == launched + ENQUEUES
    assert torch.cuda.mem_get_info()[0] == free
    assert cuda.state.count("module") == modules


@pytest.mark.parametrize(("op", "B", "T"), [(CHUNK, 64, 257), (CHUNK, 2, 1024), (CHUNK, 1, 16384), (STEP, 8, 1)])
def test_a_captured_call_gives_the_same_bits_when_it_is_replayed(plugins, op, B, T):
    inputs = draw(op, B, T, 4, 128, 128, torch.bfloat16)
    plugin = plugins.create(op)
    output, state = outputs_for(inputs)
    tensors = [*inputs, output, state]
    workspace = Guarded(plugin.configure(tensors))
    context = plugin.recreate().attach()
    context.change_shapes(tensors)
    call = context.call(tensors, workspace.tensor)
    graph = torch.cuda.CUDAGraph()
    # Nothing was run before: what a change of shapes loads is all that a capture needs.
    with torch.cuda.graph(graph):
        call(torch.cuda.current_stream().cuda_stream)
    expected = run(plugin, inputs)
    for _ in range(3):
        output.fill_(torch.nan)
        state.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, expected[0])
        assert torch.equal(state, expected[1])
    workspace.check()


def test_a_replayed_step_in_place_goes_on_from_token_to_token(plugins):
    *vectors, slope_rate, state = draw(STEP, 3, 1, 8, 128, 128, torch.float16)
    plugin, expected = plugins.create(STEP, {"in_place": 1}), state
    for _ in range(5):
        _, expected = run(plugin, [*vectors, slope_rate, expected])
    output = torch.full_like(vectors[2], torch.nan)
    context = plugin.recreate().attach()
    tensors = [*vectors, slope_rate, state, output, state]
    context.change_shapes(tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        context.call(tensors, None)(torch.cuda.current_stream().cuda_stream)
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(state, expected)


def test_two_clones_on_two_streams_at_once_do_not_disturb_each_other(plugins):
    plugin = plugins.create(CHUNK)
    inputs = [draw(CHUNK, 1, T, 2, 128, 128, torch.bfloat16, seed=T) for T in (8192, 16384)]
    expected = [run(plugin, x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    runs = []
    for x in inputs:
        results = [outputs_for(x) for _ in range(20)]
        context = plugin.clone().attach()
        context.change_shapes([*x, *results[0]])
        workspace = Guarded(plugin.configure([*x, *results[0]]))
        runs.append((results, [context.call([*x, *result], workspace.tensor) for result in results], workspace))
    torch.cuda.synchronize()
    for calls in zip(*(calls for _, calls, _ in runs), strict=True):
        for stream, call in zip(streams, calls, strict=True):
            call(stream.cuda_stream)
    torch.cuda.synchronize()
    for (results, _, workspace), (output, state) in zip(runs, expected, strict=True):
        workspace.check()
        for found_output, found_state in results:
            assert torch.equal(found_output, output)
            assert torch.equal(found_state, state)


def test_a_library_for_another_gpu_is_refused_by_name(plugin_driver):
    major, minor = torch.cuda.get_device_capability()
    other = 80 if major != 8 else 90
    library = build_plugin(PluginOptions(capabilities=(other,), head_sizes=((64, 64),), dtypes=("float16",)))
    inputs = draw(STEP, 1, 1, 2, 64, 64, torch.float16)
    words = rf"no kernel for compute capability {major}\.{minor} .*tnllm build-plugin --sm {major}{minor}"
    with pytest.raises(PluginError, match=words):
        run(PluginLibrary(plugin_driver, library).create(STEP), inputs)


@pytest.mark.parametrize("op", [CHUNK, STEP])
def test_a_refused_call_leaves_the_device_as_it_was(plugins, op):
    inputs = draw(op, 1, 4096, 2, 64, 64, torch.float32)
    plugin = plugins.create(op)
    expected = run(plugin, inputs)
    tensors = [*inputs, *outputs_for(inputs)]
    context = plugin.attach()
    workspace = Guarded(plugin.configure(tensors))
    for place in range(len(tensors)):
        bad = [x[:0] if i == place else x for i, x in enumerate(tensors)]
        with pytest.raises(PluginError):
            context.call(bad, workspace.tensor)()
    if op == CHUNK:
        with pytest.raises(PluginError, match="no workspace was given"):
            context.run(tensors, None)
    for found, reference in zip(run(plugin, inputs), expected, strict=True):
        assert torch.equal(found, reference)


def test_a_prompt_without_tokens_leaves_the_state_as_it_is(plugins):
    inputs = draw(CHUNK, 2, 0, 3, 64, 128, torch.bfloat16)
    _, state = run(plugins.create(CHUNK), inputs)
    assert torch.equal(state, inputs[4])


def test_a_long_generation_does_not_drift(plugins):
    B, H, K, V, steps = 2, 8, 128, 128, 1000
    *vectors, slope_rate, state = draw(STEP, B, 1, H, K, V, torch.bfloat16)
    expected = wide([*vectors, slope_rate, state])
    output = torch.full_like(vectors[2], torch.nan)
    tensors = [*vectors, slope_rate, state, output, state]
    context = plugins.create(STEP, {"in_place": 1}).recreate().attach()
    context.change_shapes(tensors)
    call = context.call(tensors, None)
    stream = torch.cuda.current_stream().cuda_stream
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(steps):
        for tensor, reference in zip(vectors, expected, strict=False):
            tensor.normal_(generator=generator)
            reference.copy_(tensor)
        call(stream)
        expected[4] = (
            torch.exp(-expected[3])[:, None, None] * expected[4] + expected[1][..., None] * (expected[2][:, :, None])
        )
    # Two roundings for each token, by half a unit at most, which add up as a random walk does.
    assert relative_error(state, expected[4]) <= (2 * steps) ** 0.5 * 2.0**-24
