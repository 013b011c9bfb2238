"""What the inference benchmark measures, and what a token must cost."""

import gc
import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from benchmarks.gpu_timing import ceilings
from benchmarks.llama import LlamaSize
from tnllm_export.kernels.dispatch import Choice
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.runtime.cuda_graphs import Capture, CudaCapture

DEVICE = "cuda"

TOKEN_TIME, PEAK, RATE = "time per token", "peak memory", "rate"

GENERATION = "generation"
"""How a token is timed as users get it; beside `names.HOST` and `names.DEVICE_ONLY`."""

LIMIT_S = float(os.environ.get("TNLLM_BENCH_SECONDS", "190"))
"""What is not begun by then is left out."""


@dataclass(frozen=True)
class Size:
    """A TransNormerLLM and a Transformer of as many layers and, within 1 %, weights."""

    name: str
    config: TransnormerConfig
    llama: LlamaSize


def _size(name: str, width: int, layers: int, glu: int, llama_glu: int, *, scaled: bool) -> Size:
    heads = width // 128
    config = TransnormerConfig(
        vocab_size=64000,
        decoder_embed_dim=width,
        decoder_layers=layers,
        decoder_attention_heads=heads,
        glu_dim=glu,
        no_scale_embedding=not scaled,
    )
    return Size(name, config, LlamaSize(width, layers, heads, llama_glu, 64000))


SIZES = (
    _size("7B", 4096, 30, 11008, 12384, scaled=False),
    _size("1B", 2048, 16, 5632, 6304, scaled=True),
)


@dataclass(frozen=True)
class Plan:
    """What is measured, on what, and how long.

    Attributes:
        sizes: Models, and Transformers to go with them.
        parity: The model that parity is checked on.
        parity_tokens: Of its prompt, and decoded after it.
        batches: Sequences decoded at once.
        contexts: Tokens before those that are timed.
        generated: Tokens of a generation.
        piece: Tokens of a prefill at once.
        prompts: Lengths for the time to the first token.
        device: "cuda", or "cpu" to try the code out.
        capture: How steps and short prompts are captured; "auto": as CUDA graphs.
        kernels: Of our own forms.
        compiled: Whether torch.compile is used, for a peer and inside the Transformer.
        compile_s: What one compilation may take.
        limit_s: What is not begun by then is left out.
    """

    sizes: tuple[Size, ...] = SIZES
    parity: Size = SIZES[1]
    parity_tokens: tuple[int, int] = (512, 32)
    batches: tuple[int, ...] = (1, 32)
    contexts: tuple[int, ...] = (1024, 4096, 16384, 65536, 131072)
    generated: int = 128
    piece: int = 8192
    prompts: tuple[int, ...] = (64, 512, 2048, 8192, 32768)
    device: str = DEVICE
    capture: Capture | Literal["auto"] = "auto"
    kernels: Choice = "triton"
    compiled: bool = os.environ.get("TNLLM_BENCH_COMPILE") != "0"
    compile_s: float = float(os.environ.get("TNLLM_BENCH_COMPILE_SECONDS", "50"))
    limit_s: float = LIMIT_S

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return torch.bfloat16

    def captures(self) -> Capture:
        """Return what captures a step beside a runtime."""
        if self.capture != "auto":
            return self.capture
        return CudaCapture(torch.device(self.device, torch.cuda.current_device()))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, a tied head once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def state_bytes(config: TransnormerConfig, batch: int) -> int:
    """Bytes of the float32 states of `batch` sequences."""
    return 4 * config.state_elements(batch)


def prefill_flops(config: TransnormerConfig, tokens: int) -> float:
    """FLOP of a prompt of `tokens` tokens.

    2 per token and weight of the layers' matrices, 4 K V per token and head of attention (S + k vᵀ and qᵀ S), and 2 per
    weight of the head once, as only the last token's logits are made.
    """
    c, d = config, config.decoder_embed_dim
    weights = c.decoder_layers * (5 * d**2 + 3 * d * c.glu_dim)
    states = state_bytes(config, 1) // 4
    return tokens * (2.0 * weights + 4.0 * states) + 2.0 * c.vocab_size * d


def token_floor(weights: int, read: int, written: int, device: str) -> float:
    """Milliseconds of a token at the bandwidth of a copy: bytes of weights, and what else is read and written."""
    return 1e3 * (weights + read + written) / ceilings(device).bandwidth


def release(device: str) -> None:
    """Give memory back that nobody holds."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
