"""What launches of a look-back share, with streams and captures that a test makes up."""

from types import SimpleNamespace

import pytest
import torch

from tnllm_export.kernels.lightning_attention import handover_memory as module
from tnllm_export.kernels.lightning_attention import op
from tnllm_export.kernels.lightning_attention.handover_memory import (
    KEPT_STREAMS,
    STOCK,
    handover_memory,
    nothing_kept,
)

DEVICE = SimpleNamespace(type="cuda", index=0)


@pytest.fixture
def gpu(monkeypatch):
    """Let memory of the made-up device be CPU tensors. `stream` is current, `capture` its graph, 0 for none."""
    found = SimpleNamespace(stream=1, capture=0, zeroed=0)

    def empty(numbers, dtype, device):
        return torch.empty(numbers, dtype=dtype)

    def zeros(size, dtype, device):
        found.zeroed += 1
        return torch.zeros(size, dtype=dtype)

    stand_in = SimpleNamespace(
        empty=empty,
        zeros=zeros,
        float32=torch.float32,
        int32=torch.int32,
        cuda=SimpleNamespace(is_current_stream_capturing=lambda: found.capture != 0),
        _C=SimpleNamespace(_cuda_getCurrentRawStream=lambda index: found.stream),
    )
    monkeypatch.setattr(module, "torch", stand_in)
    monkeypatch.setattr(module, "use_context", lambda index: None)
    monkeypatch.setattr(module, "capture_of", lambda stream: found.capture)
    monkeypatch.setattr(module, "_kept", module._Kept())
    return found


def test_launches_of_a_stream_share_states_and_have_counters_of_their_own(gpu):
    states, counters = handover_memory(100, 5, DEVICE)
    assert (states.dtype, counters.dtype) == (torch.float32, torch.int32)
    assert states.numel() >= 100
    counters.fill_(7)
    seen = {counters.data_ptr()}
    for _ in range(STOCK - 1):
        again, counters = handover_memory(60, 5, DEVICE)
        assert again.data_ptr() == states.data_ptr()
        assert counters.numel() >= 5
        assert counters.data_ptr() % 16 == 0
        assert not counters.any()
        seen.add(counters.data_ptr())
    assert (len(seen), gpu.zeroed) == (STOCK, 1)
    _, counters = handover_memory(60, 5, DEVICE)
    assert not counters.any()
    assert gpu.zeroed == 2


def test_states_grow_and_other_streams_have_theirs(gpu):
    small, _ = handover_memory(100, 5, DEVICE)
    large, _ = handover_memory(200, 5, DEVICE)
    assert large.numel() >= 200
    assert handover_memory(100, 5, DEVICE)[0].data_ptr() == large.data_ptr()
    gpu.stream = 2
    assert handover_memory(100, 5, DEVICE)[0].data_ptr() not in (small.data_ptr(), large.data_ptr())


def test_states_of_a_long_call_are_not_kept(gpu, monkeypatch):
    monkeypatch.setattr(module, "KEPT_NUMBERS", 150)
    kept, _ = handover_memory(150, 5, DEVICE)
    large = [handover_memory(151, 5, DEVICE)[0] for _ in range(2)]
    assert all(states.numel() >= 151 for states in large)
    assert len({states.data_ptr() for states in (kept, *large)}) == 3
    assert handover_memory(150, 5, DEVICE)[0].data_ptr() == kept.data_ptr()


def test_a_graph_has_memory_of_its_own_and_sets_its_counters_to_0_again(gpu):
    eager, _ = handover_memory(100, 5, DEVICE)
    gpu.capture = 31
    captured = [handover_memory(100, 5, DEVICE) for _ in range(2)]
    assert len({states.data_ptr() for states, _ in captured} | {eager.data_ptr()}) == 3
    assert gpu.zeroed == 2  # once eagerly, once in the graph
    gpu.capture = 32
    handover_memory(100, 5, DEVICE)
    assert gpu.zeroed == 3
    # What was left for the first graph is gone; what is eager's is not.
    assert {key[3] for key in module._kept.counters} == {0, 32}


def test_counters_of_many_sizes_are_not_kept_for_ever(gpu, monkeypatch):
    monkeypatch.setattr(module, "KEPT_STOCKS", 3)
    for count in range(1, 9):
        handover_memory(100, count, DEVICE)
        assert len(module._kept.counters) <= 3


def test_nothing_is_kept_for_compiled_code(gpu):
    kept, _ = handover_memory(100, 5, DEVICE)
    for gpu.capture in (0, 31):
        with nothing_kept():
            found = [handover_memory(100, 5, DEVICE) for _ in range(2)]
        assert len({states.data_ptr() for states, _ in found} | {kept.data_ptr()}) == 3
        assert not any(counters.any() for _, counters in found)
    assert {key[3] for key in module._kept.counters} == {0}
    assert gpu.zeroed == 1 + 2 * 2
    gpu.capture = 0
    assert handover_memory(100, 5, DEVICE)[0].data_ptr() == kept.data_ptr()


def test_compiled_code_calls_ops_that_keep_nothing(monkeypatch, step_inputs):
    keeping = []

    def recorded(function):
        def record(*arguments, **keywords):
            keeping.append(not module._kept.nothing)
            return function(*arguments, **keywords)

        return record

    for name in ("compute_chunk", "compute_chunk_backward"):
        monkeypatch.setattr(op, name, recorded(getattr(op, name)))
    *activations, slope_rate, state = step_inputs(2, 3, 16, 16)
    leaves = [x[:, None].requires_grad_() for x in activations]
    inputs = (*leaves, slope_rate, state, torch.ones(2, dtype=torch.int32))
    for call in (op.lightning_attention, torch.ops.tnllm.lightning_attention):
        torch.autograd.grad(call(*inputs)[0].sum(), leaves)
    # The last one is the backward of the op that eager code has called: compiled code calls an op for that, too.
    assert keeping == [True, True, False, True]
    with_backward = torch.ops.tnllm.lightning_attention_backward
    with_backward(leaves[2].detach(), state, *(x.detach() for x in inputs))
    assert keeping[4:] == [False]


def test_elsewhere_nothing_is_kept():
    states, counters = handover_memory(100, 5, torch.device("cpu"))
    assert (states.numel(), counters.tolist()) == (100, [0] * 5)
    assert handover_memory(100, 5, torch.device("cpu"))[0].data_ptr() != states.data_ptr()


def test_states_are_kept_for_a_few_streams(gpu):
    kept = []
    for gpu.stream in range(1, 2 * KEPT_STREAMS + 2):
        states, _ = handover_memory(100, 5, DEVICE)
        kept.append(states.data_ptr())
        assert handover_memory(100, 5, DEVICE)[0].data_ptr() == kept[-1]
        assert len(module._kept.states) <= KEPT_STREAMS
