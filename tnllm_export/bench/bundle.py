"""From a bundle to a report: ceilings, the eager model's answers, then one runtime after the other."""

import dataclasses
import datetime
import platform
import time
from importlib import metadata
from pathlib import Path

import torch

from tnllm_export.bench.ceilings import measure_ceilings
from tnllm_export.bench.gate import Truth, check_parity, compute_truth
from tnllm_export.bench.measure import Bench
from tnllm_export.bench.memory import meter_for, release
from tnllm_export.bench.options import BenchOptions
from tnllm_export.bench.records import BenchReport, Ceilings, RuntimeResult
from tnllm_export.bench.roofline import state_bytes
from tnllm_export.bundle import Bundle, open_bundle
from tnllm_export.errors import (
    EngineError,
    ParityError,
    RequestError,
    RuntimeMissingError,
    RuntimeTargetError,
    UnsupportedTargetError,
)
from tnllm_export.progress import Progress, silent
from tnllm_export.runtime import load_runtime
from tnllm_export.runtime.gpu import no_gpu
from tnllm_export.runtime.support import check_threads
from tnllm_export.targets import TARGETS

_DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13",),
    "aotinductor": ("torch",),
}


def bench_bundle(
    bundle: Bundle | Path | str,
    runtimes: tuple[str, ...] = (),
    *,
    device: str | None = None,
    options: BenchOptions | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> BenchReport:
    """Measure a bundle's speed and memory on runtimes of one device, each beside the device's roofline.

    The runtimes are loaded one after the other; each is timed only once it has answered as the eager model does.

    Args:
        bundle: The bundle or its folder.
        runtimes: Their names; default: all that have a target on the device.
        device: "cpu" or "cuda"; default: "cuda" where PyTorch finds one.
        options: The cases and how long they may take.
        threads: CPU threads of the runtimes and of the ceilings; default: their own choice.
        progress: Told what is being done.

    Returns:
        The report. A runtime that could not be loaded, or that differs from the eager model, is in it with its reason:
        see `BenchReport.require_results`.

    Raises:
        BundleError: No sound bundle.
        RuntimeMissingError: No such runtime.
        UnsupportedTargetError: There is no such device.
        RequestError: `threads` is below 1, or above what `load_runtime` takes.
    """
    started = time.monotonic()
    options = options or BenchOptions()
    where = _device(device)
    names = tuple(dict.fromkeys(runtimes)) or _runtimes_on(where.type)
    _check_names(names)
    check_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle), progress=progress)
    manifest = opened.manifest

    progress("measuring the device", 0, 1)
    ceilings = measure_ceilings(where, manifest.dtype)
    progress("measuring the device", 1, 1)
    truth = compute_truth(opened, where, progress)
    run = _Run(opened, where, threads, ceilings, truth, options, progress)
    results = []
    for name in names:
        results.append(run.measure(name, options.time_limit / len(names)))
        release(where)
    config = manifest.config
    return BenchReport(
        bundle=opened.path.resolve().name,
        model={
            "layers": config.decoder_layers,
            "width": config.decoder_embed_dim,
            "heads": config.decoder_attention_heads,
            "vocabulary": config.vocab_size,
            "parameters": manifest.source.parameters,
        },
        dtype=manifest.dtype,
        device=where.type,
        device_name=_device_name(where),
        threads=threads,
        ceilings=ceilings,
        weight_bytes=manifest.files[manifest.weights].bytes,
        state_bytes=state_bytes(config),
        reference=truth.reference,
        results=tuple(results),
        options=dataclasses.asdict(options),
        versions=_versions(where),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=time.monotonic() - started,
    )


@dataclasses.dataclass(frozen=True)
class _Run:
    """What all runtimes of a run share."""

    bundle: Bundle
    device: torch.device
    threads: int | None
    ceilings: Ceilings
    truth: Truth
    options: BenchOptions
    progress: Progress

    def _lowering(self, name: str) -> str | None:
        """Of the graphs that a runtime runs; None for one that runs none."""
        targets = (target for target in TARGETS if (target.runtime, target.device) == (name, self.device.type))
        return self.bundle.manifest.lowering if any(target.lowerings for target in targets) else None

    def measure(self, name: str, seconds: float) -> RuntimeResult:
        """Load a runtime, check it and time it; what goes wrong is in the result."""
        result = RuntimeResult(name, _version(name), self._lowering(name))
        meter = meter_for(name, self.device)
        meter.reset()
        try:
            self.progress(f"loading {name}", 0, 1)
            runtime = load_runtime(self.bundle, name, device=self.device.type, threads=self.threads)
            self.progress(f"loading {name}", 1, 1)
            result = dataclasses.replace(result, memory_by=meter.how, loaded=meter.peak())
            parity = check_parity(self.bundle, runtime, result.lowering, self.truth, self.progress)
        except (RuntimeTargetError, EngineError, RequestError, ParityError) as error:
            self.progress(f"loading {name}", 1, 1)
            return dataclasses.replace(result, error=str(error))
        except torch.OutOfMemoryError as error:
            return dataclasses.replace(result, error=f"out of memory: {' '.join(str(error).split())[:160]}")
        if not parity.passed:
            return dataclasses.replace(result, parity=parity, error=parity.reason)
        bench = Bench(runtime, self.device, self.ceilings, self.options, meter, self.progress)
        return dataclasses.replace(result, parity=parity, rows=bench.run(seconds))


def _device(name: str | None) -> torch.device:
    reason = no_gpu()
    if name is None:
        name = "cuda" if reason is None else "cpu"
    if name not in ("cpu", "cuda"):
        raise UnsupportedTargetError(f"device is {name!r}; expected cpu or cuda")
    if name == "cuda" and reason is not None:
        raise UnsupportedTargetError(f"{reason}; run where there is one, or --device cpu")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def _runtimes_on(device: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(target.runtime for target in TARGETS if target.device == device))


def _check_names(names: tuple[str, ...]) -> None:
    known = tuple(dict.fromkeys(target.runtime for target in TARGETS))
    for name in names:
        if name not in known:
            raise RuntimeMissingError(f"unknown runtime {name!r}; expected one of: {', '.join(known)}")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return platform.processor() or platform.machine()


def _version(runtime: str) -> str:
    for name in _DISTRIBUTIONS.get(runtime, (runtime,)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _versions(device: torch.device) -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "tnllm-export": _version("tnllm-export"),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        versions["cuda"] = torch.version.cuda or ""
    return versions
