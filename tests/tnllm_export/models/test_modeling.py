"""The eager model against the released implementation's answers, and its contracts with itself."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tnllm_export.models.config import TransnormerConfig, load_config
from tnllm_export.models.decay import alibi_slopes, slope_rates
from tnllm_export.models.modeling import TransnormerForCausalLM

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
NAMES = ("scaled_embedding", "unscaled_embedding")


def relative_error(found, reference):
    assert found.shape == reference.shape
    return ((found.double() - reference.double()).norm() / reference.double().norm()).item()


def make_model(dtype=torch.float32, **fields):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61,
        "decoder_embed_dim": 48,
        "decoder_layers": 3,
        "decoder_attention_heads": 3,
        "glu_dim": 80,
        "init_std": 0.2,
    }
    return TransnormerForCausalLM(TransnormerConfig(**{**sizes, **fields})).cast_weights(dtype).eval()


@pytest.fixture(params=NAMES)
def golden(request):
    folder = GOLDEN / request.param
    config, _ = load_config(folder)
    model = TransnormerForCausalLM(config).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model, load_file(folder / "golden.safetensors")


@torch.inference_mode()
def test_prefill_and_decode_answer_as_the_released_implementation_does(golden):
    model, expected = golden
    B, T = expected["input_ids"].shape
    logits, state = model(expected["input_ids"])
    assert relative_error(logits, expected["prefill_logits"]) < 1e-5
    for layer, found in enumerate(state):
        assert relative_error(found, expected[f"prefill_state.{layer}"]) < 1e-5
    for step, token in enumerate(expected["decode_ids"].T):
        logits, state = model.decode(token[:, None], torch.full((B,), T + step), state)
        assert relative_error(logits, expected["decode_logits"][:, step]) < 1e-5
    for layer, found in enumerate(state):
        assert relative_error(found, expected[f"decode_state.{layer}"]) < 1e-5


VARIANTS = [
    {"decay_type": "paper"},
    {"linear_use_lrpe_list": [0, 1, 1]},
    {"linear_use_lrpe_list": [0, 0, 0]},
    {"linear_act_fun": "1+elu"},
    {"linear_act_fun": "none"},
    {"glu_act_fun": "silu"},
    {"norm_type": "rmsnorm"},
    {"norm_type": "layernorm"},
    {"linear_use_gate": False},
    {"tie_word_embeddings": False},
    {"no_scale_embedding": True},
    {"decoder_layers": 1},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@torch.inference_mode()
def test_every_variant_decodes_what_it_prefills(fields):
    model = make_model(torch.float64, **fields)
    ids = torch.randint(0, 61, (2, 9))
    whole, whole_state = model(ids)
    logits, state = model(ids[:, :5])
    for t in range(5, 9):
        logits, state = model.decode(ids[:, t : t + 1], torch.full((2,), t), state)
        assert relative_error(logits, whole[:, t]) < 1e-12
    for found, reference in zip(state, whole_state, strict=True):
        assert relative_error(found, reference) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_decoding_in_place_is_decoding_bit_for_bit(dtype):
    model = make_model(dtype)
    _, state = model(torch.randint(61, (2, 9)))
    ids, positions = torch.randint(61, (2, 1)), torch.full((2,), 9)
    expected, after = model.decode(ids, positions, state)
    logits = model.decode_in_place(ids, positions, state)
    assert torch.equal(logits, expected)
    for found, wanted in zip(state, after, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "fields", [{"decay_type": "paper"}, {"linear_act_fun": "none"}, {"linear_use_gate": False}], ids=str
)
@torch.inference_mode()
def test_an_option_changes_the_answer(fields):
    ids = torch.arange(20)[None]
    released, variant = make_model(), make_model(**fields)
    weights = {name: tensor for name, tensor in released.state_dict().items() if name in variant.state_dict()}
    variant.load_state_dict(weights, strict=False)
    assert relative_error(variant(ids)[0], released(ids)[0]) > 1e-3


@torch.inference_mode()
def test_last_logits_are_those_of_each_rows_last_valid_token():
    model = make_model()
    ids = torch.randint(0, 61, (3, 11))
    lengths = torch.tensor([11, 4, 1], dtype=torch.int32)
    every, _ = model(ids, lengths)
    last, _ = model(ids, lengths, logits="last")
    for row, length in enumerate(lengths.tolist()):
        assert relative_error(last[row], every[row, length - 1]) < 1e-6


def test_other_logits_than_all_or_last_are_refused():
    with pytest.raises(ValueError, match=r"logits is 'first'; expected \"all\" or \"last\""):
        make_model()(torch.arange(5)[None], logits="first")


@torch.inference_mode()
def test_half_models_keep_float32_states_angles_and_rates():
    model = make_model(torch.bfloat16)
    logits, state = model(torch.arange(5)[None])
    mixer = model.model.layers[0].token_mixer
    assert logits.dtype == torch.float32
    assert {tensor.dtype for tensor in state} == {torch.float32}
    assert mixer.lrpe.theta.dtype == torch.float32
    assert mixer.slope_rate.dtype == torch.float32
    assert mixer.out_proj.weight.dtype == torch.bfloat16


def test_training_reaches_every_parameter():
    model = make_model().train()
    logits, _ = model(torch.randint(0, 61, (2, 70)))
    logits.logsumexp(-1).mean().backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []


def test_released_decay_of_the_7b_model_spans_what_the_release_gives():
    rates = slope_rates("release", 0, 30, 32)
    assert rates.max().item() == pytest.approx(0.841, abs=1e-3)
    assert rates.min().item() == pytest.approx(0.0039, abs=1e-4)
    last = slope_rates("release", 29, 30, 32)
    assert torch.allclose(last, torch.tensor(alibi_slopes(32)) * 1e-5, rtol=0.05)


def test_papers_decay_is_its_formula():
    rates = slope_rates("paper", 0, 30, 32)
    assert rates[0].item() == 0
    assert rates[-1].item() == pytest.approx(7.75)
    assert slope_rates("paper", 15, 30, 32)[-1].item() == pytest.approx(7.75 / 2)


def test_alibi_interpolates_where_heads_are_no_power_of_two():
    slopes = alibi_slopes(6)
    assert slopes[:4] == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    assert slopes[4:] == [2.0**-1, 2.0**-3]
    assert all(math.isclose(slope, 2 ** -(8 * (h + 1) / 8)) for h, slope in enumerate(alibi_slopes(8)))
