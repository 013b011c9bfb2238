"""What the inference benchmark runs: models of random weights, and ways to decode a token."""

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor, nn

from benchmarks.llama import Llama, LlamaSize
from tnllm_export.generate import Generator, SamplingParams
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.modeling import LinearizedRelativePositionEncoding, TransnormerForCausalLM, parameter_dtype
from tnllm_export.runtime import State, TorchRuntime
from tnllm_export.runtime.torch import model_over

Step = Callable[[Tensor, Tensor], Tensor]
"""Token ids [B, 1] and positions [B] on the host -> logits [B, vocab] on the device; it keeps its state itself."""


def random_model(config: TransnormerConfig, dtype: torch.dtype, device: str) -> TransnormerForCausalLM:
    """Return a model of random weights that were made on the device; LRPE's angles are those of a new model."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in TransnormerForCausalLM(config).named_parameters()}
    torch.manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("lrpe.theta"):
            lrpe = LinearizedRelativePositionEncoding(config.decoder_attention_heads, config.head_dim)
            tensors[name] = lrpe.theta.detach().to(device)
        else:
            weights = torch.empty(shape, dtype=parameter_dtype(name, dtype), device=device)
            tensors[name] = weights.normal_(std=config.init_std)
    return model_over(config, tensors, torch.device(device))


def random_llama(size: LlamaSize, dtype: torch.dtype, device: str) -> Llama:
    """Return a Transformer of random weights that were made on the device."""
    with torch.device("meta"):
        model = Llama(size).to(dtype)
    model = model.to_empty(device=device).requires_grad_(False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02)
    return model


class InPlace(nn.Module):
    """The decode program with its state in buffers, as torch.compile's CUDA graphs want it."""

    def __init__(self, model: TransnormerForCausalLM, batch: int) -> None:
        super().__init__()
        self.model = model
        self.layers = model.config.decoder_layers
        for layer, state in enumerate(model.initial_state(batch)):
            self.register_buffer(f"state_{layer}", state)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Feed input_ids [B, 1]; return logits [B, vocab]."""
        states = [self.get_buffer(f"state_{layer}") for layer in range(self.layers)]
        logits, present = self.model.decode(input_ids, positions, states)
        for state, new in zip(states, present, strict=True):
            state.copy_(new)
        return logits


def prefill(runtime: TorchRuntime, ids: Tensor, state: State, position: int = 0) -> tuple[Tensor, State]:
    """Feed ids [B, T], all valid, behind `position` tokens."""
    B, T = ids.shape
    return runtime.prefill(ids, torch.full((B,), T, dtype=torch.int32), torch.full((B,), position), state)


def runtime_step(runtime: TorchRuntime, state: State) -> Step:
    """Decode by a runtime from `state` on."""

    def step(input_ids: Tensor, positions: Tensor) -> Tensor:
        nonlocal state
        logits, state = runtime.decode(input_ids, positions, state)
        return logits

    return step


def program_step(program: Callable[[Tensor, Tensor], Tensor], device: str) -> Step:
    """Decode by a program whose inputs are on the device."""
    return lambda input_ids, positions: program(input_ids.to(device), positions.to(device))


def loop_milliseconds(step: Step, batch: int, position: int, budget_s: float = 0.4, warm_up: int = 4) -> float:
    """Return the median time of one token in a greedy loop: the step, the choice, and the token's way to the host."""
    tokens = torch.full((batch, 1), 5)
    positions = torch.full((batch,), position)
    times: list[float] = []
    started = float("inf")
    while len(times) < warm_up + 5 or (time.perf_counter() - started < budget_s and len(times) < 200):
        start = time.perf_counter()
        if len(times) == warm_up:
            started = start
        tokens = step(tokens, positions).argmax(-1, keepdim=True).cpu()
        times.append(1e3 * (time.perf_counter() - start))
        positions = positions + 1
    return statistics.median(times[warm_up:])


def generation_milliseconds(runtime: TorchRuntime, batch: int, tokens: int, repeats: int = 3) -> float:
    """Return the median time of one token in greedy generation through `Generator`, behind the first, of some runs."""
    generator = Generator(runtime)
    params = SamplingParams(max_new_tokens=tokens, stop_at_eos=False)
    prompts = torch.randint(runtime.info.config.vocab_size, (batch, 16), generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(repeats + 1):
        found = generator.generate(prompts.tolist(), params)[-1]
        times.append(1e3 * found.decode_seconds / (tokens - 1))
    return statistics.median(times[1:])


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread when the block takes longer; again and again, should it be swallowed."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1), 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
