"""The public functions and types: what the command line does, from Python.

What a function needs is imported when it is called, and a type when it is asked for, not before: an export should not
wait for runtimes, nor a run for ONNX and matplotlib.
"""
# ruff: noqa: PLC0415 - importing this module must stay quick

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tnllm_export.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    EngineError,
    ExportError,
    ParityError,
    RequestError,
    RuntimeTargetError,
    TnllmError,
    TnllmWarning,
    WriteError,
)
from tnllm_export.progress import Progress, silent

if TYPE_CHECKING:
    from tnllm_export.bench import BenchReport
    from tnllm_export.build import BuildResult, EngineOptions
    from tnllm_export.bundle import Bundle, open_bundle
    from tnllm_export.generate import Generation, Generator, Prompt, SamplingParams, Session, load_state, save_state
    from tnllm_export.inspection import Inspection, inspect
    from tnllm_export.models.config import TransnormerConfig
    from tnllm_export.models.modeling import TransnormerForCausalLM
    from tnllm_export.runtime import Runtime, RuntimeInfo, load_runtime
    from tnllm_export.verify import ParityReport, Workload

__all__ = [
    "BenchReport",
    "BuildResult",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "EngineOptions",
    "ExportError",
    "Generation",
    "Generator",
    "Inspection",
    "ParityError",
    "ParityReport",
    "Progress",
    "RequestError",
    "Runtime",
    "RuntimeInfo",
    "RuntimeTargetError",
    "SamplingParams",
    "Session",
    "TnllmError",
    "TnllmWarning",
    "TransnormerConfig",
    "TransnormerForCausalLM",
    "Workload",
    "WriteError",
    "bench",
    "build",
    "build_plugin",
    "export",
    "generate",
    "generator",
    "inspect",
    "load",
    "load_runtime",
    "load_state",
    "open_bundle",
    "save_state",
    "verify",
]

Dtype = Literal["float32", "float16", "bfloat16"]

_MODULES = {
    "bench": ("BenchReport",),
    "build": ("BuildResult", "EngineOptions"),
    "bundle": ("Bundle", "open_bundle"),
    "generate": ("Generation", "Generator", "SamplingParams", "Session", "load_state", "save_state"),
    "inspection": ("Inspection", "inspect"),
    "models.config": ("TransnormerConfig",),
    "models.modeling": ("TransnormerForCausalLM",),
    "runtime": ("Runtime", "RuntimeInfo", "load_runtime"),
    "verify": ("ParityReport", "Workload"),
}
"""Where the names are that come from elsewhere."""


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            found = getattr(importlib.import_module(f"tnllm_export.{module}"), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(checkpoint: Path | str, dtype: Dtype = "float32") -> TransnormerForCausalLM:
    """Load a checkpoint folder as the eager model, in evaluation mode.

    Args:
        checkpoint: Hugging Face style folder.
        dtype: Of weights and activations; recurrent states are float32 always.

    Raises:
        CheckpointError: The checkpoint can't be used.
        ConfigError: An unknown dtype, or a broken configuration.
    """
    from tnllm_export.bundle import DTYPES
    from tnllm_export.models.checkpoint import load_model, open_checkpoint

    if dtype not in ("float32", "float16", "bfloat16"):
        raise ConfigError(f"dtype is {dtype!r}; expected float32, float16 or bfloat16")
    return load_model(open_checkpoint(Path(checkpoint)), DTYPES[dtype])


def export(
    checkpoint: Path | str,
    output: Path | str,
    *,
    dtype: Dtype | None = None,
    lowering: str | None = None,
    logits: Literal["last", "all"] = "last",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Export a checkpoint folder as a bundle: two ONNX graphs, the weights once, tokenizer and manifest.

    A checkpoint without a tokenizer exports too, with a TnllmWarning.

    Args:
        checkpoint: Hugging Face style folder.
        output: Where the bundle shall be; it appears there all at once.
        dtype: Of weights and activations. Default: the checkpoint's own where ONNX Runtime on the CPU runs it, else
            float32.
        lowering: "contrib", "standard", "matmul", "plugin" or "hybrid". Default: what ONNX Runtime on the CPU prefers.
        logits: Whether prefill gives the logits of the "last" valid token or of "all".
        overwrite: Whether a bundle at `output` may be replaced.
        progress: Told what is being done.

    Raises:
        CheckpointError: The checkpoint can't be used.
        BundleExistsError: Something is at `output`.
        ExportError: An option is unknown, or a graph could not be made.
        WriteError: Disk full, no permission.
    """
    from tnllm_export.export import export_bundle

    bundle = export_bundle(
        Path(checkpoint),
        Path(output),
        dtype=dtype,
        lowering=lowering,
        logits=logits,
        overwrite=overwrite,
        progress=progress,
    )
    if bundle.tokenizer_path is None:
        warnings.warn(
            f"{checkpoint}: no tokenizer.model or tokenizer.json; the bundle takes token ids (--prompt-ids), no text",
            TnllmWarning,
            stacklevel=2,
        )
    return bundle


def build(
    bundle: Bundle | Path | str,
    target: str = "tensorrt-rtx",
    options: EngineOptions | None = None,
    *,
    rebuild: bool = False,
    progress: Progress = silent,
) -> BuildResult:
    """Build the prefill and the decode engine of a bundle with TensorRT, into its folder `engines`.

    Engines that are there already, built from the same graphs, weights and options by the same TensorRT, are taken.

    Args:
        bundle: The bundle or its folder, exported with the lowering `matmul` or `plugin`.
        target: "tensorrt-rtx", which builds without a GPU, "tensorrt", or "aotinductor", which compiles packages for
            `options.device`.
        options: Shapes, weights, GPUs, plugin library.
        rebuild: Whether to build again even so.
        progress: Told what is being done.

    Raises:
        BundleError: No sound bundle.
        RuntimeMissingError: TensorRT is not installed.
        EngineError: An option or this bundle does not fit, or TensorRT refused.
        WriteError: Disk full, no permission.
    """
    from tnllm_export.build import EngineOptions, build_engines

    opened = _opened(bundle, progress)
    return build_engines(opened, target, options or EngineOptions(), rebuild=rebuild, progress=progress)


def build_plugin(
    capabilities: Sequence[str] = (),
    *,
    bundle: Bundle | Path | str | None = None,
    output: Path | str | None = None,
    include: Path | str | None = None,
    progress: Progress = silent,
) -> Path:
    """Compile the TensorRT plugin library with g++ and Triton; no GPU is needed. Old results come from a cache.

    Args:
        capabilities: Compute capabilities of the GPUs that it shall run on, e.g. ("8.6", "120"); default: all that
            there are.
        bundle: Compile for the head sizes and the dtype of this bundle only; default: those of the released models.
        output: Where to put the library, new or in place of an earlier one; default: it stays in the cache.
        include: Folder with TensorRT's headers; default: the variable TENSORRT_INCLUDE_DIR, else those that the package
            kernel-lens carries.
        progress: Told what is being compiled.

    Returns:
        The library's path.

    Raises:
        BundleError: No sound bundle.
        EngineError: No compiler, no headers, no Triton, or an error of a compiler.
        WriteError: The library can't be written, or something else is in its place.
    """
    from tnllm_export.build.options import parse_compute_capabilities
    from tnllm_export.bundle import Bundle, open_bundle
    from tnllm_export.bundle.outputs import check_output
    from tnllm_export.plugins.build import PluginOptions, build_plugin
    from tnllm_export.plugins.library import is_library

    if output is not None:
        check_output(Path(output), "a plugin library", is_library)
    options = PluginOptions()
    if capabilities:
        parsed = parse_compute_capabilities(tuple(capabilities))
        options = replace(options, capabilities=tuple(int(text.replace(".", "")) for text in parsed))
    if bundle is not None:
        manifest = (bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle), check=False)).manifest
        options = replace(options, head_sizes=manifest.config.head_sizes, dtypes=(manifest.dtype,))
    return build_plugin(
        options,
        output=None if output is None else Path(output),
        include=None if include is None else Path(include),
        progress=progress,
    )


def verify(
    bundle: Bundle | Path | str,
    runtime: str = "onnxruntime",
    *,
    device: str | None = None,
    checkpoint: Path | str | None = None,
    text: str | None = None,
    seed: int | None = None,
    workload: Workload | None = None,
    threads: int | None = None,
    save: bool = True,
    progress: Progress = silent,
) -> ParityReport:
    """Compare a bundle on a runtime with the eager model, and keep the report in the bundle.

    Args:
        bundle: The bundle or its folder.
        runtime: What runs the graphs.
        device: "cpu" or "cuda"; default: the runtime's first.
        checkpoint: Take the eager model's weights from this checkpoint; default: from the bundle.
        text: Real text to verify on; default: a sample, where the bundle has a tokenizer.
        seed: Of the random token ids; fresh by default, and reported.
        workload: How much is compared.
        threads: CPU threads of the runtime; default: its own choice.
        save: Whether to write reports/parity.json and reports/parity.html into the bundle.
        progress: Told what is loaded and which tokens have been fed.

    Returns:
        The report. Differences raise nothing: see `passed` and `require_pass`.

    Raises:
        BundleError: No sound bundle.
        RuntimeTargetError: The runtime can't run it.
        RequestError: `text` is too short, or the bundle has no tokenizer for it.
        ParityError: The answers can't be compared at all.
    """
    from tnllm_export.verify import verify_bundle

    return verify_bundle(
        bundle,
        runtime,
        device=device,
        checkpoint=checkpoint,
        text=text,
        seed=seed,
        workload=workload,
        threads=threads,
        save=save,
        progress=progress,
    )


def bench(
    bundle: Bundle | Path | str,
    runtimes: Sequence[str] = (),
    *,
    device: str | None = None,
    prompt_lengths: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    tokens: int | None = None,
    time_limit: float | None = None,
    threads: int | None = None,
    output: Path | str | None = None,
    progress: Progress = silent,
) -> BenchReport:
    """Time a bundle on runtimes of one device, each beside what the device could do. Each is verified first.

    Args:
        bundle: The bundle or its folder.
        runtimes: Their names; default: all that have a target on the device.
        device: "cpu" or "cuda"; default: "cuda" where PyTorch finds one.
        prompt_lengths: Prompts of one sequence, in tokens. Default of this and the next four: see `BenchOptions`.
        contexts: Tokens before the decoded ones, for one sequence.
        batches: Sequences that are decoded together, after the first of `contexts`.
        tokens: Tokens decoded in each case.
        time_limit: Seconds of timing; the runtimes share them.
        threads: CPU threads; default: each runtime's own choice.
        output: Where to write the report as one HTML page, new or in place of an earlier one; default: nowhere.
        progress: Told what is being done.

    Returns:
        The report. A runtime that could not be loaded, or differs from the eager model, is in it with its reason: see
        `require_results`.

    Raises:
        BundleError: No sound bundle.
        RuntimeTargetError: No such runtime or device.
        RequestError: An option out of its range.
        WriteError: The page can't be written, or something else is in its place.
    """
    from tnllm_export.bench import BenchOptions, bench_bundle, check_page, write_page

    chosen: dict[str, Any] = {
        "prompt_lengths": None if prompt_lengths is None else tuple(prompt_lengths),
        "contexts": None if contexts is None else tuple(contexts),
        "batches": None if batches is None else tuple(batches),
        "tokens": tokens,
        "time_limit": time_limit,
    }
    options = replace(BenchOptions(), **{name: value for name, value in chosen.items() if value is not None})
    page = None if output is None else check_page(Path(output))
    report = bench_bundle(bundle, tuple(runtimes), device=device, options=options, threads=threads, progress=progress)
    if page is not None:
        write_page(report, page)
    return report


def generator(
    bundle: Bundle | Path | str,
    runtime: Runtime | str = "onnxruntime",
    *,
    device: str | None = None,
    threads: int | None = None,
    prefill_chunk: int = 512,
    prompt_limit: int | None = None,
    progress: Progress = silent,
) -> Generator:
    """Return a generator over a bundle: its runtime and its tokenizer, ready for many prompts.

    Args:
        bundle: The bundle or its folder.
        runtime: A loaded runtime of this bundle, or the name of one to load.
        device: "cpu" or "cuda", of a runtime loaded here; default: its first.
        threads: CPU threads of a runtime loaded here.
        prefill_chunk: Prompts are read in pieces of so many tokens.
        prompt_limit: Longest prompt that is taken, in tokens; None: any.
        progress: Told how much of the bundle has been checked and of the prompts read.

    Raises:
        BundleError: No sound bundle.
        RuntimeTargetError: The runtime can't run it.
        TokenizerError: The bundle's tokenizer can't be read.
        RequestError: The runtime was loaded from other weights than the bundle's.
    """
    from tnllm_export.generate import Generator
    from tnllm_export.models.tokenizer import load_tokenizer
    from tnllm_export.runtime import load_runtime
    from tnllm_export.runtime.support import check_weights

    opened = _opened(bundle, progress)
    tokenizer = None
    if opened.tokenizer_path is not None:
        tokenizer = load_tokenizer(opened.tokenizer_path, opened.manifest.config.vocab_size)
    if isinstance(runtime, str):
        loaded = load_runtime(opened, runtime, device=device, threads=threads)
    else:
        check_weights(runtime.info, opened)
        loaded = runtime
    return Generator(loaded, tokenizer, prefill_chunk=prefill_chunk, prompt_limit=prompt_limit, progress=progress)


def generate(
    bundle: Bundle | Path | str, prompt: Prompt, *, runtime: Runtime | str = "onnxruntime", **sampling: Any
) -> Generation:
    """Continue one prompt. For batches, streaming and saved states use `generator`.

    Args:
        bundle: The bundle or its folder.
        prompt: Text, or token ids.
        runtime: A loaded runtime of this bundle, or the name of one to load.
        **sampling: Fields of `SamplingParams`, e.g. temperature=0.7, max_new_tokens=64. Default: greedy.

    Raises:
        BundleError: No sound bundle.
        RuntimeTargetError: The runtime can't run it.
        RequestError: A prompt or sampling parameter that can't be used.
    """
    from tnllm_export.generate import SamplingParams

    return generator(bundle, runtime).generate(prompt, SamplingParams(**sampling))[0]


def _opened(bundle: Bundle | Path | str, progress: Progress) -> Bundle:
    from tnllm_export.bundle import Bundle, open_bundle

    return bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle), progress=progress)
