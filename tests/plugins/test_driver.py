"""What the launcher tells the CUDA driver, and what becomes of the driver's errors: with a driver of our own."""

from itertools import product

import pytest
import torch

from benchmarks.plugin_driver import RUNTIME, PluginError, PluginLibrary
from tests.plugins.cuda_driver import CudaDriver
from tests.plugins.fake import CHUNK_ARGUMENTS, MAP_ARGUMENTS, STEP_ARGUMENTS, fake
from tnllm_export.kernels.compiled import KernelTable
from tnllm_export.plugins.library import build_library

CHUNK, STEP = "LightningAttention", "LightningAttentionStep"
K, V = 96, 48


@pytest.fixture
def cuda(library, tmp_path):
    return CudaDriver(library, tmp_path)


@pytest.fixture
def plugins(plugin_driver, cuda):
    return PluginLibrary(plugin_driver, cuda.library)


def tensors(op, B, T, H, dtype=torch.bfloat16):
    """Inputs and outputs without memory for the larger ones, at addresses that no two share."""
    rows = (B, H) if op == STEP else (B, T, H)
    shapes = [(dtype, (*rows, K)), (dtype, (*rows, K)), (dtype, (*rows, V))]
    shapes += [(torch.float32, (H,)), (torch.float32, (B, H, K, V))]
    shapes += [] if op == STEP else [(torch.int32, (B,))]
    shapes += [(dtype, (*rows, V)), (torch.float32, (B, H, K, V))]
    return [Placed(dtype, shape, 4096 * (place + 1)) for place, (dtype, shape) in enumerate(shapes)]


class Placed(torch.Tensor):
    """A tensor on no device, which claims an address."""

    def __new__(cls, dtype, shape, address):
        made = torch.empty(shape, dtype=dtype, device="meta").as_subclass(cls)
        made.address = address
        return made

    def data_ptr(self):
        return self.address


def placed(tensor, address):
    return Placed(tensor.dtype, tensor.shape, address)


WORKSPACE = Placed(torch.int8, (1,), 1 << 20)


@pytest.mark.parametrize("op", [CHUNK, STEP])
def test_a_kernel_is_told_addresses_and_strides_that_need_more_than_32_bits(cuda, plugins, op):
    B, T, H = 2, 1 << 21, 32
    bound = tensors(op, B, T, H)
    plugin = plugins.create(op).recreate().attach()
    names = CHUNK_ARGUMENTS if op == CHUNK else STEP_ARGUMENTS
    cuda.state.argument_count = len(names)
    plugin.run(bound, WORKSPACE)
    assert cuda.state.count("launch") == 1
    told = dict(zip(names, cuda.state.arguments, strict=False))
    keys = ["query", "key", "value", "slope_rate", "past_state", *(["lengths"] if op == CHUNK else [])]
    for name, tensor in zip([*keys, "output", "present_state"], bound, strict=True):
        assert told[name] == tensor.address
    assert told["H"] == H
    assert told["query_stride_b"] == (T * H * K if op == CHUNK else H * K)
    assert cuda.state.threads == 128
    if op == CHUNK:
        assert told["query_stride_b"] > 1 << 32
        assert (told["T"], told["past_stride_k"]) == (T, V)
        columns = B * H * 3
        assert tuple(cuda.state.grid) == (columns, 1, 1)
        assert cuda.state.count("memset") == 0
    else:
        assert cuda.state.grid[0] == B * H * 3


def test_a_kernel_is_told_tensor_maps_of_dense_activations(plugin_driver, cache, tmp_path):
    handovers = ("none", "recompute", "lookback")
    kernels = [fake(CHUNK, 86, "bfloat16", K, V, 16, 64, handover, MAP_ARGUMENTS) for handover in handovers]
    library = build_library(KernelTable(tuple(kernels), recompute_chunks=256, step_programs=16), cache=cache)
    cuda = CudaDriver(library, tmp_path)
    plugin = PluginLibrary(plugin_driver, cuda.library).create(CHUNK)
    B, T, H = 2, 1 << 21, 32
    bound = tensors(CHUNK, B, T, H)
    cuda.state.argument_count = len(MAP_ARGUMENTS)
    plugin.run(bound, WORKSPACE)
    assert (cuda.state.count("map"), cuda.state.count("launch")) == (4, 1)
    told = dict(zip(MAP_ARGUMENTS, cuda.state.arguments, strict=False))
    for name, tensor in zip(("query", "key", "value"), bound, strict=False):
        assert told[f"{name}_map"] == tensor.address  # with which this driver's maps begin
    assert told["output_map"] == told["output"] == bound[6].address
    assert told["unused"] == 0
    assert (told["T"], told["H"], told["output_stride_t"]) == (T, H, H * V)
    assert told["output_stride_b"] == T * H * V > 1 << 31
    # The output's map was made last.
    assert tuple(cuda.state.map_sizes) == (V, H, T, B)
    assert tuple(cuda.state.map_strides) == (2 * V, 2 * H * V, 2 * T * H * V)
    assert tuple(cuda.state.map_block) == (64, 1, 64, 1)
    cuda.state.fail("map")
    with pytest.raises(PluginError, match=r"kernel .* could not be launched: CUDA_ERROR"):
        plugin.run(bound, WORKSPACE)
    assert cuda.state.count("launch") == 1


@pytest.mark.parametrize("capability", [86, 120])
@pytest.mark.parametrize("op", [CHUNK, STEP])
def test_only_a_kernel_that_waits_for_the_one_before_is_launched_while_that_one_ends(cuda, plugins, op, capability):
    cuda.state.capability = capability
    bound = tensors(op, 1, 1, 32)
    plugins.create(op).run(bound, WORKSPACE)
    assert cuda.state.count("launch") == 1
    assert cuda.state.grid[0] > 0
    assert cuda.state.overlaps == (op == STEP and capability == 120)


def test_a_look_back_begins_with_cleared_counters_in_the_workspace(cuda, plugins):
    bound = tensors(CHUNK, 1, 16384, 1)
    cuda.state.argument_count = len(CHUNK_ARGUMENTS)
    plugin = plugins.create(CHUNK)
    assert plugin.configure(bound) > 0
    plugin.run(bound, WORKSPACE)
    told = dict(zip(CHUNK_ARGUMENTS, cuda.state.arguments, strict=False))
    columns, segments = cuda.state.grid[:2]
    assert columns == 3
    assert segments > 4
    assert cuda.state.count("memset") == 1
    assert tuple(cuda.state.memset) == (WORKSPACE.address, 1 + columns * segments)
    assert told["progress"] == WORKSPACE.address
    assert told["carry"] == WORKSPACE.address + -(-4 * (1 + columns * segments) // 256) * 256


def test_a_kernel_is_loaded_once_for_all_shapes_clones_and_contexts(cuda, plugins):
    first = plugins.create(CHUNK)
    plugins_ = [first, first.clone(), first.recreate().attach(), plugins.create(CHUNK, {"in_place": 1})]
    shapes = list(product((1, 2, 7), (1, 63, 257, 5000, 16384), (1, 5, 32)))
    for B, T, H in shapes:
        for plugin in plugins_:
            plugin.run(tensors(CHUNK, B, T, H), WORKSPACE)
    # Three ways to hand states over.
    assert cuda.state.count("module") == cuda.state.count("function") == 3
    assert cuda.state.count("launch") == len(shapes) * len(plugins_)


def test_enqueue_loads_nothing_that_a_change_of_shapes_has_not(cuda, plugins):
    plugin = plugins.create(STEP)
    bound = tensors(STEP, 64, 1, 5)
    plugin.change_shapes(bound)
    assert (cuda.state.count("module"), cuda.state.count("launch")) == (1, 0)
    call = plugin.call(bound, None)
    for _ in range(100):
        call()
    assert (cuda.state.count("module"), cuda.state.count("launch")) == (1, 100)


def test_a_prompt_without_tokens_leaves_the_state_as_it_is(cuda, plugins):
    bound = tensors(CHUNK, 2, 0, 5)
    plugin = plugins.create(CHUNK)
    plugin.run(bound, None)
    assert tuple(cuda.state.copy) == (bound[7].address, bound[4].address, 4 * 2 * 5 * K * V)
    bound[7] = bound[4]
    plugins.create(CHUNK, {"in_place": 1}).run(bound, None)
    assert (cuda.state.count("copy"), cuda.state.count("launch")) == (1, 0)
    cuda.state.fail("copy")
    with pytest.raises(PluginError, match="past_state could not be copied: CUDA_ERROR_OUT_OF_MEMORY"):
        plugin.call(tensors(CHUNK, 2, 0, 5), None)()


def test_a_state_may_be_updated_in_place(cuda, plugins):
    plugin = plugins.create(STEP, {"in_place": 1}).recreate().clone().attach()
    assert [plugin.aliased_input(output) for output in (0, 1)] == [-1, 4]
    bound = tensors(STEP, 2, 1, 5)
    bound[6] = bound[4]
    cuda.state.argument_count = len(STEP_ARGUMENTS)
    plugin.run(bound, None)
    told = dict(zip(STEP_ARGUMENTS, cuda.state.arguments, strict=False))
    assert told["past_state"] == told["present_state"] == bound[4].address


def test_a_prompt_overwrites_its_state_only_if_the_engine_was_built_so(plugins):
    bound = tensors(CHUNK, 2, 300, 5)
    bound[7] = bound[4]
    with pytest.raises(PluginError, match="present_state is at the address of past_state; expected another one"):
        plugins.create(CHUNK).run(bound, WORKSPACE)
    plugins.create(CHUNK, {"in_place": 1}).run(bound, WORKSPACE)


@pytest.mark.parametrize("op", [CHUNK, STEP])
def test_what_the_driver_refuses_is_returned_as_a_code_and_named(cuda, plugins, op):
    plugin, bound = plugins.create(op), tensors(op, 1, 63, 5)
    cuda.state.fail("module")
    with pytest.raises(PluginError, match=rf"tnllm::{op}: kernel .* could not be loaded: CUDA_ERROR_NO_BINARY_FOR_GPU"):
        plugin.change_shapes(bound)
    cuda.state.fail("function")
    with pytest.raises(PluginError, match="could not be loaded"):
        plugin.change_shapes(bound)
    cuda.state.fail("launch")
    with pytest.raises(PluginError, match=r"kernel .* could not be launched: CUDA_ERROR_OUT_OF_MEMORY"):
        plugin.run(bound, WORKSPACE)
    # It has not broken anything, and no module is left that nobody uses: one call was refused, one has succeeded.
    cuda.state.fail(None)
    plugin.run(bound, WORKSPACE)
    assert cuda.state.count("launch") == 2
    assert cuda.state.count("module") == 2


def test_a_counter_that_cannot_be_cleared_stops_the_launch(cuda, plugins):
    cuda.state.fail("memset")
    with pytest.raises(PluginError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        plugins.create(CHUNK).run(tensors(CHUNK, 1, 16384, 1), WORKSPACE)
    assert cuda.state.count("launch") == 0


@pytest.mark.parametrize(("capability", "named"), [(75, "7.5"), (90, "9.0"), (121, "12.1")])
@pytest.mark.parametrize("op", [CHUNK, STEP])
def test_a_gpu_without_kernels_in_the_library_is_named_with_the_way_out(cuda, plugins, op, capability, named):
    cuda.state.capability = capability
    plugin, bound = plugins.create(op), tensors(op, 1, 63, 5)
    words = f"no kernel for compute capability {named} with K 96 and V 48; make one with tnllm build-plugin --bundle"
    for call in (plugin.change_shapes, lambda tensors: plugin.call(tensors, WORKSPACE)()):
        with pytest.raises(PluginError, match=words):
            call(bound)
    assert cuda.state.count("module") == 0


@pytest.mark.parametrize("op", [CHUNK, STEP])
def test_addresses_that_kernels_cannot_take_are_refused(cuda, plugins, op):
    plugin = plugins.create(op)
    good = tensors(op, 1, 63, 5)
    names = ["query", "key", "value", "slope_rate", "past_state", *(["lengths"] if op == CHUNK else [])]
    for place, name in enumerate([*names, "output", "present_state"]):
        for address, words in ((0, "has no address"), (4100, "is at 0x1004; expected a multiple of 16")):
            bad = [placed(x, address) if i == place else x for i, x in enumerate(good)]
            with pytest.raises(PluginError, match=f"{name} {words}"):
                plugin.call(bad, WORKSPACE)()
    assert cuda.state.count("launch") == 0


def test_a_workspace_that_is_missing_or_crooked_is_refused(cuda, plugins):
    cuda.state.capability = 120
    plugin, bound = plugins.create(CHUNK), tensors(CHUNK, 1, 16384, 1)
    for workspace, words in ((None, "no workspace was given"), (placed(WORKSPACE, 4112), "workspace is not aligned")):
        with pytest.raises(PluginError, match=words):
            plugin.run(bound, workspace)
    assert cuda.state.count("launch") == 0


def test_no_context_is_told_from_no_driver(cuda, plugins):
    cuda.state.context = 0
    with pytest.raises(PluginError, match="the device can't be told: no CUDA context is current"):
        plugins.create(CHUNK).change_shapes(tensors(CHUNK, 1, 63, 5))


def test_types_and_shapes_of_a_call_that_do_not_fit_are_named(cuda, plugins):
    plugin, bound = plugins.create(CHUNK), tensors(CHUNK, 1, 63, 5)
    bound[1] = Placed(torch.float16, bound[1].shape, 4096)
    for call in (plugin.change_shapes, lambda tensors: plugin.call(tensors, WORKSPACE)()):
        with pytest.raises(PluginError, match="key is float16; expected bfloat16 like query"):
            call(bound)
    with pytest.raises(PluginError, match="this library has no kernel for bfloat16 with K 96 and V 96"):
        plugin.configure([*bound[:1], bound[0], bound[0], *bound[3:4], (torch.float32, (1, 5, 96, 96)), *bound[5:]])
    with pytest.raises(PluginError, match="the engine lacks the field contract"):
        plugins.create(CHUNK, phase=RUNTIME)
    assert cuda.state.count("launch") == 0
