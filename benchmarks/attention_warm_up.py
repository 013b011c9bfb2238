"""Get compiling and tuning out of the way before anything is timed.

Peers try up to 48 settings of each of their kernels. Compiling these one by one takes many minutes, so several
processes first fill Triton's cache, each with its share of the settings; then this process tunes, alone on the GPU,
at a short and at a long shape.
"""

import gc
import os
import subprocess
import sys
import time
from itertools import product
from typing import Any

import torch

from benchmarks.attention_cases import ERROR_LIMITS, PARITY_SHAPES, SHAPES, Shape, make_inputs, run_op
from benchmarks.attention_peers import Form, available_forms
from benchmarks.gpu_timing import describe
from benchmarks.names import FLA_CHUNK, FLA_FUSED, LIGHTNING, OURS
from benchmarks.records import ROOT
from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.progress import Progress, silent

LIMIT_S = 150.0
_TUNED = (FLA_CHUNK, FLA_FUSED)


def compile_ahead(progress: Progress = silent, processes: int | None = None) -> None:
    """Compile what the peers try, in several processes; what fails is left to fail again in this one."""
    processes = processes or min(14, max(1, (os.cpu_count() or 2) - 2))
    command = [sys.executable, "-m", "benchmarks.attention_warm_up"]
    children = [
        subprocess.Popen([*command, str(index), str(processes)], cwd=ROOT, stdout=sys.stderr)
        for index in range(processes)
    ]
    deadline = time.monotonic() + LIMIT_S
    for done, child in enumerate(children):
        progress("compiling the peers' kernels", done, processes, "processes")
        try:
            child.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    progress("compiling the peers' kernels", processes, processes, "processes")


def tune_again(forms: list[Form], shapes: tuple[Shape, ...]) -> None:
    """Let the peers that tune themselves forget what they chose, and choose at these shapes."""
    for tuner in _tuners():
        tuner.cache.clear()
        tuner.__dict__.pop("do_bench", None)
        tuner._do_bench = _short_bench
    for form in forms:
        if form.name in _TUNED:
            for shape in shapes:
                _try(form, shape)


def _tuners() -> list[Any]:
    from triton.runtime.autotuner import Autotuner  # noqa: PLC0415, absent without Triton

    return [found for found in gc.get_objects() if isinstance(found, Autotuner)]


def _short_bench(call: Any, quantiles: tuple[float, ...]) -> Any:
    import triton.testing  # noqa: PLC0415

    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


def _try(form: Form, shape: Shape) -> str | None:
    try:
        with form.chosen():
            prepared = form.prepare(make_inputs(shape, torch.bfloat16))
            prepared.forward()
            prepared.forward_backward()
            torch.cuda.synchronize()
    except Exception as error:
        return describe(error)
    return None


def _compile_share(index: int, processes: int) -> None:
    """Run every peer once with this process's share of the settings, and the shapes of this process."""
    from triton.runtime.autotuner import Autotuner  # noqa: PLC0415

    everything = Autotuner.prune_configs

    def share(self: Any, *arguments: Any) -> list[Any]:
        settings = everything(self, *arguments)
        return settings[index::processes] or settings[:1]

    Autotuner.prune_configs = share
    # What it measures here means nothing: one call compiles.
    Autotuner.do_bench = property(lambda _: lambda call, quantiles: [call(), (1.0, 1.0, 1.0)][1])
    forms = {form.name: form for form in available_forms()[0]}
    tuned = [forms[name] for name in _TUNED if name in forms]
    for shape in (
        Shape(1, 32, 512), Shape(1, 16, 512), Shape(1, 32, 512, key_dim=256), Shape(2, 32, 256, lengths=(256, 99)),
    ):  # fmt: skip
        for form in tuned:
            _report(index, form.name, shape, _try(form, shape))
    # lightning-attn compiles anew for every shape; ours has a few variants by size and dtype.
    for shape in SHAPES[index::processes]:
        for name in (LIGHTNING, OURS):
            if name in forms:
                _report(index, name, shape, _try(forms[name], shape))
    for shape, dtype in list(product(PARITY_SHAPES, ERROR_LIMITS))[index::processes]:
        _report(index, f"{OURS}, {dtype}", shape, _try_op(shape, dtype))


def _try_op(shape: Shape, dtype: torch.dtype) -> str | None:
    try:
        with use_kernels("triton"):
            run_op(make_inputs(shape, dtype, continued=True))
    except Exception as error:
        return describe(error)
    return None


def _report(index: int, form: str, shape: Shape, reason: str | None) -> None:
    if reason:
        print(f"warm-up {index}: {form} at {shape}: {reason}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    _compile_share(int(sys.argv[1]), int(sys.argv[2]))
