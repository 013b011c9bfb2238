"""A Transformer in LLaMA's form (RMSNorm, RoPE, SwiGLU, causal softmax attention), to compare training with."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaSize:
    """Width, depth and vocabulary."""

    width: int
    layers: int
    heads: int
    glu_width: int
    vocab_size: int


class LlamaNorm(nn.Module):
    """x rsqrt(mean(x²) + 1e-6) times a weight, in float32; the dtype stays."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., d]."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * self.weight).to(x.dtype)


class LlamaLayer(nn.Module):
    """Pre-norm layer: x += attention(N(x)); x += SwiGLU(N(x))."""

    def __init__(self, size: LlamaSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm, self.mlp_norm = LlamaNorm(size.width), LlamaNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)
        self.gate = nn.Linear(size.width, size.glu_width, bias=False)
        self.up = nn.Linear(size.width, size.glu_width, bias=False)
        self.down = nn.Linear(size.glu_width, size.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map x [B, T, d]; cos and sin [T, D] are RoPE's."""
        # [B, T, d] -> [B, H, T, D] each
        q, k, v = (
            torch.unflatten(part, -1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # [B, H, T, D] -> [B, T, d]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Embedding, layers and final norm; the head is the embedding, as in the TransNormerLLM beside it."""

    def __init__(self, size: LlamaSize) -> None:
        super().__init__()
        self.head_dim = size.width // size.heads
        self.embed_tokens = nn.Embedding(size.vocab_size, size.width)
        self.layers = nn.ModuleList(LlamaLayer(size) for _ in range(size.layers))
        self.final_norm = LlamaNorm(size.width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map input_ids [B, T] to hidden states [B, T, d]."""
        cos, sin = rope(input_ids.shape[1], self.head_dim, input_ids.device)
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.final_norm(x)


def rope(tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, D] of RoPE's angles, in float32."""
    rates = 10000 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    # [T, D/2] -> [T, D]
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32, device=device), rates).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of x [B, H, T, D] against each other; the dtype stays."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)
