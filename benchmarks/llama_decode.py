"""One decoded token of the Transformer in LLaMA's form: a static cache of keys and values, softmax attention over it.

The cache is as long as the context and holds as many tokens, of which the new one is the last: nothing is masked, and
nothing is read in vain. Attention is whatever of PyTorch's forms is quickest at that length (`attention_forms`).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.llama import Llama, LlamaLayer, LlamaSize, rope, rotate

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""query [B, H, 1, D], keys and values [B, H, T, D] -> [B, H, 1, D]."""


def softmax_by_products(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one token by two matrix products with a softmax between them."""
    scores = (query @ keys.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    return scores.softmax(-1).to(query.dtype) @ values


def sdpa(backend: SDPBackend, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """PyTorch's softmax attention with one backend only."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, keys, values)


def attention_forms(device: str) -> dict[str, Attention]:
    """Every form that may be the quickest, by name."""
    forms: dict[str, Attention] = {"matrix products": softmax_by_products}
    if device != "cuda":
        return forms | {"SDPA": F.scaled_dot_product_attention}
    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    return {f"SDPA {backend.name.split('_')[0].lower()}": partial(sdpa, backend) for backend in backends} | forms


class LlamaDecoder:
    """Decodes single tokens behind a full cache, which random numbers fill. Everything but attention may be compiled.

    Attributes:
        cache: [layers, 2, B, H, T, D]; keys first.
    """

    def __init__(
        self, model: Llama, size: LlamaSize, batch: int, context: int, attention: Attention, *, compiled: bool
    ) -> None:
        weight = model.embed_tokens.weight
        head_dim = size.width // size.heads
        self.cache = torch.empty(
            size.layers, 2, batch, size.heads, context, head_dim, dtype=weight.dtype, device=weight.device
        )
        for layer in self.cache:
            layer.normal_()
        cos, sin = rope(context, head_dim, weight.device)
        self._rope = cos[-1:], sin[-1:]
        self._model = model
        self._attention = attention
        wrap = partial(torch.compile, dynamic=False) if compiled else _as_it_is
        self._before, self._after, self._head = wrap(before_attention), wrap(after_attention), wrap(head)

    def decode(self, input_ids: Tensor) -> Tensor:
        """Feed input_ids [B, 1], as the last token of the context; return logits [B, vocab] float32."""
        x = self._model.embed_tokens(input_ids)
        for layer, (keys, values) in zip(self._model.layers, self.cache, strict=True):
            q, k, v = self._before(layer, x, *self._rope)
            keys[:, :, -1:] = k
            values[:, :, -1:] = v
            x = self._after(layer, x, self._attention(q, keys, values))
        logits: Tensor = self._head(self._model, x)
        return logits


def before_attention(layer: LlamaLayer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, projection and RoPE of x [B, 1, d]: q, k and v [B, H, 1, D]."""
    q, k, v = (
        torch.unflatten(part, -1, (layer.heads, -1)).transpose(1, 2)
        for part in layer.qkv(layer.attention_norm(x)).chunk(3, dim=-1)
    )
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def after_attention(layer: LlamaLayer, x: Tensor, mixed: Tensor) -> Tensor:
    """Output projection of mixed [B, H, 1, D], residual, and the gated product of the MLP."""
    x = x + layer.out(mixed.transpose(1, 2).flatten(2))
    h = layer.mlp_norm(x)
    mapped: Tensor = layer.down(F.silu(layer.gate(h)) * layer.up(h))
    return x + mapped


def head(model: Llama, x: Tensor) -> Tensor:
    """Last norm and the head, which is the embedding: x [B, 1, d] -> logits [B, vocab] float32."""
    return F.linear(model.final_norm(x[:, 0]), model.embed_tokens.weight).float()


def _as_it_is(function: Callable[..., object]) -> Callable[..., object]:
    return function
