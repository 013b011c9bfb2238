"""The model with the layer's fused kernels against the model in plain PyTorch, and what tracing makes of it."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.tnllm_export.models.small_models import relative_error
from tnllm_export.export.programs import Tracer
from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerForCausalLM

pytest.importorskip("triton")

CONFIG = TransnormerConfig(
    vocab_size=61,
    decoder_embed_dim=48,
    decoder_layers=2,
    decoder_attention_heads=3,
    glu_dim=80,
    init_std=0.2,
    linear_use_lrpe_list=[1, 0],
)
LAYER_OPS = ("srmsnorm", "gated_norm", "split_heads", "glu_product")


@pytest.fixture
def model(device):
    torch.manual_seed(0)
    return TransnormerForCausalLM(CONFIG).to(device).train()


@pytest.fixture
def ids(device):
    return torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0)).to(device)


def loss_and_gradients(model, ids, run=None):
    logits, _ = (run or model)(ids)
    loss = logits.logsumexp(-1).mean() + logits.square().mean()
    return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))


def fused_calls(run):
    """Names of the layer's fused ops that `run` calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    called = {event.key for event in profile.key_averages()}
    return {name for name in LAYER_OPS if f"tnllm::{name}" in called}


def test_training_runs_every_fused_op_and_computes_what_plain_pytorch_does(model, ids):
    with use_kernels("pytorch"):
        expected = loss_and_gradients(model, ids)
        assert fused_calls(lambda: model(ids)) == set()
    with use_kernels("triton"):
        found = loss_and_gradients(model, ids)
        assert fused_calls(lambda: model(ids)) == set(LAYER_OPS)
    for one, other in zip(found, expected, strict=True):
        # float32 through two layers and back, in another order of additions.
        assert relative_error(one, other) < 1e-5


@torch.inference_mode()
def test_decode_with_fused_ops_continues_what_prefill_computed(model, ids):
    with use_kernels("triton"):
        whole, _ = model(ids)
        _, state = model(ids[:, :8])
        logits, _ = model.decode(ids[:, 8:], torch.full((2,), 8, device=ids.device), state)
    assert relative_error(logits, whole[:, 8]) < 1e-5


def test_activation_checkpointing_changes_no_gradient(model, ids):
    with use_kernels("triton"):
        expected = loss_and_gradients(model, ids)
        found = loss_and_gradients(model, ids, lambda ids: checkpoint(model, ids, use_reentrant=False))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_under_autocast_the_norm_answers_in_the_dtype_of_its_readers(model, ids, device):
    x = torch.randn(2, 9, 48, device=device)
    answers = []
    for choice in ("triton", "pytorch"):
        with use_kernels(choice), torch.autocast(device.type, torch.bfloat16):
            assert model.model.final_norm(x).dtype == torch.bfloat16
            answers.append(loss_and_gradients(model, ids))
    for one, other in zip(*answers, strict=True):
        # Two layers of bfloat16: each form rounds elsewhere.
        assert relative_error(one, other) < 5e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_programs_hold_the_same_plain_ops_whatever_form_is_asked_for(dtype):
    traced = []
    for choice in ("triton", "pytorch"):
        with use_kernels(choice):
            tracer = Tracer(CONFIG, dtype)
            traced.append([str(tracer.prefill("last").graph), str(tracer.decode().graph)])
    assert traced[0] == traced[1]
    assert not any(f"tnllm.{name}" in graph for name in LAYER_OPS for graph in traced[0])


def test_under_torch_compile_the_layer_is_plain_ops_that_inductor_can_fuse(model, ids):
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    torch._dynamo.reset()
    with use_kernels("triton"):
        expected, _ = model(ids)
        found, _ = torch.compile(model, backend=backend, fullgraph=True)(ids)
    assert len(graphs) == 1
    assert any("rsqrt" in target for target in graphs[0])
    assert not any(f"tnllm.{name}" in target for target in graphs[0] for name in LAYER_OPS)
    assert any("tnllm.lightning_attention" in target for target in graphs[0])
    assert relative_error(found, expected) < 1e-5
