"""A plugin on a GPU: inputs, poisoned outputs, the workspace that it asked for and nothing behind it, the error."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from benchmarks.plugin_driver import Plugin
from tnllm_export.plugins.build import PluginOptions, build_plugin

CHUNK, STEP = "LightningAttention", "LightningAttentionStep"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_SIZES = tuple(product((64, 128, 256), (64, 128)))

_POISON, _GUARD = 0x5A, 4096


def gpu_library_in(folder: Path, capability: int, head_sizes: tuple[tuple[int, int], ...] = HEAD_SIZES) -> Path:
    """Build the library once in a folder that several processes share: each would compile for minutes."""
    library = folder / "libgpu_plugin.so"
    with FileLock(f"{library}.lock"):
        if not library.exists():
            build_plugin(PluginOptions(capabilities=(capability,), head_sizes=head_sizes), output=library)
    return library


def draw(op: str, B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Return the inputs of an op; decays go from almost none to strong, lengths are ragged, and one row is empty."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    rows = (B, H) if op == STEP else (B, T, H)
    inputs = [
        (normal(*rows, K) / K**0.5).to(dtype),
        (normal(*rows, K) / K**0.5).to(dtype),
        normal(*rows, V).to(dtype),
        torch.logspace(-4, 0.5, H, device="cuda"),
        normal(B, H, K, V),
    ]
    if op == CHUNK:
        lengths = torch.randint(0, T + 1, (B,), generator=generator, device="cuda", dtype=torch.int32)
        lengths[0] = T
        lengths[1:2] = 0
        inputs.append(lengths)
    return inputs


def wide(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers in float64."""
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]


def outputs_for(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Output and state, full of NaN: what is not written shows."""
    return [torch.full_like(inputs[place], torch.nan) for place in (2, 4)]


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Distance from the reference in units of its norm; infinite where something is no number."""
    assert found.shape == reference.shape
    norm = reference.double().norm()
    assert norm > 0
    return ((found.double() - reference.double()).norm() / norm).nan_to_num(torch.inf).item()


class Guarded:
    """Workspace with a guard behind its end."""

    def __init__(self, size: int) -> None:
        self._memory = torch.full((size + _GUARD,), _POISON, dtype=torch.uint8, device="cuda")
        self.tensor = self._memory[:size] if size else None

    def check(self) -> None:
        """Raise AssertionError where somebody wrote behind the end."""
        assert bool((self._memory[-_GUARD:] == _POISON).all()), "a kernel wrote behind its workspace"


def run(plugin: Plugin, inputs: Sequence[Tensor], *, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """Go through TensorRT's calls for one launch, in the workspace asked for, and return output and state."""
    output, state = outputs_for(inputs)
    inputs = list(inputs)
    if in_place:
        inputs[4] = state.copy_(inputs[4])
    tensors = [*inputs, output, state]
    workspace = Guarded(plugin.configure(tensors))
    context = plugin.recreate().attach()
    context.run(tensors, workspace.tensor, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    workspace.check()
    return output, state
