"""From a bundle's engines to TensorRT's: which pair, whether it fits this GPU and this TensorRT, its weights."""

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnllm_export.bundle import Bundle
from tnllm_export.bundle.engines import EngineSet, EngineSpec, engines_of, is_current
from tnllm_export.errors import EngineBuildError, EngineMismatchError, EngineMissingError
from tnllm_export.targets import EngineTarget
from tnllm_export.tensorrt import last_error, load_plugins, logger


@dataclass(frozen=True)
class Gpu:
    """The device that engines shall run on: its name, and its compute capability as "8.6"."""

    name: str
    capability: str


def choose_engines(bundle: Bundle, target: str, key: str | None = None) -> EngineSet:
    """Return the engines of a bundle for a target: those named `key`, else those that were built last.

    Raises:
        EngineMissingError: There are none, or none for the graphs and weights that the bundle has.
    """
    build = f"build some with `tnllm build {bundle.path} --target {target}`"
    found = [engines for engines in engines_of(bundle.path) if engines.spec.target == target]
    if key is not None:
        found = [engines for engines in found if engines.spec.key == key]
    if not found:
        raise EngineMissingError(f"{bundle.path}: no {target} engines{f' {key}' if key else ''}; {build}")
    current = [engines for engines in found if is_current(engines, bundle.manifest)]
    if not current:
        raise EngineMissingError(
            f"{bundle.path}: its {target} engines were built from other graphs or weights than it has now; {build}"
        )
    return max(current, key=lambda engines: (engines.path.stat().st_mtime_ns, engines.spec.key))


def check_fits(engines: EngineSet, target: EngineTarget, version: str, gpu: Gpu) -> None:
    """Check version and GPU before TensorRT does, whose messages name neither what was found nor the way out.

    Raises:
        EngineMismatchError: The engines are of another version of TensorRT, or do not run on this GPU.
    """
    spec = engines.spec
    if spec.version != version:
        raise EngineMismatchError(
            f"{engines.path}: built with {target.module} {spec.version}; {version} is installed: build again with "
            f"`tnllm build`, or install {target.module} {spec.version}"
        )
    if not _runs_on(spec, target, gpu):
        expected = spec.device or ", ".join(spec.compute_capabilities) or target.compute_capabilities
        if target.needs_gpu:
            way_out = "build again on this GPU"
        elif target.runs_on(gpu.capability):
            way_out = f"build again with --sm {gpu.capability}"
        else:
            way_out = "build and run with --target tensorrt here, or use another GPU"
        raise EngineMismatchError(
            f"{engines.path}: runs on compute capability {expected}; this GPU, {gpu.name}, has {gpu.capability}: "
            f"{way_out}"
        )


def _runs_on(spec: EngineSpec, target: EngineTarget, gpu: Gpu) -> bool:
    if spec.device:
        return spec.device == f"{gpu.name} ({gpu.capability})"
    if spec.compute_capabilities:
        return gpu.capability in spec.compute_capabilities
    return target.runs_on(gpu.capability)


def deserialize(trt: Any, engines: EngineSet, program: str, graph: Path) -> Any:
    """Return TensorRT's engine of a program, with its weights.

    Args:
        trt: TensorRT's package.
        engines: The pair that it is of.
        program: "prefill" or "decode".
        graph: The graph that it was built from, with the weights beside it: for stripped engines.

    Raises:
        EngineMismatchError: TensorRT refuses it, or its plugin library.
    """
    if engines.plugin_library is not None:
        try:
            load_plugins(trt, engines.plugin_library)
        except EngineBuildError as error:
            raise EngineMismatchError(str(error)) from error
    path = engines.file(program)
    runtime = trt.Runtime(logger(trt))
    # An embedded plugin library is code for the host.
    runtime.engine_host_code_allowed = engines.spec.plugin is not None and engines.spec.plugin.embedded
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise EngineMismatchError(
            f"{path}: {trt.__name__} {trt.__version__} refuses it ({last_error(trt)}); build again with `tnllm build`"
        )
    if engines.spec.weights == "stripped":
        _refit(trt, engine, path, graph)
    return engine


def _refit(trt: Any, engine: Any, path: Path, graph: Path) -> None:
    """Put the weights of the bundle into an engine that was stripped of them."""
    refitter = trt.Refitter(engine, logger(trt))
    parser = trt.OnnxParserRefitter(refitter, logger(trt))
    if not parser.refit_from_file(str(graph.resolve())) or not refitter.refit_cuda_engine():
        raise EngineMismatchError(
            f"{path}: its weights can't be put back ({last_error(trt)}); build again with --weights external"
        )
