"""The training benchmark: its loss is cross entropy, its Transformer is causal, and every model gives its records."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks import chunked_loss, names, training
from benchmarks.llama import Llama, LlamaSize
from benchmarks.training import Plan
from tnllm_export.models.config import TransnormerConfig

TINY = Plan(
    config=TransnormerConfig(
        vocab_size=50, decoder_embed_dim=32, decoder_layers=2, decoder_attention_heads=2, glu_dim=48
    ),
    llama=LlamaSize(width=32, layers=2, heads=2, glu_width=64, vocab_size=50),
    contexts=(16, 64),
    tokens=64,
    parity_tokens=33,
    device="cpu",
    compiled=False,
    kernels="pytorch",
)


def test_loss_and_gradients_in_pieces_are_those_of_cross_entropy(monkeypatch):
    monkeypatch.setattr(chunked_loss, "PIECE", 5)
    hidden, weight = torch.randn(13, 8, requires_grad=True), torch.randn(21, 8, requires_grad=True)
    targets = torch.randint(0, 21, (13,))
    found = chunked_loss.chunked_cross_entropy(hidden, weight, targets, torch.float32)
    expected = F.cross_entropy(hidden @ weight.T, targets)
    torch.testing.assert_close(found, expected)
    mine, theirs = (torch.autograd.grad(2 * loss, (hidden, weight)) for loss in (found, expected))
    torch.testing.assert_close(mine, theirs)


def test_the_transformer_sees_no_later_token_and_every_earlier_one():
    torch.manual_seed(0)
    model = Llama(TINY.llama)
    ids = torch.randint(0, 50, (1, 9))
    changed = ids.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 50
    first, second = model(ids), model(changed)
    torch.testing.assert_close(first[:, :4], second[:, :4])
    assert ((first - second)[:, 4:].norm(dim=-1) > 1e-6).all()


def test_the_models_are_of_one_size():
    with torch.device("meta"):
        transformer = Llama(training.PLAN.llama)
    size = sum(parameter.numel() for parameter in transformer.parameters())
    assert size == pytest.approx(398_984_192, rel=0.01)


def test_flops_are_six_per_weight_and_grow_with_context_for_softmax_attention_alone():
    ours = [training.flops_per_token(names.OURS, context, training.PLAN) for context in (2048, 131072)]
    assert ours[0] == ours[1] == pytest.approx(6 * 398_983_168 + 12 * 25 * 8 * 128 * 128)
    theirs = [training.flops_per_token(training.LLAMA, context, training.PLAN) for context in (0, 2048)]
    assert theirs[1] - theirs[0] == 6 * 24 * 2048 * 1024


def test_every_model_is_trained_at_every_context(monkeypatch):
    monkeypatch.setattr(training, "LIMIT_S", 1e9)
    records = [record for record in training.run(plan=TINY) if record.name != names.CHIP]
    parity, *steps = records
    assert parity.name == names.TRAINING_PARITY
    assert 0 < parity.value == parity.peer_value < 0.1
    speeds = [record for record in steps if record.metric == training.SPEED]
    assert [(record.case, record.peer) for record in speeds] == [
        (f"{context} | eager", model)
        for model in (None, training.LLAMA, training.BLOCKED) for context in TINY.contexts
    ]  # fmt: skip
    assert all(record.value > 0 for record in speeds)
    assert all(record.peer_value > 0 for record in speeds if record.peer)


def test_steps_lower_the_loss():
    torch.manual_seed(0)
    for make in (training.transnormer, training.llama):
        trainee = make(TINY)
        ids, targets = training._batch(2, 32, TINY)
        for group in trainee.optimizer.param_groups:
            group["lr"] = 1e-2
        losses = [trainee.step(ids, targets, torch.bfloat16).item() for _ in range(12)]
        assert losses[-1] < 0.8 * losses[0]


def test_what_there_is_no_time_for_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(training, "LIMIT_S", -1.0)
    steps = [record for record in training.run(plan=TINY) if record.name == names.TRAINING]
    assert len(steps) == 6
    assert all(record.value is None and "absent: TimeoutError: no time left" in record.peer for record in steps)
