"""Building one engine and handing it on piece by piece."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tnllm_export.build.monitor import Phases, interrupts_stop, make_monitor
from tnllm_export.build.network import add_profile, make_weights_inputs, parse_network, put_placeholders, read_graph
from tnllm_export.build.options import EngineOptions, resolve_compute_capabilities
from tnllm_export.build.timing_cache import load_timing_cache, save_timing_cache
from tnllm_export.errors import EngineBuildError
from tnllm_export.progress import Progress
from tnllm_export.targets import EngineTarget
from tnllm_export.tensorrt import last_error, logger

_PIECE_BYTES = 1 << 24


def make_builder(trt: Any) -> Any:
    """Return TensorRT's builder. Raises EngineBuildError where it needs a GPU and finds none."""
    try:
        return trt.Builder(logger(trt))
    except Exception as error:
        raise EngineBuildError(
            f"{trt.__name__} {trt.__version__} can't build here ({last_error(trt)}); it needs the NVIDIA GPU that the "
            "engine is for, with its driver; --target tensorrt-rtx builds without one"
        ) from error


def build_engine(
    trt: Any,
    target: EngineTarget,
    graph: Path,
    program: str,
    options: EngineOptions,
    progress: Progress,
    write: Callable[[bytes], None],
) -> None:
    """Build the engine of one graph.

    Args:
        trt: TensorRT's package, with our plugins registered where the graph needs them.
        target: What it can do.
        graph: Path of the graph, with the weights beside it.
        program: "prefill" or "decode".
        options: How.
        progress: Told how far it is.
        write: Takes the engine's bytes, in order.

    Raises:
        EngineBuildError: TensorRT refused.
        WriteError: The timing cache can't be written.
    """
    stage = f"building the {program} engine"
    progress(stage, 0, 1000)
    phases = Phases(stage, progress)
    with interrupts_stop(phases):
        builder = make_builder(trt)
        model = read_graph(graph)
        placeholders = options.weights == "stripped" and target.placeholders
        outside = make_weights_inputs(model) if options.weights == "external" or placeholders else frozenset()
        network = parse_network(trt, builder, model, graph)
        if placeholders:
            put_placeholders(trt, network, outside)
        config = builder.create_builder_config()
        add_profile(builder, config, network, options.profile)
        capabilities = resolve_compute_capabilities(trt, options.compute_capabilities)
        if capabilities:
            config.num_compute_capabilities = len(capabilities)
            for place, capability in enumerate(capabilities):
                config.set_compute_capability(capability, place)
        if options.weights == "stripped":
            config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        if placeholders:
            config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
        if not options.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        # Names of layers are names of modules: wanted by `tnllm inspect` and by profilers, and a matter of kilobytes.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if options.embed_plugin:
            config.plugins_to_serialize = [str(options.plugin_library)]
        cache = None if options.timing_cache is None else load_timing_cache(trt, config, options.timing_cache)
        monitor = make_monitor(trt, phases)
        config.progress_monitor = monitor
        built = phases.stopped_by is None and _serialize(trt, builder, network, config, write)
        if phases.stopped_by is not None:
            raise phases.stopped_by
    if not built:
        raise EngineBuildError(f"{graph}: {trt.__name__} {trt.__version__} built no engine ({last_error(trt)})")
    if options.timing_cache is not None:
        save_timing_cache(cache, options.timing_cache)
    progress(stage, 1000, 1000)


def _serialize(trt: Any, builder: Any, network: Any, config: Any, write: Callable[[bytes], None]) -> bool:
    """Build; return whether there is an engine. Where TensorRT can, it writes without holding the engine in memory."""
    if not hasattr(builder, "build_serialized_network_to_stream"):
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            return False
        view = memoryview(plan)
        for start in range(0, len(view), _PIECE_BYTES):
            write(bytes(view[start : start + _PIECE_BYTES]))
        return True
    failures: list[BaseException] = []

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        """Called by TensorRT with one piece after the other."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            # As with the monitor, nothing may leave a callback. Hashing goes on after this returns: keep a copy.
            try:
                if not failures:
                    write(bytes(data))
                    return len(data)
            except BaseException as error:
                failures.append(error)
            return 0

    writer = Writer()
    built = builder.build_serialized_network_to_stream(network, config, writer)
    if failures:
        raise failures[0]
    return bool(built)
