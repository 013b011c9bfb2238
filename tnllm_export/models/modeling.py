"""TransNormerLLM in plain PyTorch, with the released parameter names (arXiv 2307.14995, released form)."""

from collections.abc import Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tnllm_export.kernels.contract import accumulator_dtype
from tnllm_export.kernels.layer import fused, gated_norm, glu_product, rotate, split_heads, srmsnorm
from tnllm_export.kernels.lightning_attention import (
    lightning_attention,
    lightning_attention_step,
    lightning_attention_step_in_place,
)
from tnllm_export.models.config import Activation, Norm, TransnormerConfig
from tnllm_export.models.decay import slope_rates

Logits = Literal["last", "all"]


class SimpleRMSNorm(nn.Module):
    """SRMSNorm: x rsqrt(mean(x²) + 1e-6) over the last dimension, in float32, without a weight.

    Its readers are linear maps, so under autocast it answers in their dtype and spares each of them a cast.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., d]; the dtype stays, but for autocast."""
        autocast = torch.is_autocast_enabled(x.device.type)
        return srmsnorm(x, torch.get_autocast_dtype(x.device.type) if autocast else None)


class RMSNorm(nn.Module):
    """SRMSNorm times a learned weight [d]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.norm = SimpleRMSNorm()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., d]; the dtype stays."""
        normed: Tensor = self.norm(x)
        return normed * self.weight


class LayerNorm(nn.Module):
    """LayerNorm with weight and bias [d], eps 1e-6, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., d]; the dtype stays."""
        wide = _wide(x)
        centred = wide - wide.mean(-1, keepdim=True)
        normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
        return (normed * self.weight.to(wide.dtype) + self.bias.to(wide.dtype)).to(x.dtype)


class LinearizedRelativePositionEncoding(nn.Module):
    """LRPE: x -> [x cos(t theta), x sin(t theta)], so that q_t · k_s depends on t - s alone; doubles the width.

    theta is float32 whatever the model's dtype: a rounded angle grows wrong with the position.
    """

    theta: nn.Parameter

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        index = torch.arange(heads * head_dim, dtype=torch.float32).reshape(heads, 1, head_dim)
        self.theta = nn.Parameter(10000 ** (-2 / (heads * head_dim) * index))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [B, T, H, D] at positions [B, T] into [B, T, H, 2 D]. Angles are computed in float32."""
        return rotate(x, self.theta, positions)


class GatedLinearAttention(nn.Module):
    """GLA: out_proj(u ⊙ N(lightning_attention(q, k, v))); N is taken over the whole hidden dimension."""

    slope_rate: Tensor

    def __init__(self, config: TransnormerConfig, layer: int) -> None:
        super().__init__()
        d = config.decoder_embed_dim
        self.heads = config.decoder_attention_heads
        self.activation = config.linear_act_fun
        self.gated = config.linear_use_gate
        if self.gated:
            self.qkvu_proj = nn.Linear(d, 4 * d, bias=False)
        else:
            self.qkv_proj = nn.Linear(d, 3 * d, bias=False)
        self.out_proj = nn.Linear(d, d, bias=False)
        self.norm = make_norm(config.norm_type, d)
        self.lrpe = (
            LinearizedRelativePositionEncoding(self.heads, config.head_dim)
            if config.linear_use_lrpe_list[layer]
            else None
        )
        rates = slope_rates(config.decay_type, layer, config.decoder_layers, self.heads)
        self.register_buffer("slope_rate", rates, persistent=False)

    def forward(
        self, x: Tensor, lengths: Tensor | None, positions: Tensor, past_state: Tensor, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Attend over x [B, T, d] with positions [B, T], continuing past_state; return [B, T, d] and the new state.

        `lengths` None means one decoded token, T = 1, by the recurrent step; `in_place` lets it write over past_state.
        """
        query, key, value, gate = self._project(x, positions)
        if lengths is None:
            arguments = query.squeeze(1), key.squeeze(1), value.squeeze(1), self.slope_rate, past_state
            if in_place:
                output, present_state = lightning_attention_step_in_place(*arguments), past_state
            else:
                output, present_state = lightning_attention_step(*arguments)
            # [B, H, V] -> [B, 1, d]
            mixed = output.flatten(1).unsqueeze(1)
        else:
            output, present_state = lightning_attention(query, key, value, self.slope_rate, past_state, lengths)
            # [B, T, H, V] -> [B, T, d]
            mixed = output.flatten(2)
        if gate is not None and isinstance(self.norm, SimpleRMSNorm) and fused(gate, mixed):
            return self.out_proj(gated_norm(gate, mixed)), present_state
        normed = self.norm(mixed)
        return self.out_proj(normed if gate is None else gate * normed), present_state

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        gate = None
        if self.gated:
            projected = self.qkvu_proj(x)
            if self.activation == "silu" and fused(projected):
                theta = None if self.lrpe is None else self.lrpe.theta
                return split_heads(projected, self.heads, theta, positions)
            q, k, v, gate = projected.chunk(4, dim=-1)
        else:
            q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
        # [B, T, d] -> [B, T, H, D]
        query = torch.unflatten(activate(self.activation, q), -1, (self.heads, -1))
        key = torch.unflatten(activate(self.activation, k), -1, (self.heads, -1))
        value = torch.unflatten(v, -1, (self.heads, -1))
        if self.lrpe is not None:
            query, key = self.lrpe(query, positions), self.lrpe(key, positions)
        return query, key, value, gate


class SimpleGatedLinearUnit(nn.Module):
    """SGLU: l3(l1(x) ⊙ l2(x)), with no activation in the released form."""

    def __init__(self, config: TransnormerConfig) -> None:
        super().__init__()
        self.activation = config.glu_act_fun
        self.l1 = nn.Linear(config.decoder_embed_dim, config.glu_dim, bias=False)
        self.l2 = nn.Linear(config.decoder_embed_dim, config.glu_dim, bias=False)
        self.l3 = nn.Linear(config.glu_dim, config.decoder_embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., d] to [..., d]."""
        mapped: Tensor = self.l3(glu_product(activate(self.activation, self.l1(x)), self.l2(x)))
        return mapped


class TransnormerDecoderLayer(nn.Module):
    """Pre-norm layer: x += GLA(N(x)); x += SGLU(N(x))."""

    def __init__(self, config: TransnormerConfig, layer: int) -> None:
        super().__init__()
        self.token_norm = make_norm(config.norm_type, config.decoder_embed_dim)
        self.token_mixer = GatedLinearAttention(config, layer)
        self.channel_norm = make_norm(config.norm_type, config.decoder_embed_dim)
        self.channel_mixer = SimpleGatedLinearUnit(config)

    def forward(
        self, x: Tensor, lengths: Tensor | None, positions: Tensor, past_state: Tensor, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Map x [B, T, d] and the layer's state; `lengths` None means one decoded token (T = 1), perhaps `in_place`."""
        mixed, present_state = self.token_mixer(self.token_norm(x), lengths, positions, past_state, in_place)
        x = x + mixed
        return x + self.channel_mixer(self.channel_norm(x)), present_state


class TransnormerModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: TransnormerConfig) -> None:
        super().__init__()
        self.embed_scale = 1.0 if config.no_scale_embedding else config.decoder_embed_dim**0.5
        self.embed_tokens = nn.Embedding(config.vocab_size, config.decoder_embed_dim)
        self.layers = nn.ModuleList(TransnormerDecoderLayer(config, layer) for layer in range(config.decoder_layers))
        self.final_norm = make_norm(config.norm_type, config.decoder_embed_dim)

    def forward(
        self,
        input_ids: Tensor,
        lengths: Tensor | None,
        positions: Tensor,
        past_state: Sequence[Tensor],
        in_place: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Map input_ids [B, T] to hidden states [B, T, d] and each layer's new state; positions [B] count the past."""
        x = self.embed_tokens(input_ids)
        if self.embed_scale != 1.0:
            x = x * self.embed_scale
        # [B, T]
        token_positions = positions.unsqueeze(1) + torch.arange(input_ids.shape[1], device=input_ids.device)
        present_state = []
        for layer, state in zip(self.layers, past_state, strict=True):
            x, state = layer(x, lengths, token_positions, state, in_place)  # noqa: PLW2901
            present_state.append(state)
        return self.final_norm(x), present_state


class TransnormerForCausalLM(nn.Module):
    """TransNormerLLM with its language-model head: the truth that every other runtime is compared with.

    `forward` is the prefill and training program, `decode` the one for a single token. Both return float32 logits
    and the new recurrent states, [B, H, K, V] float32 per layer, and change nothing in place; `decode_in_place` does.
    """

    def __init__(self, config: TransnormerConfig) -> None:
        super().__init__()
        self.config = config
        self.model = TransnormerModel(config)
        self.lm_head = nn.Linear(config.decoder_embed_dim, config.vocab_size, bias=False)
        self.reset_parameters()
        self.tie_weights()

    def reset_parameters(self) -> None:
        """Draw every matrix from N(0, init_std²)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.init_std)

    def tie_weights(self) -> None:
        """Make `lm_head` the embedding, where the configuration ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def cast_weights(self, dtype: torch.dtype) -> Self:
        """Cast every parameter to `dtype` in place, but LRPE's theta, which stays float32 (see `parameter_dtype`)."""
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(parameter_dtype(name, dtype))
        for name, buffer in self.named_buffers():
            buffer.data = buffer.data.to(parameter_dtype(name, dtype))
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of recurrent states: float32, or float64 for a float64 model."""
        return torch.float64 if self.lm_head.weight.dtype == torch.float64 else torch.float32

    def initial_state(self, batch: int) -> list[Tensor]:
        """Return the all-zero state of each layer, [B, H, K, V]."""
        device = self.lm_head.weight.device
        shapes = (self.config.state_shape(layer, batch) for layer in range(self.config.decoder_layers))
        return [torch.zeros(shape, dtype=self.state_dtype, device=device) for shape in shapes]

    def forward(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
        past_state: Sequence[Tensor] | None = None,
        logits: Logits = "all",
    ) -> tuple[Tensor, list[Tensor]]:
        """Feed many tokens.

        Args:
            input_ids: [B, T] int64.
            lengths: [B] int32, valid tokens of each row; the rest is padding. Default: all T.
            positions: [B] int64, tokens that are already in the state. Default: 0.
            past_state: One [B, H, K, V] float32 per layer. Default: zero.
            logits: "all" tokens' logits [B, T, vocab], or [B, vocab] of the "last" valid token of each row.

        Returns:
            Logits float32, and each layer's new state.

        Raises:
            ValueError: `logits` is neither "all" nor "last".
        """
        if logits not in ("all", "last"):
            raise ValueError(f'logits is {logits!r}; expected "all" or "last"')
        B, T = input_ids.shape
        if lengths is None:
            lengths = torch.full((B,), T, dtype=torch.int32, device=input_ids.device)
        if positions is None:
            positions = torch.zeros(B, dtype=torch.int64, device=input_ids.device)
        if past_state is None:
            past_state = self.initial_state(B)
        hidden, present_state = self.model(input_ids, lengths, positions, past_state)
        if logits == "last":
            # A row without valid tokens has no last one; its logits are those of token 0 and mean nothing.
            last = (lengths.to(torch.int64) - 1).clamp(min=0)
            # [B, T, d] -> [B, d]
            index = torch.unflatten(last, 0, (-1, 1, 1)).expand(-1, 1, hidden.shape[-1])
            hidden = hidden.gather(1, index).squeeze(1)
        return _wide(self.lm_head(hidden)), present_state

    def decode(self, input_ids: Tensor, positions: Tensor, past_state: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Feed one token, input_ids [B, 1], by the robust recurrence; return logits [B, vocab] and new states."""
        hidden, present_state = self.model(input_ids, None, positions, past_state)
        return _wide(self.lm_head(hidden.squeeze(1))), present_state

    def decode_in_place(self, input_ids: Tensor, positions: Tensor, state: Sequence[Tensor]) -> Tensor:
        """Feed one token as `decode` does and write the new states over the old ones, which must be contiguous."""
        hidden, _ = self.model(input_ids, None, positions, state, True)
        return _wide(self.lm_head(hidden.squeeze(1)))


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a model of activation dtype `dtype` keeps a parameter or buffer.

    LRPE's angles and the decay rates need float32: theta and slope_rate are never rounded.
    """
    if name.endswith((".lrpe.theta", ".slope_rate")):
        return accumulator_dtype(dtype)
    return dtype


def make_norm(norm: Norm, width: int) -> nn.Module:
    """Return a norm over the last dimension."""
    if norm == "simplermsnorm":
        return SimpleRMSNorm()
    return RMSNorm(width) if norm == "rmsnorm" else LayerNorm(width)


def activate(activation: Activation, x: Tensor) -> Tensor:
    """Apply "silu", "1+elu" or "none"."""
    if activation == "silu":
        return F.silu(x)
    return 1 + F.elu(x) if activation == "1+elu" else x


def _wide(x: Tensor) -> Tensor:
    """Give x in float32, or float64 where it already is."""
    return x if x.dtype == torch.float64 else x.float()
