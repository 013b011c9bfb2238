"""From a bundle to its two engines or packages: taken from the bundle where they are there, else built into it."""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from tnllm_export.build.aotinductor import TARGET as AOTINDUCTOR
from tnllm_export.build.aotinductor import build_packages
from tnllm_export.build.engine import build_engine, make_builder
from tnllm_export.build.options import EngineOptions, parse_compute_capabilities, resolve_compute_capabilities
from tnllm_export.bundle import Bundle
from tnllm_export.bundle.engines import (
    EngineSet,
    EngineSpec,
    PluginRecord,
    find_engines,
    graph_checksums,
    writing_engines,
)
from tnllm_export.errors import EngineBuildError, EngineMismatchError
from tnllm_export.plugins.library import kernels_of
from tnllm_export.progress import Progress, silent
from tnllm_export.targets import TARGETS, Target
from tnllm_export.tensorrt import engine_target, import_tensorrt, library_checksum, load_plugins

RECIPE = 1
"""Raised when the same options shall lead to other engines."""


@dataclass(frozen=True)
class BuildResult:
    """Engines, and whether they were there already."""

    engines: EngineSet
    cached: bool


def build_engines(
    bundle: Bundle, target: str, options: EngineOptions, *, rebuild: bool = False, progress: Progress = silent
) -> BuildResult:
    """Build the prefill and the decode engine of a bundle, or its packages.

    Args:
        bundle: The bundle; its engines are put into its folder `engines`.
        target: "tensorrt-rtx", "tensorrt" or "aotinductor".
        options: How.
        rebuild: Whether to build even if the bundle has these engines.
        progress: Told how far it is.

    Raises:
        RuntimeMissingError: TensorRT is not installed.
        EngineBuildError: An option or this bundle does not fit, or TensorRT refused.
        WriteError: Disk full, no permission.
    """
    if target == AOTINDUCTOR:
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return BuildResult(*build_packages(bundle, device, rebuild=rebuild, progress=progress))
    if options.device is not None:
        raise EngineBuildError(f"{target} builds for no device by name; leave out --device, or name GPUs with --sm")
    started = time.monotonic()
    kind = engine_target(target)
    if options.timing_cache is not None and not kind.needs_gpu:
        raise EngineBuildError(f"{target} measures nothing while it builds; leave out --timing-cache")
    capabilities = parse_compute_capabilities(options.compute_capabilities)
    options = replace(options, compute_capabilities=capabilities)
    _check_bundle(bundle, next(found for found in TARGETS if found.name == target), options)
    trt = import_tensorrt(kind)
    resolve_compute_capabilities(trt, capabilities)
    if kind.needs_gpu:
        make_builder(trt)  # for its message: what follows asks torch about the GPU
    spec = _spec(bundle, target, options, trt.__version__, _device() if kind.needs_gpu else "")
    found = None if rebuild else find_engines(bundle.path, spec)
    if found is not None:
        try:
            found.check(progress)
            return BuildResult(found, cached=True)
        except EngineMismatchError:
            pass  # it is replaced
    if options.plugin_library is not None:
        load_plugins(trt, options.plugin_library)
    with writing_engines(bundle.path, spec) as writer:
        for program, graph in (("prefill", bundle.prefill_path), ("decode", bundle.decode_path)):
            writer.write(program, partial(build_engine, trt, kind, graph, program, options, progress))
        if options.plugin_library is not None and not options.embed_plugin:
            writer.copy_plugin_library(options.plugin_library)
        return BuildResult(writer.commit(time.monotonic() - started), cached=False)


def _check_bundle(bundle: Bundle, target: Target, options: EngineOptions) -> None:
    manifest = bundle.manifest
    if manifest.lowering not in target.lowerings:
        raise EngineBuildError(
            f"{bundle.path}: lowering is {manifest.lowering}; {target.name} builds {' or '.join(target.lowerings)}: "
            f"export again with --lowering {target.lowerings[0]}"
        )
    if manifest.dtype not in target.dtypes:
        raise EngineBuildError(
            f"{bundle.path}: dtype is {manifest.dtype}; {target.name} builds {', '.join(target.dtypes)}: "
            f"export again with --dtype {target.dtypes[0]}"
        )
    if manifest.lowering == "plugin" and options.plugin_library is None:
        raise EngineBuildError(
            f"{bundle.path}: lowering is plugin, and no plugin library is named; make one with `tnllm build-plugin` "
            "and name it with --plugin-library, or export again with --lowering matmul"
        )
    if manifest.lowering != "plugin" and options.plugin_library is not None:
        raise EngineBuildError(
            f"{bundle.path}: lowering is {manifest.lowering}, which needs no plugin library; leave out "
            "--plugin-library, or export again with --lowering plugin"
        )
    if options.plugin_library is not None:
        library_checksum(options.plugin_library)
        _check_library(bundle, options.plugin_library, options.compute_capabilities)


def _check_library(bundle: Bundle, library: Path, capabilities: tuple[str, ...]) -> None:
    """Raise EngineBuildError where a library has no kernels for a bundle's heads on a GPU that is named, or on any."""
    kernels = kernels_of(library)
    if kernels is None:  # made before libraries said what they hold, or no library: TensorRT tells
        return
    heads, dtype = bundle.manifest.config.head_sizes, bundle.manifest.dtype
    able = {found for found, *_ in kernels if all((found, dtype, K, V) in kernels for K, V in heads)}
    wanted = [int(capability.replace(".", "")) for capability in capabilities]
    lacking = [capability for capability in wanted if not any(map(partial(_runs, capability), able))]
    if able and not lacking:
        return
    sizes = " and ".join(f"{K}x{V}" for K, V in heads)
    where = "any GPU" if not able else f"compute capability {', '.join(f'{n // 10}.{n % 10}' for n in lacking)}"
    raise EngineBuildError(
        f"{library}: has no kernels for {where} with {dtype} heads of {sizes}; make the library again with "
        f"`tnllm build-plugin --bundle {bundle.path}`"
    )


def _runs(capability: int, compiled: int) -> bool:
    """Whether a GPU may run code for an older one, as in `plan.cpp`: below 9.0 within a generation."""
    return compiled == capability or (capability < 90 and compiled < capability and compiled // 10 == capability // 10)


def _spec(bundle: Bundle, target: str, options: EngineOptions, version: str, device: str) -> EngineSpec:
    manifest = bundle.manifest
    library = options.plugin_library
    # Weights that the build never saw shape nothing but what the graphs say of them.
    unseen = options.weights == "external" or (options.weights == "stripped" and engine_target(target).placeholders)
    return EngineSpec(
        recipe=RECIPE,
        target=target,
        version=version,
        device=device,
        compute_capabilities=options.compute_capabilities,
        graphs=graph_checksums(manifest),
        weights_sha256="" if unseen else manifest.files[manifest.weights].sha256,
        dtype=manifest.dtype,
        lowering=manifest.lowering,
        weights=options.weights,
        profile=options.profile,
        tf32=options.tf32,
        plugin=None
        if library is None
        else PluginRecord(sha256=library_checksum(library), embedded=options.embed_plugin),
    )


def _device() -> str:
    """Name the GPU that engines are built on, with its compute capability."""
    if not torch.cuda.is_available():
        raise EngineBuildError("PyTorch finds no CUDA device, so the engines' GPU can't be told; install a CUDA build")
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} ({major}.{minor})"
