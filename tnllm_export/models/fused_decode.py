"""Decoding one token in five kernels a layer, with the model's own weights, for runtimes that own the state.

Per layer: norm, projection, SiLU and LRPE; the recurrent step in place; gate, norm, `out_proj` and residual; norm,
`l1`, `l2` and their product; `l3` and residual. A batch too large to be summed outside the tensor cores takes a kernel
more for each norm. Sums are float32 and are rounded where they are written, so nothing is rounded more often than in
the eager model.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from tnllm_export.kernels.dispatch import interpreted, kernel_choice
from tnllm_export.kernels.layer.form import DTYPES, MAX_WIDTH
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerDecoderLayer, TransnormerForCausalLM

MAX_BATCH = 64
"""Tokens that a program takes at once; beyond, plain matrix products are as fast."""

MAX_KEY_DIM = 256
"""Width of a head's keys, LRPE's doubling included, whose state a program holds in registers."""


class FusedDecoder:
    """Decodes for one batch size. Its buffers are allocated once; the weights are the model's own.

    Raises:
        ValueError: The model is one of those that `unsupported` names.
    """

    def __init__(self, model: TransnormerForCausalLM, batch: int) -> None:
        from tnllm_export.kernels.decode.linear import Heads, Scratch  # noqa: PLC0415 (Triton may be absent)

        config, weight = model.config, model.lm_head.weight
        dtype, device = weight.dtype, weight.device
        reason = self.unsupported(config, dtype, device, batch)
        if reason is not None:
            raise ValueError(f"fused decoding: {reason}; decode with the model instead")
        self._model = model
        self._batch = batch
        d, H = config.decoder_embed_dim, config.decoder_attention_heads
        D, glu = config.head_dim, config.glu_dim

        def buffer(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self._x = buffer(batch, d)
        self._mixed = buffer(batch, H, D)
        self._inner = buffer(batch, glu)
        self._logits = buffer(batch, config.vocab_size, dtype=torch.float32)
        query, key = (buffer(batch * max(map(config.key_dim, range(config.decoder_layers))) * H) for _ in range(2))
        value, gate = buffer(batch, H, D), buffer(batch, d)
        self._layers: list[tuple[TransnormerDecoderLayer, Tensor, Heads]] = []
        for index, layer in enumerate(layers_of(model)):
            K = config.key_dim(index)
            size, shape = batch * H * K, (batch, H, K)
            theta = None if layer.token_mixer.lrpe is None else layer.token_mixer.lrpe.theta.detach()
            heads = Heads(H, key[:size].view(shape), value, gate, theta)
            self._layers.append((layer, query[:size].view(shape), heads))
        self._scratch = Scratch(
            batch,
            [
                ("heads", 4 * d, d),
                ("residual", d, d),
                ("product", glu, d),
                ("residual", d, glu),
                ("store", config.vocab_size, d),
            ],
            dtype,
            device,
        )

    @staticmethod
    def unsupported(config: TransnormerConfig, dtype: torch.dtype, device: torch.device, batch: int) -> str | None:
        """Return why a model cannot be decoded this way, or None where it can."""
        widest = max(map(config.key_dim, range(config.decoder_layers)))
        findings = (
            (config.norm_type != "simplermsnorm", f"found norm_type {config.norm_type}, expected simplermsnorm"),
            (config.linear_act_fun != "silu", f"found linear_act_fun {config.linear_act_fun}, expected silu"),
            (config.glu_act_fun != "none", f"found glu_act_fun {config.glu_act_fun}, expected none"),
            (not config.linear_use_gate, "found attention without a gate, expected linear_use_gate"),
            (dtype not in DTYPES, f"found {dtype}, expected float32, float16 or bfloat16"),
            (widest > MAX_KEY_DIM, f"found keys of {widest}, expected at most {MAX_KEY_DIM}"),
            (config.decoder_embed_dim > MAX_WIDTH, f"found a width above {MAX_WIDTH}"),
            (not 0 < batch <= MAX_BATCH, f"found a batch of {batch}, expected 1 to {MAX_BATCH}"),
            (find_spec("triton") is None, "found no package triton; install it"),
            (kernel_choice() == "pytorch", "found Triton's kernels switched off"),
            (device.type != "cuda" and not _may_interpret(), f"found a model on {device.type}, expected cuda"),
        )
        return next((reason for found, reason in findings if found), None)

    def decode(self, input_ids: Tensor, positions: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Feed one token to each sequence.

        After a first call, which compiles, nothing is allocated and the host waits for nothing: it may be captured
        into a CUDA graph.

        Args:
            input_ids: [B, 1] int64, contiguous.
            positions: [B] int64, contiguous, tokens that are already in the states.
            states: One [B, H, K, V] float32 per layer, contiguous, updated.

        Returns:
            Logits [B, vocab] float32, in a buffer that the next call overwrites.
        """
        from tnllm_export.kernels.decode.linear import linear  # noqa: PLC0415
        from tnllm_export.kernels.decode.recurrence import recurrence  # noqa: PLC0415
        from tnllm_export.kernels.decode.rows import embed  # noqa: PLC0415

        model, x, scratch, inner = self._model.model, self._x, self._scratch, self._inner
        self._check(input_ids, positions, states)
        embed(input_ids, weight_of(model.embed_tokens), model.embed_scale, x)
        mixed_rows = self._mixed.view(self._batch, -1)
        for (layer, query, heads), state in zip(self._layers, states, strict=True):
            mixer, channel = layer.token_mixer, layer.channel_mixer
            weight = weight_of(mixer.qkvu_proj)
            linear(x, weight, query, scratch, before="norm", after="heads", heads=heads, positions=positions)
            recurrence(query, heads.key, heads.value, mixer.slope_rate, state, self._mixed)
            linear(heads.gate, weight_of(mixer.out_proj), x, scratch, before="gate", after="residual", other=mixed_rows)
            linear(
                x, weight_of(channel.l1), inner, scratch, before="norm", after="product", weight_2=weight_of(channel.l2)
            )
            linear(inner, weight_of(channel.l3), x, scratch, after="residual")
        linear(x, weight_of(self._model.lm_head), self._logits, scratch, before="norm")
        return self._logits

    def _check(self, input_ids: Tensor, positions: Tensor, states: Sequence[Tensor]) -> None:
        """Raise ValueError where a kernel would read or write elsewhere than it should."""
        config, batch = self._model.config, self._batch
        contiguous = input_ids.is_contiguous() and positions.is_contiguous()
        if input_ids.shape != (batch, 1) or positions.shape != (batch,) or not contiguous:
            raise ValueError(
                f"found input_ids {list(input_ids.shape)} and positions {list(positions.shape)}; "
                f"expected [{batch}, 1] and [{batch}], contiguous, as this decoder was made for"
            )
        for layer, state in enumerate(states):
            expected = config.state_shape(layer, batch)
            if state.shape != expected or state.dtype != torch.float32 or not state.is_contiguous():
                raise ValueError(
                    f"found a state {list(state.shape)} {state.dtype} with strides {state.stride()} in layer {layer}; "
                    f"expected {list(expected)} torch.float32, contiguous"
                )


def layers_of(model: TransnormerForCausalLM) -> list[TransnormerDecoderLayer]:
    """Return the layers of a model."""
    return [layer for layer in model.model.layers if isinstance(layer, TransnormerDecoderLayer)]


def weight_of(module: nn.Module) -> Tensor:
    """Return the matrix of a linear map or an embedding."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _may_interpret() -> bool:
    return interpreted() and kernel_choice() == "triton"
