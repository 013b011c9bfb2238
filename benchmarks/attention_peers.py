"""The forms of attention that are compared: ours, the blocked PyTorch form, and other projects' kernels.

Each gets the same numbers in the layout that it likes best; changing the layout is not timed.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_cases import Inputs, Results, without_padding
from benchmarks.gpu_timing import describe
from benchmarks.names import BLOCKED, FLA_CHUNK, FLA_FUSED, LIGHTNING, OURS, SDPA
from tnllm_export.kernels.dispatch import Choice, use_kernels
from tnllm_export.kernels.lightning_attention import lightning_attention

Layout = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Prepared:
    """One form's own arguments: leaves in its layout, and how to run it on them."""

    leaves: tuple[Tensor, Tensor, Tensor]
    grad_output: Tensor
    run: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
    restore: Layout

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Run it as for inference."""
        with torch.no_grad():
            return self.run(*self.leaves)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """Run it and return the output and the gradients of query, key and value; nobody keeps a state."""
        output = self.run(*self.leaves)[0]
        return output, *torch.autograd.grad(output, self.leaves, self.grad_output)

    def results(self) -> Results:
        """Run it and return everything in the layout [B, T, H, D]."""
        output, state = self.run(*self.leaves)
        grads = torch.autograd.grad(output, self.leaves, self.grad_output)
        restored = (self.restore(x.detach()) for x in (output, *grads))
        output, *gradients = restored
        return Results(output, None if state is None else state.detach(), *gradients)

    @property
    def bytes(self) -> int:
        """Of queries, keys, values and the output's gradient."""
        return sum(x.nbytes for x in (*self.leaves, self.grad_output))


@dataclass(frozen=True)
class Form:
    """One way to compute attention.

    Attributes:
        name: In tables.
        prepare: Brings inputs into its layout.
        kernels: What `use_kernels` is told meanwhile.
        linear: Whether it computes lightning attention, so that its results can be compared.
        longest: Tokens beyond which it is not run; it would take too long.
    """

    name: str
    prepare: Callable[[Inputs], Prepared]
    kernels: Choice | None = None
    linear: bool = True
    longest: int | None = None

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Let the ops use this form's kernels; other projects' need nothing."""
        with use_kernels(self.kernels) if self.kernels else nullcontext():
            yield


def available_forms() -> tuple[list[Form], dict[str, str]]:
    """Return the forms that can be imported, and why the others cannot."""
    forms, absent = [], {}
    for name, make in _FORMS.items():
        try:
            forms.append(make())
        except Exception as error:
            absent[name] = describe(error)
    return forms, absent


def _same(x: Tensor) -> Tensor:
    return x


def _swap(x: Tensor) -> Tensor:
    """[B, T, H, D] to [B, H, T, D] and back, contiguous."""
    return x.transpose(1, 2).contiguous()


def _prepared(inputs: Inputs, run: Callable, layout: Layout = _same, restore: Layout = _same) -> Prepared:
    query, key, value = (layout(x).detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value))
    return Prepared((query, key, value), layout(inputs.grad_output), run, restore)


def _ours(inputs: Inputs) -> Prepared:
    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return lightning_attention(query, key, value, inputs.slope_rate, inputs.past_state, inputs.lengths)

    grad_output = without_padding(inputs.grad_output, inputs.shape)
    return _prepared(replace(inputs, grad_output=grad_output), run)


def _fla(name: str) -> Form:
    # Its choices must not be kept on disk: it would find those of a short T again where a long one is tuned for.
    os.environ["FLA_CACHE_RESULTS"] = "0"
    kernel = getattr(importlib.import_module("fla.ops.simple_gla"), name)

    def prepare(inputs: Inputs) -> Prepared:
        shape, log_decay = inputs.shape, -inputs.slope_rate
        if shape.lengths is None:
            layout, restore, boundaries = _same, _same, {}
        else:
            # A ragged batch is one row without padding here.
            def layout(x: Tensor) -> Tensor:
                return torch.cat([row[:n] for row, n in zip(x, shape.row_lengths, strict=True)])[None].contiguous()

            def restore(x: Tensor) -> Tensor:
                rows = torch.split(x[0], shape.row_lengths)
                return torch.stack([_padded(row, shape.tokens) for row in rows])

            ends = torch.tensor((0, *shape.row_lengths)).cumsum(0)
            boundaries = {"cu_seqlens": ends.to(inputs.query.device)}
            if name == "chunk_simple_gla":
                boundaries["cu_seqlens_cpu"] = ends

        def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            return kernel(query, key, value, g_gamma=log_decay, scale=1.0, output_final_state=True, **boundaries)

        return _prepared(inputs, run, layout, restore)

    return Form(FLA_CHUNK if name == "chunk_simple_gla" else FLA_FUSED, prepare)


def _padded(row: Tensor, tokens: int) -> Tensor:
    return torch.cat([row, row.new_zeros(tokens - row.shape[0], *row.shape[1:])])


def _lightning_attn() -> Form:
    kernel = importlib.import_module("lightning_attn.ops").lightning_attn_func

    def prepare(inputs: Inputs) -> Prepared:
        def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
            return kernel(query, key, value, inputs.slope_rate), None

        # It knows no lengths: padding is computed too, and what comes out there does not count.
        def restore(x: Tensor) -> Tensor:
            return without_padding(_swap(x), inputs.shape)

        grad_output = without_padding(inputs.grad_output, inputs.shape)
        return _prepared(replace(inputs, grad_output=grad_output), run, _swap, restore)

    return Form(LIGHTNING, prepare)


def _sdpa() -> Form:
    def prepare(inputs: Inputs) -> Prepared:
        def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True), None

        if inputs.shape.key_dim != inputs.shape.value_dim:
            raise ValueError("flash attention needs K = V")
        return _prepared(inputs, run, _swap, _swap)

    return Form(SDPA, prepare, linear=False)


_FORMS: dict[str, Callable[[], Form]] = {
    OURS: lambda: Form(OURS, _ours, kernels="triton"),
    FLA_CHUNK: lambda: _fla("chunk_simple_gla"),
    FLA_FUSED: lambda: _fla("fused_chunk_simple_gla"),
    LIGHTNING: _lightning_attn,
    SDPA: _sdpa,
    BLOCKED: lambda: Form(BLOCKED, _ours, kernels="pytorch"),
}
"""In the order in which they run and stand in tables."""
