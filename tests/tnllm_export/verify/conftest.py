"""A tiny eager model, in float32 and in half precision."""

import copy

import pytest
import torch

from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.runtime import TorchRuntime


@pytest.fixture(scope="session")
def model() -> TransnormerForCausalLM:
    torch.manual_seed(0)
    config = TransnormerConfig(
        vocab_size=97,
        decoder_embed_dim=48,
        decoder_layers=3,
        decoder_attention_heads=3,
        glu_dim=80,
        init_std=0.2,
    )
    return TransnormerForCausalLM(config).requires_grad_(False)


@pytest.fixture(scope="session")
def eager(model: TransnormerForCausalLM) -> TorchRuntime:
    return TorchRuntime(model)


@pytest.fixture(scope="session")
def half(model: TransnormerForCausalLM) -> tuple[TorchRuntime, TorchRuntime]:
    """The bfloat16 model, and the float32 model of the same rounded weights."""
    rounded = copy.deepcopy(model).cast_weights(torch.bfloat16)
    return TorchRuntime(rounded), TorchRuntime(copy.deepcopy(rounded).cast_weights(torch.float32))
