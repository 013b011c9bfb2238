"""What the kernels for Hopper are launched with, on a machine without a GPU: a CUDA driver of our own is told."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from tests.plugins.cuda_driver import compile_driver, state_of
from tnllm_export.kernels import cuda_driver
from tnllm_export.kernels.lightning_attention import chunk, hopper_launch, lightning_attention, sweep_cut
from tnllm_export.kernels.lightning_attention.backward_hopper import backward_hopper_kernel
from tnllm_export.kernels.lightning_attention.hopper_launch import HopperLaunch, parameters_of
from tnllm_export.kernels.lightning_attention.reference import lightning_attention_reference
from tnllm_export.kernels.lightning_attention.sweep_hopper import sweep_hopper_kernel
from tnllm_export.kernels.lightning_attention.sweep_plan import SweepPlan, hopper_tiles

STREAM = 4242
B, T, H, K, V = 2, 300, 3, 128, 128
PLAN = SweepPlan("none", 1)
TILE = hopper_tiles(K, V, "bfloat16")[0]


class Told:
    """The driver's record of the last launch, by the names of the kernel's parameters."""

    def __init__(self, state) -> None:
        self.state = state
        self.names: list[str] = []

    def arguments(self) -> dict[str, int]:
        return dict(zip(self.names, self.state.arguments, strict=False))


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Take CPU tensors for those of a Hopper GPU, and what is compiled as given."""
    driver = ctypes.PyDLL(str(compile_driver(tmp_path)))
    record = Told(state_of(driver))

    def compiled(kernel, constants):
        record.names = parameters_of(kernel, dict(constants))
        record.state.argument_count = len(record.names)
        metadata = SimpleNamespace(name="kernel", shared=1 << 16, num_warps=12)
        return SimpleNamespace(metadata=metadata, asm={"cubin": b"code"}), record.names

    monkeypatch.setattr(cuda_driver, "_driver", lambda: driver)
    monkeypatch.setattr(hopper_launch, "_compiled", compiled)
    for module in (chunk, sweep_cut):
        monkeypatch.setattr(module, "capability", lambda device: 90)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    caches = (sweep_cut.sweep_cut, sweep_cut.backward_cut, hopper_launch._loaded)
    for cached in caches:
        cached.cache_clear()
    yield record
    for cached in caches:
        cached.cache_clear()


def views():
    """Query, key and value as parts of one projection, an output that is dense, and states."""
    fused = torch.zeros(B, T, H, 2 * K + V, dtype=torch.bfloat16)
    query, key, value = fused.split([K, K, V], dim=3)
    slope_rate, lengths = torch.ones(H), torch.full((B,), T, dtype=torch.int32)
    past_state, present_state = (torch.zeros(B, H, K, V) for _ in range(2))
    return (
        query,
        key,
        value,
        slope_rate,
        past_state,
        lengths,
        torch.zeros(B, T, H, V, dtype=torch.bfloat16),
        present_state,
    )


def test_a_sweep_gives_each_tensor_in_its_place_and_strides_as_they_are(told):
    tensors = views()
    chunk.sweep(*tensors, tile=TILE, plan=PLAN)
    names = ("query_map", "key_map", "value_map", "slope_rate", "past_state", "lengths", "output", "present_state")
    found = told.arguments()
    for name, tensor in zip(names, tensors, strict=True):
        assert found[name] == tensor.data_ptr(), name
    assert found["output_map"] == found["output"]
    numbers = {"T": T, "H": H, "output_stride_b": T * H * V, "output_stride_t": H * V, "output_stride_h": V}
    numbers |= {"past_stride_b": H * K * V, "past_stride_h": K * V, "past_stride_k": V, "present_stride_k": V}
    assert {name: found[name] for name in numbers} == numbers
    # Steps of 1 are compiled in.
    assert "past_stride_v" not in told.names
    assert (found["unused"], found["scratch"], found["profile_scratch"]) == (0, 0, 0)
    assert told.state.stream == STREAM
    assert (told.state.threads, told.state.shared_bytes) == (384, 1 << 16)
    assert tuple(told.state.grid) == (B * H, 1, 1)
    # The output's map is the last one.
    assert tuple(told.state.map_sizes) == (V, H, T, B)
    assert tuple(told.state.map_strides) == (2 * V, 2 * H * V, 2 * T * H * V)


def test_a_look_back_gives_buffers_and_a_repeated_launch_makes_no_map_again(told):
    tensors = views()
    plan = SweepPlan("lookback", 5)
    for _ in range(3):
        chunk.sweep(*tensors, tile=TILE, plan=plan)
    found = told.arguments()
    assert (told.state.count("map"), told.state.count("launch"), told.state.count("module")) == (4, 3, 1)
    assert tuple(told.state.grid) == (B * H, 5, 1)
    assert found["carry"] not in (found["past_state"], 0)
    assert found["progress"] not in (found["lengths"], 0)
    other = torch.zeros_like(tensors[6])
    chunk.sweep(*tensors[:6], other, tensors[7], tile=TILE, plan=plan)
    assert told.state.count("map") == 5
    assert told.arguments()["output_map"] == other.data_ptr()


@pytest.mark.parametrize("spoil", ["start", "columns", "overlap"])
def test_activations_that_the_copy_engine_does_not_take_are_copied(told, spoil):
    query, *others = views()
    if spoil == "start":
        query = torch.zeros(query.numel() + 1, dtype=query.dtype)[1:].view(query.shape)
    elif spoil == "columns":
        query = torch.zeros(B, T, K, H, dtype=query.dtype).transpose(2, 3)
    else:
        query = torch.zeros(B, T, 1, K, dtype=query.dtype).expand(B, T, H, K)
    chunk.sweep(query, *others, plan=PLAN)
    found = told.arguments()
    assert found["query_map"] != query.data_ptr()
    assert found["query_map"] % 16 == 0
    assert found["key_map"] == others[0].data_ptr()


def test_a_backward_gives_each_tensor_in_its_place(told):
    query, key, value, slope_rate, past_state, lengths, grad_output, _ = views()
    grad_state = torch.zeros_like(past_state).mT
    inputs = (query, key, value, grad_output, slope_rate, past_state, grad_state, lengths)
    results = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, past_state))
    assert chunk.sweep_back(inputs, results, tile=TILE, plan=PLAN) == 3
    found = told.arguments()
    names = (
        "query_map",
        "key_map",
        "value_map",
        "grad_output_map",
        "slope_rate",
        "past_state",
        "grad_state",
        "lengths",
    )
    for name, tensor in zip(names, inputs, strict=True):
        assert found[name] == tensor.data_ptr(), name
    for name, tensor in zip(("query", "key", "value"), results, strict=False):
        assert found[f"grad_{name}"] == found[f"grad_{name}_map"] == tensor.data_ptr(), name
    assert found["grad_past"] == results[3].data_ptr()
    assert (found["T"], found["H"], found["stores_grad_past"]) == (T, H, 1)
    assert found["grad_state_stride_v"] == V  # a transpose
    assert "grad_state_stride_k" not in told.names
    assert tuple(told.state.grid) == (3 * B * H, 1, 1)


def test_every_parameter_of_the_kernels_is_known_to_who_launches_them():
    for kernel in (sweep_hopper_kernel, backward_hopper_kernel):
        constants = {name: 0 for name in kernel.arg_names if (name.isupper() and len(name) > 1) or name in ("K", "V")}
        names = parameters_of(kernel, constants)
        assert not any(name.isupper() and name not in ("T", "H") for name in names)
        assert len([name for name in names if name.endswith("_map")]) in (4, 7)


def test_a_triton_that_cannot_compile_them_is_named_once_and_the_portable_kernel_runs(
    triton, chunk_inputs, in_float64, relative_error, monkeypatch
):
    def fail(kernel, constants):
        raise RuntimeError("two lines of trouble\nerror encountered during parsing")

    for module in (chunk, sweep_cut):
        monkeypatch.setattr(module, "capability", lambda device: 90)
    monkeypatch.setattr(hopper_launch, "compile_hopper", fail)
    monkeypatch.setattr(hopper_launch, "use_context", lambda index: None)
    monkeypatch.setattr(hopper_launch.TensorMap, "encode", lambda tensor_map, address: None)
    monkeypatch.setattr(sweep_cut, "_left_out", [])
    cuts = (sweep_cut._hopper_kernel, sweep_cut.sweep_cut, sweep_cut.backward_cut)
    caches = (*cuts, hopper_launch._loaded, hopper_launch._compiled)
    for cached in caches:
        cached.cache_clear()
    inputs = chunk_inputs(1, 40, 1, 64, 128, torch.bfloat16)
    leaves = [x.requires_grad_(i < 3) for i, x in enumerate(inputs)]

    def run():
        output, _ = lightning_attention(*leaves)
        return output, torch.autograd.grad(output, leaves[:3], torch.ones_like(output))

    words = r"left out, which costs time: Triton could not compile it \(error encountered during parsing\)"
    with pytest.warns(UserWarning, match=words) as warned:
        output, gradients = run()
    assert len(warned) == 1
    assert len(sweep_cut._left_out) == 1
    expected, _ = lightning_attention_reference(*in_float64([x.detach() for x in inputs]))
    assert relative_error(output, expected) < 5e-3
    assert all(gradient.isfinite().all() for gradient in gradients)
    for cached in caches:
        cached.cache_clear()


def test_states_with_steps_beyond_32_bits_are_refused_by_name():
    numbers = {"T": 1, "past_stride_b": 1 << 40, "past_stride_k": 1 << 31, "past_stride_v": 1}
    with pytest.raises(ValueError, match=r"found {'past_stride_k': 2147483648}; .*make the state contiguous"):
        HopperLaunch(sweep_hopper_kernel, {}, (1, 1, 1), [], numbers, torch.device("cpu"))
