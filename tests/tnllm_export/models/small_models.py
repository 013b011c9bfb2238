"""Small models that the fused kernels are compared with the eager model on, and how far two answers are apart."""

import torch
from torch import Tensor

from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerForCausalLM

SMALL = TransnormerConfig(
    vocab_size=61,
    decoder_embed_dim=48,
    decoder_layers=3,
    decoder_attention_heads=3,
    glu_dim=88,
    init_std=0.15,
    linear_use_lrpe_list=[1, 0, 1],
)
HEAD = {"tie_word_embeddings": False, "no_scale_embedding": True}


def make(config: TransnormerConfig, dtype: torch.dtype, device: torch.device) -> TransnormerForCausalLM:
    """Random weights, the same ones each time."""
    torch.manual_seed(0)
    return TransnormerForCausalLM(config).to(device).cast_weights(dtype).eval()


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Distance from the reference in units of its norm."""
    assert found.shape == reference.shape
    assert reference.norm() > 0
    return ((found.double() - reference.double()).norm() / reference.double().norm()).item()
