"""Whole tokens by the fused decoder against the eager model: logits, states in place, refusals; graphs on a GPU."""

import pytest
import torch

from tests.tnllm_export.models.small_models import HEAD, SMALL, make, relative_error
from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.fused_decode import FusedDecoder

pytest.importorskip("triton")

TINY = SMALL.model_copy(  # for the interpreter, which takes its time
    update={"vocab_size": 21, "decoder_embed_dim": 16, "decoder_attention_heads": 2, "glu_dim": 20,
            "decoder_layers": 2, "linear_use_lrpe_list": (True, False)}
)  # fmt: skip
UNTIED = SMALL.model_copy(update=HEAD)
LARGE = TransnormerConfig(  # layers of the 1B model
    vocab_size=64000, decoder_embed_dim=2048, decoder_layers=3, decoder_attention_heads=16, glu_dim=5632
)
PAST, STEPS = 5, 2


def draw_ids(config, batch, tokens, device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (batch, tokens), generator=generator).to(device)


@torch.inference_mode()
def past_of(model, ids):
    """States after a prompt, computed in PyTorch."""
    with use_kernels("pytorch"):
        return model(ids[:, :PAST])[1]


@torch.inference_mode()
def eager(model, ids, states):
    """Logits of each step [steps, B, vocab] and the last states."""
    logits = []
    with use_kernels("pytorch"):
        for token in range(PAST, ids.shape[1]):
            positions = torch.full((ids.shape[0],), token, device=ids.device)
            found, states = model.decode(ids[:, token : token + 1], positions, states)
            logits.append(found)
    return torch.stack(logits), states


@torch.inference_mode()
def fused(model, ids, states):
    """Likewise, by the fused decoder, over copies of the states."""
    states = [state.clone() for state in states]
    logits = []
    with use_kernels("triton"):
        decoder = FusedDecoder(model, ids.shape[0])
        for token in range(PAST, ids.shape[1]):
            positions = torch.full((ids.shape[0],), token, device=ids.device)
            logits.append(decoder.decode(ids[:, token : token + 1].contiguous(), positions, states).clone())
    return torch.stack(logits), states


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("config", [TINY, TINY.model_copy(update=HEAD)], ids=["tied", "untied"])
def test_float32_decode_is_that_of_the_eager_model(device, config, batch):
    model, ids = make(config, torch.float32, device), draw_ids(config, batch, PAST + STEPS, device)
    states = past_of(model, ids)
    found, reference = fused(model, ids, states), eager(model, ids, states)
    assert relative_error(found[0], reference[0]) < 3e-6
    for mine, right, before in zip(found[1], reference[1], states, strict=True):
        assert relative_error(mine, right) < 3e-6
        assert not torch.equal(mine, before)


def check_halves(device, config, dtype, batch, prompts=1):
    """Against the float32 model of the same weights: no further away than 1.2 times the eager model in the dtype.

    Errors are those of all prompts together: a small model's few logits are too few to compare two roundings by.
    """
    model = make(config, dtype, device)
    wide = make(config, torch.float32, device)
    wide.load_state_dict(model.state_dict())
    results = []
    for seed in range(prompts):
        ids = draw_ids(config, batch, PAST + STEPS, device, seed)
        states = past_of(model, ids)
        forms = fused(model, ids, states), eager(model, ids, states), eager(wide, ids, states)
        results.append([[logits, *present] for logits, present in forms])
    found, plain, reference = (
        [torch.cat([one.flatten() for one in same]) for same in zip(*of_form, strict=True)]
        for of_form in zip(*results, strict=True)
    )
    for place, (mine, other, right) in enumerate(zip(found, plain, reference, strict=True)):
        error, allowed = relative_error(mine, right), relative_error(other, right)
        what = f"state {place - 1}" if place else "logits"
        print(f"{dtype}, batch {batch}, {what}: {error:.2e}, eager {allowed:.2e}")
        assert error <= 1.2 * allowed, what


@pytest.mark.parametrize("batch", [1, 9])
def test_float16_decode_is_as_close_to_float32_as_the_eager_model(device, batch):
    check_halves(device, TINY, torch.float16, batch)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("config", [SMALL, UNTIED, LARGE], ids=["small", "untied", "1B layers"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_on_a_gpu_are_as_close_to_float32_as_the_eager_model(device, config, batch, dtype):
    check_halves(device, config, dtype, batch, prompts=2 if config is LARGE else max(1, 32 // batch))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8, 32])
@torch.inference_mode()
def test_graph_replays_give_the_bits_of_direct_calls_every_time(device, batch):
    model, ids = make(LARGE, torch.bfloat16, device), draw_ids(LARGE, batch, PAST + 1, device)
    token, positions = ids[:, PAST:].contiguous(), torch.full((batch,), PAST, device=device)
    past = past_of(model, ids)
    decoder = FusedDecoder(model, batch)
    states = [state.clone() for state in past]
    expected = [decoder.decode(token, positions, states).clone(), *[state.clone() for state in states]]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = decoder.decode(token, positions, states)
    for _ in range(20):
        for state, before in zip(states, past, strict=True):
            state.copy_(before)
        logits.fill_(float("nan"))
        graph.replay()
        for found, right in zip([logits, *states], expected, strict=True):
            assert torch.equal(found, right)


@pytest.mark.gpu
@torch.inference_mode()
def test_replays_one_after_the_other_are_the_tokens_of_direct_calls(device):
    """Nothing waits between replays: a kernel that started too early would read what is not written yet."""
    model, ids = make(LARGE, torch.bfloat16, device), draw_ids(LARGE, 1, PAST + 1, device)
    token, positions = ids[:, PAST:].clone(), torch.full((1,), PAST, device=device)
    past = past_of(model, ids)
    decoder, states = FusedDecoder(model, 1), [state.clone() for state in past]

    def step():
        token.copy_(decoder.decode(token, positions, states).argmax(-1, keepdim=True))
        positions.add_(1)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    results = []
    for run in (step, graph.replay):
        token.copy_(ids[:, PAST:])
        positions.fill_(PAST)
        for state, before in zip(states, past, strict=True):
            state.copy_(before)
        for _ in range(50):
            run()
            if run is step:
                torch.cuda.synchronize()
        results.append([token.clone(), *[state.clone() for state in states]])
    for direct, replayed in zip(*results, strict=True):
        assert torch.equal(direct, replayed)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8, 32])
@torch.inference_mode()
def test_kernels_that_overlap_compute_the_bits_of_kernels_that_wait(monkeypatch, device, batch):
    from tnllm_export.kernels.decode import overlap

    model, ids = make(LARGE, torch.bfloat16, device), draw_ids(LARGE, batch, PAST + STEPS, device)
    states = past_of(model, ids)
    runs = [fused(model, ids, states) for _ in range(5)]
    monkeypatch.setattr(overlap, "can_overlap", lambda device: False)
    logits, present = fused(model, ids, states)
    for place, (other_logits, other_present) in enumerate(runs):
        assert torch.equal(logits, other_logits), place
        for layer, (one, other) in enumerate(zip(present, other_present, strict=True)):
            assert torch.equal(one, other), (place, layer)


@pytest.mark.gpu
@torch.inference_mode()
def test_second_call_allocates_nothing(device):
    model, ids = make(SMALL, torch.bfloat16, device), draw_ids(SMALL, 9, 1, device)
    decoder, states = FusedDecoder(model, 9), model.initial_state(9)
    positions = torch.zeros(9, dtype=torch.int64, device=device)
    decoder.decode(ids, positions, states)
    before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
    decoder.decode(ids, positions, states)
    assert torch.cuda.memory_stats(device)["allocation.all.allocated"] == before


@pytest.mark.parametrize(
    ("update", "dtype", "batch", "word"),
    [
        ({"norm_type": "rmsnorm"}, torch.float32, 1, "norm_type rmsnorm"),
        ({"linear_act_fun": "1+elu"}, torch.float32, 1, "linear_act_fun 1\\+elu"),
        ({"glu_act_fun": "silu"}, torch.float32, 1, "glu_act_fun silu"),
        ({"linear_use_gate": False}, torch.float32, 1, "gate"),
        ({}, torch.float64, 1, "float64"),
        ({}, torch.float32, 0, "batch of 0"),
        ({}, torch.float32, 65, "batch of 65"),
        ({"decoder_attention_heads": 1, "decoder_embed_dim": 192, "hidden_dim": None}, torch.float32, 1, "keys of 384"),
    ],
)
def test_refuses_what_it_has_no_kernels_for(device, update, dtype, batch, word):
    model = make(SMALL.model_copy(update=update), dtype, device)
    with use_kernels("triton"):
        assert FusedDecoder.unsupported(SMALL, torch.float32, device, 1) is None
        with pytest.raises(ValueError, match=word):
            FusedDecoder(model, batch)


def test_refuses_a_cpu_and_kernels_switched_off(device):
    assert "cuda" in (FusedDecoder.unsupported(SMALL, torch.float32, torch.device("cpu"), 1) or "")
    with use_kernels("pytorch"):
        assert "switched off" in (FusedDecoder.unsupported(SMALL, torch.float32, device, 1) or "")


@pytest.mark.parametrize("broken", ["ids", "positions", "shape", "strides", "dtype"])
def test_refuses_tensors_of_another_shape(device, broken):
    model = make(SMALL, torch.float32, device)
    ids, positions, states = draw_ids(SMALL, 2, 1, device), torch.zeros(2, dtype=torch.int64), model.initial_state(2)
    positions = positions.to(device)
    if broken == "ids":
        ids = ids[:1]
    elif broken == "positions":
        positions = positions[:1]
    elif broken == "shape":
        states[1] = states[1][:, :, 1:]
    elif broken == "strides":
        states[1] = states[1].mT
    else:
        states[1] = states[1].half()
    with use_kernels("triton"), pytest.raises(ValueError, match=r"found .* expected"):
        FusedDecoder(model, 2).decode(ids, positions, states)
