"""Prompts by the fused kernels against the eager model: logits and states, ragged, with a past; refusals."""

import pytest
import torch

from tests.tnllm_export.models.small_models import HEAD, SMALL, make, relative_error
from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.fused_prefill import fused_prefill, prefill, unsupported

pytest.importorskip("triton")

SEVEN = TransnormerConfig(  # layers of the 7B model
    vocab_size=1000, decoder_embed_dim=4096, decoder_layers=2, decoder_attention_heads=32, glu_dim=11008
)


def draw(model, lengths, seed=1):
    """Arguments of a prefill behind a random past."""
    generator = torch.Generator().manual_seed(seed)
    device = model.lm_head.weight.device
    B = len(lengths)
    ids = torch.randint(0, model.config.vocab_size, (B, max(lengths)), generator=generator)
    past = [torch.randn(state.shape, generator=generator).to(state) for state in model.initial_state(B)]
    return (
        ids.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        torch.arange(5, 5 + B, device=device),
        past,
    )


@torch.inference_mode()
def read(model, arguments, form=fused_prefill):
    """Logits and states, in memory that was poisoned; the past must stay."""
    before = [state.clone() for state in arguments[3]]
    present = [torch.full_like(state, torch.nan) for state in before]
    with use_kernels("triton"):
        logits = form(model, *arguments, present)
    assert all(torch.equal(one, other) for one, other in zip(arguments[3], before, strict=True))
    return [logits, *present]


@torch.inference_mode()
def eager(model, arguments):
    with use_kernels("pytorch"):
        logits, present = model(*arguments, "last")
    return [logits, *present]


@pytest.mark.parametrize("lengths", [[1], [20], [9, 1, 33]], ids=str)
@pytest.mark.parametrize("config", [SMALL, SMALL.model_copy(update=HEAD)], ids=["tied", "untied"])
def test_float32_prefill_is_that_of_the_eager_model(device, config, lengths):
    model = make(config, torch.float32, device)
    arguments = draw(model, lengths)
    for found, reference in zip(read(model, arguments), eager(model, arguments), strict=True):
        assert found.dtype == torch.float32
        assert relative_error(found, reference) < 3e-6


# In float16: Triton's interpreter cuts bfloat16 off instead of rounding it.
def test_prefill_in_float16_is_as_close_to_float32_as_the_eager_model(device):
    check_halves(device, SMALL, torch.float16, ([40], [17, 30, 3], [25], [31, 31]))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[64], [200, 130], [1500]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_layers_of_the_7b_shape_are_as_close_to_float32_as_the_eager_model(device, dtype, lengths):
    check_halves(device, SEVEN, dtype, (lengths,))


def check_halves(device, config, dtype, prompts):
    """No further from the float32 model of the same weights than 1.2 times the eager model; all prompts together."""
    model, wide = make(config, dtype, device), make(config, torch.float32, device)
    wide.load_state_dict(model.state_dict())
    forms = ([], [], [])
    for seed, lengths in enumerate(prompts):
        arguments = draw(model, lengths, seed)
        for results, found in zip(
            forms, (read(model, arguments), eager(model, arguments), eager(wide, arguments)), strict=True
        ):
            results.append(torch.cat([tensor.flatten() for tensor in found]))
    found, plain, reference = map(torch.cat, forms)
    error, allowed = relative_error(found, reference), relative_error(plain, reference)
    print(f"{dtype}: {error:.2e}, eager {allowed:.2e}")
    assert error <= 1.2 * allowed


def test_a_row_of_length_zero_keeps_its_state_bit_for_bit(device):
    model = make(SMALL, torch.float32, device)
    arguments = draw(model, [4, 4])
    arguments[1][1] = 0
    for present, past in zip(read(model, arguments)[1:], arguments[3], strict=True):
        assert torch.equal(present[1], past[1])
        assert not torch.equal(present[0], past[0])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"norm_type": "rmsnorm"}, "found norm_type rmsnorm"),
        ({"glu_act_fun": "silu"}, "found glu_act_fun silu"),
        ({"linear_use_gate": False}, "found attention without a gate"),
        ({"decoder_attention_heads": 2}, "found heads of 24, expected a multiple of 16"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:lightning attention. found heads of")
def test_what_the_kernels_do_not_compute_is_read_by_the_model_itself(device, fields, reason):
    model = make(SMALL.model_copy(update=fields), torch.float32, device)
    with use_kernels("triton"):
        assert reason in unsupported(model.config, torch.float32, device)
    arguments = draw(model, [7, 3])
    results = read(model, arguments, lambda *given: prefill(*given)[0])
    for found, reference in zip(results, eager(model, arguments), strict=True):
        assert relative_error(found, reference) < 3e-6


@pytest.mark.parametrize("form", ["triton", "pytorch"])
def test_a_new_state_has_memory_of_its_own_unless_it_is_given_some(device, form):
    model = make(SMALL, torch.float32, device)
    *inputs, past = draw(model, [9, 2])
    with torch.inference_mode(), use_kernels(form):
        assert (unsupported(SMALL, torch.float32, device) is None) == (form == "triton")
        logits, present = prefill(model, *inputs, past)
        again, given = prefill(model, *inputs, past, [torch.full_like(state, torch.nan) for state in past])
    assert torch.equal(logits, again)
    for one, other, before in zip(present, given, past, strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != before.data_ptr()
        assert not torch.equal(one, before)
