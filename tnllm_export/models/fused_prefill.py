"""Reading many tokens with the model's own weights, for runtimes that own the states.

It launches the kernels and matrix products of the eager model past its modules, whose calls take longer in Python than
a short prompt's kernels on a GPU. Matrix products add to the residual themselves, in float32, so nothing is rounded
more often than in the eager model; the last norm is that of one token; new states are written where they belong.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tnllm_export.kernels.layer.norm import EPSILON
from tnllm_export.kernels.lightning_attention.form import HEAD_DIM_STEP
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.fused_decode import FusedDecoder, layers_of, weight_of
from tnllm_export.models.modeling import TransnormerForCausalLM


def prefill(
    model: TransnormerForCausalLM,
    input_ids: Tensor,
    lengths: Tensor,
    positions: Tensor,
    past_state: Sequence[Tensor],
    present_state: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Feed many tokens as the model's `forward` does, in the quickest way for this model and device; no gradients.

    Where the host waits for nothing and kernels are compiled, it may be captured into a CUDA graph.

    Args:
        model: What runs.
        input_ids: [B, T] int64.
        lengths: [B] int32, valid tokens of each row.
        positions: [B] int64, tokens that are already in the state.
        past_state: One [B, H, K, V] float32 per layer.
        present_state: Likewise, contiguous, where the new state goes; default: into memory of its own.

    Returns:
        Logits [B, vocab] float32 of each row's last valid token (where there is none, they mean nothing), and the new
        state.
    """
    weight = model.lm_head.weight
    if unsupported(model.config, weight.dtype, weight.device) is None:
        if present_state is None:
            present_state = [torch.empty_like(state, memory_format=torch.contiguous_format) for state in past_state]
        return fused_prefill(model, input_ids, lengths, positions, past_state, present_state), present_state
    logits, found = model(input_ids, lengths, positions, past_state, "last")
    if present_state is None:
        return logits, found
    torch._foreach_copy_(present_state, found)
    return logits, present_state


def unsupported(config: TransnormerConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why a model cannot be read by fused kernels, or None where it can."""
    reason = FusedDecoder.unsupported(config, dtype, device, 1)
    if reason is None and config.head_dim % HEAD_DIM_STEP:
        reason = f"found heads of {config.head_dim}, expected a multiple of {HEAD_DIM_STEP}"
    return reason


def fused_prefill(
    model: TransnormerForCausalLM,
    input_ids: Tensor,
    lengths: Tensor,
    positions: Tensor,
    past_state: Sequence[Tensor],
    present_state: Sequence[Tensor],
) -> Tensor:
    """Compute the logits of `prefill` by fused kernels, for a model that `unsupported` has nothing against."""
    from tnllm_export.kernels.layer.triton_kernels.gate import gated_norm_triton  # noqa: PLC0415 (may be absent)
    from tnllm_export.kernels.layer.triton_kernels.heads import split_heads_triton  # noqa: PLC0415
    from tnllm_export.kernels.layer.triton_kernels.norm import srmsnorm_triton  # noqa: PLC0415
    from tnllm_export.kernels.lightning_attention.chunk import sweep  # noqa: PLC0415

    config = model.config
    B, T = input_ids.shape
    d, H = config.decoder_embed_dim, config.decoder_attention_heads
    x = F.embedding(input_ids, weight_of(model.model.embed_tokens))
    dtype = x.dtype
    if model.model.embed_scale != 1.0:
        x *= model.model.embed_scale
    # [B T, d], the same memory
    rows = x.view(B * T, d)
    # [B, T]
    token_positions = positions.unsqueeze(1) + torch.arange(T, device=x.device)
    for layer, past, present in zip(layers_of(model), past_state, present_state, strict=True):
        mixer, channel = layer.token_mixer, layer.channel_mixer
        theta = None if mixer.lrpe is None else mixer.lrpe.theta
        projected = F.linear(srmsnorm_triton(x, dtype, EPSILON), weight_of(mixer.qkvu_proj))
        query, key = split_heads_triton(projected, H, theta, token_positions)
        # [B, T, H, D]
        value = projected.narrow(2, 2 * d, d).view(B, T, H, d // H)
        mixed = torch.empty((B, T, H, d // H), dtype=dtype, device=x.device)
        sweep(query, key, value, mixer.slope_rate, past, lengths, mixed, present)
        gated = gated_norm_triton(projected.narrow(2, 3 * d, d), mixed.view(B, T, d), EPSILON)
        rows.addmm_(gated.view(B * T, d), weight_of(mixer.out_proj).t())
        del projected, query, key, value, mixed, gated
        normed = srmsnorm_triton(x, dtype, EPSILON)
        inner = F.linear(normed, weight_of(channel.l1))
        inner *= F.linear(normed, weight_of(channel.l2))
        rows.addmm_(inner.view(B * T, -1), weight_of(channel.l3).t())
        del normed, inner
    last = (lengths.to(torch.int64) - 1).clamp(min=0) + torch.arange(0, B * T, T, device=x.device)
    hidden = srmsnorm_triton(rows.index_select(0, last), dtype, EPSILON)
    return F.linear(hidden, model.lm_head.weight).float()
