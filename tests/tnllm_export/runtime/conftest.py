"""A tiny model with random weights: three heads, LRPE in the first of three layers."""

import pytest
import torch

from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.runtime import Runtime, TorchRuntime

VOCAB = 97


@pytest.fixture(scope="session")
def model() -> TransnormerForCausalLM:
    torch.manual_seed(0)
    config = TransnormerConfig(
        vocab_size=VOCAB,
        decoder_embed_dim=48,
        decoder_layers=3,
        decoder_attention_heads=3,
        glu_dim=80,
        init_std=0.2,
    )
    return TransnormerForCausalLM(config).requires_grad_(False)


@pytest.fixture(scope="session", params=["torch"])
def runtime(request: pytest.FixtureRequest, model: TransnormerForCausalLM) -> Runtime:
    return TorchRuntime(model)
