"""From a bundle to its two AOTInductor packages: taken from the bundle where they are there already, else compiled.

A package holds code only. Both take their weights from the bundle's `weights.safetensors` when they are loaded; the
decay rates, which are in no checkpoint, lie beside them in `constants.safetensors`.
"""
# ruff: noqa: PLC0415 - Inductor is imported when there is something to compile

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch.export import ExportedProgram

from tnllm_export.build.aotinductor_linking import linking_the_loaded_library
from tnllm_export.build.aotinductor_programs import ProgramTracer
from tnllm_export.bundle import DTYPES, Bundle
from tnllm_export.bundle.engines import (
    CONSTANTS,
    EngineSet,
    EngineSpec,
    find_engines,
    graph_checksums,
    host_device,
    writing_engines,
)
from tnllm_export.bundle.native_code import libraries_with_own_standard_library
from tnllm_export.errors import EngineBuildError, EngineMismatchError
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.models.decay import slope_rates
from tnllm_export.progress import Progress, silent

TARGET = "aotinductor"
RECIPE = 2
"""Raised when the same bundle shall lead to other packages."""


def build_packages(
    bundle: Bundle, device: str, *, rebuild: bool = False, progress: Progress = silent
) -> tuple[EngineSet, bool]:
    """Compile the prefill and the decode package of a bundle for this machine's CPU or its current CUDA device.

    Returns:
        The packages, and whether they were there already.

    Raises:
        EngineBuildError: No such device or C++ compiler here, or the compiler refused.
        WriteError: Disk full, no permission.
    """
    started = time.monotonic()
    spec = _spec(bundle, device)
    found = None if rebuild else find_engines(bundle.path, spec)
    if found is not None:
        with contextlib.suppress(EngineMismatchError):  # it is replaced
            found.check(progress)
            return found, True
    _check_compiler()
    manifest = bundle.manifest
    with writing_engines(bundle.path, spec) as writer, tempfile.TemporaryDirectory(prefix="tnllm-") as folder:
        progress("compiling", 0, 2, "packages")
        tracer = ProgramTracer(manifest.config, DTYPES[manifest.dtype], torch.device(device))
        for done, program in enumerate(("prefill", "decode")):
            progress("compiling", done, 2, "packages")
            traced = tracer.prefill(manifest.logits) if program == "prefill" else tracer.decode()
            writer.add_file(f"{program}.pt2", _compile(traced, program, Path(folder)))
        progress("compiling", 2, 2, "packages")
        constants = Path(folder) / CONSTANTS
        constants.write_bytes(save(_decay_rates(manifest.config)))
        writer.add_file(CONSTANTS, constants)
        return writer.commit(time.monotonic() - started), False


def _compile(program: ExportedProgram, name: str, folder: Path) -> Path:
    """Compile a program into a package without its weights."""
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InductorError

    # Headers compiled beforehand cost some 14 s at first; kernels then compile half a second sooner.
    options: dict[str, Any] = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.precompile_headers": False,
    }
    try:
        with _quiet(), linking_the_loaded_library() as linking:
            path = aoti_compile_and_package(
                program, package_path=str(folder / f"{name}.pt2"), inductor_configs=options | linking
            )
    except (InductorError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise EngineBuildError(
            f"torch {torch.__version__} could not compile {name} ({lines[0]}); build with another version, or use the "
            "runtime torch"
        ) from error
    _check_linking(Path(path))
    return Path(path)


def _check_linking(package: Path) -> None:
    """Check that a package can be loaded: a process that loads code with a libstdc++ of its own crashes."""
    if libraries_with_own_standard_library(package):
        raise EngineBuildError(
            f"{_compiler()} linked {package.name} with a C++ standard library of its own, not with a shared libstdc++, "
            "and whoever loads it crashes; install the compiler's shared libstdc++, take -static-libstdc++ out of its "
            "options, or name another compiler by CXX"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Inductor's own deprecations, which no user of ours can act on, from the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _spec(bundle: Bundle, device: str) -> EngineSpec:
    manifest = bundle.manifest
    return EngineSpec(
        recipe=RECIPE,
        target=TARGET,
        version=torch.__version__,
        device=_device(device),
        compute_capabilities=(),
        graphs=graph_checksums(manifest),
        weights_sha256="",
        dtype=manifest.dtype,
        lowering=manifest.lowering,
        weights="external",
        profile=None,
        tf32=False,
        plugin=None,
    )


def _device(device: str) -> str:
    """Name what packages are compiled for: the CPU with its vector instructions, or the GPU with its architecture."""
    if device == "cpu":
        return host_device()
    if device != "cuda":
        raise EngineBuildError(f"device is {device!r}; {TARGET} builds for cpu or cuda")
    if not torch.cuda.is_available():
        raise EngineBuildError(
            "PyTorch finds no CUDA device to compile for; build on the machine with the GPU, or with --device cpu"
        )
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} ({major}.{minor})"


def _check_compiler() -> None:
    compiler = _compiler()
    if shutil.which(compiler) is None:
        raise EngineBuildError(
            f"found no C++ compiler {compiler!r}, which a build needs; install g++, or name another by CXX"
        )


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _decay_rates(config: TransnormerConfig) -> dict[str, torch.Tensor]:
    layers, heads = config.decoder_layers, config.decoder_attention_heads
    return {
        f"model.layers.{layer}.token_mixer.slope_rate": slope_rates(config.decay_type, layer, layers, heads)
        for layer in range(layers)
    }
