"""The kernels of a decoded token beside their bytes and torch's products alone, and the whole token they make.

Each kernel is timed in a CUDA graph that goes through more weights than the cache holds. Its floor is what it reads and
writes, once, at the bandwidth of a large copy in the same run. The peer does the same matrix products by `F.linear`,
without what stands before and after them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.gpu_timing import ceilings, describe, graph_milliseconds, milliseconds, set_count
from benchmarks.inference_models import random_model
from benchmarks.inference_plan import SIZES, Size, release, state_bytes, token_floor, weight_bytes
from benchmarks.names import DECODE_LAYER
from benchmarks.records import Record, gpu_versions
from tnllm_export.kernels.decode.linear import Heads, Scratch, linear
from tnllm_export.kernels.decode.plan import Input, Output
from tnllm_export.kernels.decode.recurrence import recurrence
from tnllm_export.kernels.decode.reference import linear_pytorch
from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.models.fused_decode import FusedDecoder
from tnllm_export.progress import Progress, silent

NAME = DECODE_LAYER
DEVICE = "cuda"
BATCHES = (1, 8, 32)
DTYPE = torch.bfloat16

ERROR_LIMIT, PYTORCH_SHARE = 1e-2, 1.2
"""Relative error that no result may exceed, and its share of the plain form's in the same dtype."""

LINEAR = "F.linear alone"

_SEED_POSITION = 1000


@dataclass(frozen=True)
class Map:
    """One linear map of a layer: weights [rows, columns], or two of them for "product"."""

    name: str
    before: Input
    after: Output
    rows: int
    columns: int
    heads: int

    @property
    def weights(self) -> int:
        """How many matrices there are."""
        return 2 if self.after == "product" else 1

    def floor_bytes(self, batch: int) -> int:
        """What is read and written once."""
        read = self.columns * (2 if self.before == "gate" else 1)
        written = self.rows * {"residual": 2, "store": 2}.get(self.after, 1)  # logits are twice as wide
        return DTYPE.itemsize * (self.weights * self.rows * self.columns + batch * (read + written))


@dataclass
class Example:
    """Operands of a map."""

    x: Tensor
    other: Tensor
    weight: Tensor
    weight_2: Tensor
    output: Tensor
    scratch: Scratch
    heads: Heads | None
    positions: Tensor

    def run(self, case: Map, function: Callable[..., None] = linear) -> None:
        """Compute the map as `function` does it."""
        scratch = (self.scratch,) if function is linear else ()
        function(
            self.x, self.weight, self.output, *scratch, before=case.before, after=case.after, other=self.other,
            weight_2=self.weight_2, heads=self.heads, positions=self.positions,
        )  # fmt: skip

    def products(self, case: Map) -> list[Tensor]:
        """The matrix products alone, by torch."""
        return [F.linear(self.x, weight) for weight in (self.weight, self.weight_2)[: case.weights]]


def maps(size: Size) -> list[Map]:
    """Return the maps of a token."""
    c = size.config
    d, H, glu = c.decoder_embed_dim, c.decoder_attention_heads, c.glu_dim
    return [
        Map("norm, qkvu, SiLU", "norm", "heads", 4 * d, d, H),
        Map("gate, norm, out, residual", "gate", "residual", d, d, H),
        Map("norm, l1, l2, product", "norm", "product", glu, d, H),
        Map("l3, residual", "plain", "residual", d, glu, H),
        Map("norm, head", "norm", "store", c.vocab_size, d, H),
    ]


def run(progress: Progress = silent, sizes: tuple[Size, ...] = SIZES, device: str = DEVICE) -> Iterator[Record]:
    """Check and measure each kernel and then each token, of every size and batch."""
    total, done = 2 * len(sizes) * len(BATCHES), 0
    for size in sizes:
        for batch in BATCHES:
            progress(f"decode layer, {size.name}, B {batch}", done, total, "cases")
            for case in maps(size):
                yield from map_records(size, case, batch, device)
                release(device)
            yield step_record(size, batch, device)
            done += 1
        model = random_model(size.config, DTYPE, device)
        for batch in BATCHES:
            progress(f"decode layer, {size.name}, token, B {batch}", done, total, "cases")
            decoder = FusedDecoder(model, batch)
            states = [torch.randn_like(state) for state in model.initial_state(batch)]
            ids = torch.randint(0, size.config.vocab_size, (batch, 1), device=device)
            positions = torch.full((batch,), _SEED_POSITION, device=device)
            with torch.inference_mode():
                found = _milliseconds([partial(decoder.decode, ids, positions, states)], device)
            floor = token_floor(weight_bytes(model), *2 * (state_bytes(size.config, batch),), device)
            yield _record(f"{size.name} token, B {batch}", found, floor)
            done += 1
        del model, decoder, states
        release(device)
    progress("decode layer", done, total, "cases")


def map_records(size: Size, case: Map, batch: int, device: str) -> Iterator[Record]:
    """Check one map, then time it beside torch's products.

    Raises:
        RuntimeError: A result is wrong, so there is nothing to time.
    """
    where = f"{size.name} {case.name}, B {batch}"
    one = example(case, batch, device)
    found, plain = _errors(case, one)
    yield Record(NAME, where, "relative error", "1", found, ERROR_LIMIT, "eager PyTorch", plain,
                 versions=gpu_versions())  # fmt: skip
    if not found <= min(ERROR_LIMIT, PYTORCH_SHARE * plain + 1e-6):
        raise RuntimeError(f"{where}: relative error {found:.1e}; plain PyTorch has {plain:.1e}")
    count = set_count(case.floor_bytes(batch)) + 1 if device == "cuda" else 1
    examples = [one, *(example(case, batch, device, seed) for seed in range(1, count))]
    ours = _milliseconds([partial(given.run, case) for given in examples], device)
    peer, value = LINEAR, None
    try:
        value = _milliseconds([partial(given.products, case) for given in examples], device)
    except Exception as error:  # the peer's failure is a result too
        peer += f" (absent: {describe(error)})"
    yield _record(where, ours, 1e3 * case.floor_bytes(batch) / ceilings(device).bandwidth, peer, value)


def step_record(size: Size, batch: int, device: str) -> Record:
    """Time the recurrent step of a layer without LRPE."""
    c = size.config
    H, D = c.decoder_attention_heads, c.head_dim
    state_size = batch * H * D * D * 4
    rates = torch.logspace(-4, -0.3, H, device=device)
    calls = []
    for _ in range(set_count(state_size) if device == "cuda" else 1):
        query, key, value, output = (torch.randn(batch, H, D, device=device, dtype=DTYPE) for _ in range(4))
        state = torch.randn(batch, H, D, D, device=device)
        calls.append(partial(recurrence, query, key, value, rates, state, output))
    floor = 1e3 * (2 * state_size + 4 * batch * H * D * DTYPE.itemsize) / ceilings(device).bandwidth
    return _record(f"{size.name} recurrent step, B {batch}", _milliseconds(calls, device), floor)


def example(case: Map, batch: int, device: str, seed: int = 0) -> Example:
    """Draw a map's operands."""
    torch.manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=DTYPE)

    weight = draw(case.rows, case.columns) / case.columns**0.5
    weight_2 = torch.randn_like(weight) / case.columns**0.5 if case.weights == 2 else weight
    output, heads = draw(batch, case.rows), None
    if case.after == "store":
        output = output.float()
    if case.after == "heads":
        d = case.rows // 4
        shape = (batch, case.heads, d // case.heads)
        output, heads = draw(*shape), Heads(case.heads, draw(*shape), draw(*shape), draw(batch, d), None)
    scratch = Scratch(batch, [(case.after, case.rows, case.columns)], DTYPE, torch.device(device))
    positions = torch.full((batch,), _SEED_POSITION, device=device)
    x, other = draw(batch, case.columns), draw(batch, case.columns)
    return Example(x, other, weight, weight_2, output, scratch, heads, positions)


def _errors(case: Map, given: Example) -> tuple[float, float]:
    """Relative error of ours and of the plain form in the same dtype, against float32, over all that is written."""

    def written(function: Callable[..., None], dtype: torch.dtype) -> Tensor:
        heads = given.heads
        if heads is not None:
            parts = [torch.empty_like(part, dtype=dtype) for part in (heads.key, heads.value, heads.gate)]
            heads = Heads(heads.count, *parts, None)
        wide = torch.float32 if case.after == "store" else dtype
        moved = Example(
            given.x.to(dtype), given.other.to(dtype), given.weight.to(dtype), given.weight_2.to(dtype),
            given.output.to(wide, copy=True), given.scratch, heads, given.positions,
        )  # fmt: skip
        moved.run(case, function)
        tensors = [moved.output, *((heads.key, heads.value, heads.gate) if heads is not None else ())]
        return torch.cat([tensor.flatten().double() for tensor in tensors])

    with use_kernels("pytorch"):
        truth, plain = written(linear_pytorch, torch.float32), written(linear_pytorch, DTYPE)
    ours = written(linear, DTYPE)
    return tuple(((x - truth).norm() / truth.norm()).item() for x in (ours, plain))  # type: ignore[return-value]


def _milliseconds(calls: list[Callable[[], object]], device: str) -> float:
    return graph_milliseconds(calls) if device == "cuda" else milliseconds(calls, device, budget_ms=0)


def _record(case: str, value: float, floor: float, peer: str | None = None, peer_value: float | None = None) -> Record:
    return Record(NAME, case, "time", "ms", value, floor, peer, peer_value, versions=gpu_versions())
