"""Decoding costs the same at any context: time per token after 16,384 tokens against that after 512, in turns."""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.records import Record
from tnllm_export.demo import checkpoint_folder
from tnllm_export.export import export_bundle
from tnllm_export.progress import Progress, silent
from tnllm_export.runtime import Runtime, State, load_runtime

NAME = "constant cost"
SHORT, LONG = 512, 16384
LIMIT = 0.05


def run(progress: Progress = silent) -> list[Record]:
    """Measure on the demo model, ONNX Runtime on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = export_bundle(checkpoint_folder(), Path(folder) / "bundle", progress=progress)
        runtime = load_runtime(bundle)
        seconds, size = compare(runtime, progress=progress)
    return [
        Record(NAME, "decode, demo model, ONNX Runtime CPU", "time per token after 16384 tokens of context", "µs",
               seconds[LONG] * 1e6, peer="after 512 tokens", peer_value=seconds[SHORT] * 1e6),
        Record(NAME, "decode, demo model, ONNX Runtime CPU", "state after 16384 tokens of context", "bytes",
               size[LONG], peer="after 512 tokens", peer_value=size[SHORT]),
    ]  # fmt: skip


def compare(runtime: Runtime, steps: int = 400, progress: Progress = silent) -> tuple[dict[int, float], dict[int, int]]:
    """Return the median seconds per decoded token, and the state's bytes, by length of context.

    One step after the long context and one after the short follow each other, so that whatever else the machine does
    meets both alike.
    """
    states = {context: _feed(runtime, context, progress) for context in (SHORT, LONG)}
    size = {context: sum(tensor.nbytes for tensor in runtime.host_state(state)) for context, state in states.items()}
    seconds: dict[int, list[float]] = {context: [] for context in states}
    token = torch.tensor([[5]])
    for step in range(steps):
        for context, state in list(states.items()):
            position = torch.tensor([context + step])
            start = time.perf_counter()
            _, states[context] = runtime.decode(token, position, state)
            seconds[context].append(time.perf_counter() - start)
    # The first steps bind buffers.
    return {context: statistics.median(times[20:]) for context, times in seconds.items()}, size


def _feed(runtime: Runtime, tokens: int, progress: Progress, piece: int = 512) -> State:
    """Feed random tokens in pieces."""
    ids = torch.randint(3, runtime.info.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    state = runtime.initial_state(1)
    for start in range(0, tokens, piece):
        part = ids[:, start : start + piece]
        lengths = torch.tensor([part.shape[1]], dtype=torch.int32)
        _, state = runtime.prefill(part, lengths, torch.tensor([start]), state)
        progress(f"feeding {tokens} tokens", start + part.shape[1], tokens, "tokens")
    return state
