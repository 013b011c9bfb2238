"""Training steps of the 385M configuration over context lengths, with as many tokens in each step.

A step is forward, backward and AdamW (fused) under bfloat16 autocast, with float32 weights. Three models: ours with
Triton kernels, ours with the blocked PyTorch form, and a Transformer in LLaMA's form of the same width, depth,
vocabulary and (within 1 %) size with PyTorch's flash attention. All alike: each layer is compiled by torch.compile,
once for all contexts, and checkpointed (131,072 tokens' activations do not fit otherwise), and the loss is made some
thousand tokens at a time. TNLLM_BENCH_COMPILE=0 leaves torch.compile out, for all three.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from benchmarks.attention import chip_records
from benchmarks.chunked_loss import chunked_cross_entropy
from benchmarks.gpu_timing import ceilings, describe
from benchmarks.llama import Llama, LlamaSize
from benchmarks.names import OURS, TRAINING, TRAINING_PARITY
from benchmarks.records import Record, gpu_versions
from tnllm_export.kernels.dispatch import Choice, use_kernels
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import TransnormerForCausalLM
from tnllm_export.progress import Progress, silent

NAME = "training"
DEVICE = "cuda"

SPEED, MEMORY, UTILISATION = "tokens per second", "peak memory", "model FLOP utilisation"
BLOCKED, LLAMA = "ours, blocked PyTorch", "LLaMA form, SDPA flash"

DATASHEET_FLOPS = 989e12
"""Dense bfloat16 FLOP per second of an H100 or H200, by NVIDIA's datasheet."""

LIMIT_S = float(os.environ.get("TNLLM_BENCH_SECONDS", "420"))
"""What is not begun by then is left out."""


@dataclass(frozen=True)
class Plan:
    """What is trained, on what, and how long."""

    config: TransnormerConfig
    llama: LlamaSize
    contexts: tuple[int, ...] = (2048, 8192, 32768, 131072)
    tokens: int = 131072
    parity_tokens: int = 2048
    device: str = DEVICE
    compiled: bool = os.environ.get("TNLLM_BENCH_COMPILE") != "0"
    kernels: Choice = "triton"

    @property
    def dtype(self) -> torch.dtype:
        """Of products."""
        return torch.bfloat16


PLAN = Plan(
    config=TransnormerConfig(
        vocab_size=64000, decoder_embed_dim=1024, decoder_layers=24, decoder_attention_heads=8, glu_dim=2816
    ),
    llama=LlamaSize(width=1024, layers=24, heads=8, glu_width=3200, vocab_size=64000),
)


class Checkpointed(nn.Module):
    """A layer whose activations are computed anew in the backward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *arguments: Tensor) -> object:
        """Run the layer."""
        return checkpoint(self.layer, *arguments, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class Trainee:
    """A model ready for steps: its hidden states, the tied embedding, all parameters."""

    model: nn.Module
    hidden: Callable[[Tensor], Tensor]
    embedding: nn.Parameter
    optimizer: torch.optim.Optimizer
    compiled: bool = False

    def loss(self, ids: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the mean cross entropy; products in `dtype`."""
        cast = torch.autocast(ids.device.type, dtype) if dtype != torch.float32 else nullcontext()
        with cast:
            hidden = self.hidden(ids)
        return chunked_cross_entropy(hidden.flatten(0, 1), self.embedding, targets.flatten(), dtype, self.compiled)

    def step(self, ids: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Train on one batch and return its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(ids, targets, dtype)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def gradient(self, ids: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the gradients of all parameters, one after the other."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(ids, targets, dtype).backward()
        parts = [parameter.grad.flatten() for parameter in self.model.parameters() if parameter.grad is not None]
        self.optimizer.zero_grad(set_to_none=True)
        return torch.cat(parts)


def run(progress: Progress = silent, plan: Plan = PLAN) -> Iterator[Record]:
    """Train each model at each context; ours first."""
    deadline = time.monotonic() + LIMIT_S
    yield from chip_records(plan.device)
    forms: dict[str, tuple[Callable[[Plan], Trainee], Choice]] = {
        OURS: (transnormer, plan.kernels), LLAMA: (llama, "auto"), BLOCKED: (transnormer, "pytorch"),
    }  # fmt: skip
    ours: dict[int, tuple[float, float]] = {}
    for form, (make, kernels) in forms.items():
        torch.manual_seed(0)
        trainee = make(plan)
        if form == OURS:
            yield from parity_records(trainee, plan)
        for done, context in enumerate(plan.contexts):
            progress(f"training, {form}", done, len(plan.contexts), "contexts")
            try:
                if time.monotonic() > deadline:
                    raise TimeoutError("no time left")  # noqa: TRY301
                with use_kernels(kernels), _flash_attention(plan):
                    measured = measure(trainee, context, plan)
            except Exception as error:
                yield from _absent(form, context, plan, ours.get(context), describe(error))
            else:
                if form == OURS:
                    ours[context] = measured
                yield from _records(form, context, plan, ours.get(context), measured)
            _release(plan)
        del trainee
        _release(plan)
    progress("training", len(forms), len(forms), "models")


def transnormer(plan: Plan) -> Trainee:
    """Our eager model, layers checkpointed."""
    with torch.device(plan.device):
        model = TransnormerForCausalLM(plan.config)
    model.model.layers = _prepare_layers(model.model.layers, plan)

    def hidden(ids: Tensor) -> Tensor:
        batch, tokens = ids.shape
        lengths = torch.full((batch,), tokens, dtype=torch.int32, device=ids.device)
        positions = torch.zeros(batch, dtype=torch.int64, device=ids.device)
        found: Tensor = model.model(ids, lengths, positions, model.initial_state(batch))[0]
        return found

    return Trainee(model, hidden, model.model.embed_tokens.weight, _optimizer(model, plan), plan.compiled)


def llama(plan: Plan) -> Trainee:
    """The Transformer, layers checkpointed."""
    with torch.device(plan.device):
        model = Llama(plan.llama)
    model.layers = _prepare_layers(model.layers, plan)
    return Trainee(model, model, model.embed_tokens.weight, _optimizer(model, plan), plan.compiled)


def parity_records(trainee: Trainee, plan: Plan) -> Iterator[Record]:
    """Error of all gradients in bfloat16 against float32, ours beside the blocked PyTorch form."""
    ids, targets = _batch(1, plan.parity_tokens, plan)
    errors: dict[str, float] = {}
    reason = ""
    with use_kernels("pytorch"), torch.compiler.set_stance("force_eager"):
        reference = trainee.gradient(ids, targets, torch.float32)
    for form, kernels in ((BLOCKED, "pytorch"), (OURS, plan.kernels)):
        try:
            with use_kernels(kernels):
                found = trainee.gradient(ids, targets, plan.dtype)
            errors[form] = ((found - reference).norm() / reference.norm()).item()
        except Exception as error:
            reason = f" (absent: {describe(error)})"
    yield Record(
        TRAINING_PARITY, f"{plan.parity_tokens} tokens", "error of all gradients against float32", "1",
        errors.get(OURS), None, BLOCKED + reason, errors.get(BLOCKED), gpu_versions(),
    )  # fmt: skip
    _release(plan)


def measure(trainee: Trainee, context: int, plan: Plan, most: int = 5, budget_s: float = 12.0) -> tuple[float, float]:
    """Return tokens per second (median step) and peak memory in bytes at one context length."""
    ids, targets = _batch(plan.tokens // context, context, plan)
    trainee.step(ids, targets, plan.dtype)  # compiles
    if plan.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    # The first step here is a warm-up.
    while len(times) < 2 or (len(times) < most + 1 and sum(times) < budget_s):
        start = time.perf_counter()
        loss = trainee.step(ids, targets, plan.dtype).item()  # waits for the GPU
        if plan.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        if not 0 < loss < float("inf"):
            raise ArithmeticError(f"the loss is {loss}")
    peak = torch.cuda.max_memory_allocated() if plan.device == "cuda" else 0
    return plan.tokens / statistics.median(times[1:]), float(peak)


def flops_per_token(form: str, context: int, plan: Plan) -> float:
    """Model FLOP per token, forward and backward: recomputation does not count.

    6 per weight of the matrices (the head's included, the embedding's look-up not), and of attention forward, three
    times that with backward: 4 K V per head (S + k vᵀ and qᵀ S) for ours at any context; 2 T D per head (q·k and p·v,
    two FLOP each, T / 2 keys on average) for causal softmax attention.
    """
    c = plan.config
    if form == LLAMA:
        size = plan.llama
        weights = size.layers * (4 * size.width**2 + 3 * size.width * size.glu_width) + size.vocab_size * size.width
        return 6.0 * weights + 3.0 * size.layers * 2 * context * size.width
    d = c.decoder_embed_dim
    weights = c.decoder_layers * (5 * d**2 + 3 * d * c.glu_dim) + c.vocab_size * d
    return 6.0 * weights + 3.0 * 4 * c.state_elements(1)


def _prepare_layers(layers: nn.ModuleList, plan: Plan) -> nn.ModuleList:
    if plan.compiled:
        for layer in layers:
            layer.compile(dynamic=True)
    return nn.ModuleList(Checkpointed(layer) for layer in layers)


def _flash_attention(plan: Plan) -> AbstractContextManager[object]:
    """Only one kind of attention on a GPU, so that the name in the table holds."""
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if plan.device == "cuda" else nullcontext()


def _optimizer(model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=plan.device == "cuda")


def _batch(rows: int, context: int, plan: Plan) -> tuple[Tensor, Tensor]:
    """Random token ids [B, T] and their successors."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, plan.config.vocab_size, (rows, context + 1), generator=generator).to(plan.device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _release(plan: Plan) -> None:
    gc.collect()
    if plan.device == "cuda":
        torch.cuda.empty_cache()


def _values(form: str, context: int, plan: Plan, measured: tuple[float, float]) -> dict[str, tuple[str, float]]:
    """Unit and value by metric."""
    speed, peak = measured
    flops = speed * flops_per_token(form, context, plan)
    return {
        SPEED: ("tokens/s", speed),
        MEMORY: ("GiB", peak / 2**30),
        f"{UTILISATION}, of the measured matrix rate": ("1", flops / ceilings(plan.device).matmul),
        f"{UTILISATION}, of 989 TFLOP/s": ("1", flops / DATASHEET_FLOPS),
    }


def _records(
    form: str, context: int, plan: Plan, ours: tuple[float, float] | None, measured: tuple[float, float]
) -> Iterator[Record]:
    """One context of one model: ours by itself, a peer with ours beside it."""
    case = f"{context} | {'compiled' if plan.compiled else 'eager'}"
    mine = _values(OURS, context, plan, ours) if ours else {}
    for metric, (unit, value) in _values(form, context, plan, measured).items():
        if form == OURS:
            yield Record(TRAINING, case, metric, unit, value, versions=gpu_versions())
        else:
            beside = mine[metric][1] if mine else None
            yield Record(TRAINING, case, metric, unit, beside, None, form, value, gpu_versions())


def _absent(
    form: str, context: int, plan: Plan, ours: tuple[float, float] | None, reason: str
) -> Iterator[Record]:  # fmt: skip
    case = f"{context} | {'compiled' if plan.compiled else 'eager'}"
    value = ours[0] if ours and form != OURS else None
    yield Record(TRAINING, case, SPEED, "tokens/s", value, None, f"{form} (absent: {reason})", None, gpu_versions())
