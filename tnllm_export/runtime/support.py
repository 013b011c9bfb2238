"""Whether a runtime can run a bundle, decided from the table of targets and the user's settings alone."""

import os

import torch

from tnllm_export.bundle import Bundle
from tnllm_export.errors import RequestError, UnsupportedTargetError
from tnllm_export.kernels.dispatch import ENVIRONMENT_VARIABLE, form_for
from tnllm_export.runtime.protocol import RuntimeInfo
from tnllm_export.targets import TARGETS, Target


def check_supported(bundle: Bundle, runtime: str, device: str) -> Target:
    """Return the target of this runtime and device, or raise UnsupportedTargetError where it can't run the bundle."""
    targets = [target for target in TARGETS if target.runtime == runtime]
    target = next((target for target in targets if target.device == device), None)
    if target is None:
        devices = ", ".join(target.device for target in targets)
        raise UnsupportedTargetError(f"{runtime} does not run on device {device!r}; expected one of: {devices}")
    manifest = bundle.manifest
    if manifest.dtype not in target.dtypes:
        raise UnsupportedTargetError(
            f"{bundle.path}: dtype is {manifest.dtype}; {runtime} on {device} runs {', '.join(target.dtypes)}: "
            f"export again with --dtype {target.dtypes[0]}{_others(runtime, manifest.dtype, None)}"
        )
    if target.lowerings and manifest.lowering not in target.lowerings:
        raise UnsupportedTargetError(
            f"{bundle.path}: lowering is {manifest.lowering}; {runtime} on {device} runs "
            f"{', '.join(target.lowerings)}: export again with --lowering {target.lowerings[0]}"
            f"{_others(runtime, manifest.dtype, manifest.lowering)}"
        )
    opset = manifest.opset_imports.get("", 0)
    if target.max_opset is not None and target.lowerings and opset > target.max_opset:
        raise UnsupportedTargetError(
            f"{bundle.path}: opset is {opset}; {runtime} on {device} runs up to {target.max_opset}: "
            f"export again with --lowering {target.lowerings[0]}{_others(runtime, manifest.dtype, manifest.lowering)}"
        )
    return target


def _others(runtime: str, dtype: str, lowering: str | None) -> str:
    """Name the other runtimes that would do, as the rest of a sentence."""
    names = sorted(
        {
            target.runtime
            for target in TARGETS
            # Where something has to be built first, loading it is not the way out.
            if target.engine is None
            and not target.compiled
            and target.runtime != runtime
            and dtype in target.dtypes
            and (lowering is None or not target.lowerings or lowering in target.lowerings)
        }
    )
    return f", or load it with the runtime {' or '.join(names)}" if names else ""


def check_kernels(device: torch.device) -> None:
    """Raise UnsupportedTargetError where the kernels that the user asked for are unknown or can't run on `device`."""
    try:
        form_for(device)
    except ValueError as error:
        raise UnsupportedTargetError(f"{error}: correct it or unset it") from error
    except RuntimeError as error:
        raise UnsupportedTargetError(
            f"Triton's kernels were asked for, but can't run on {device.type} here; expected a CUDA device and the "
            f"package triton: run there, or with {ENVIRONMENT_VARIABLE}=auto"
        ) from error


def most_threads() -> int:
    """Return how many CPU threads may be asked for; runtimes take ever longer to start more, which gain nothing."""
    return max(64, 4 * (os.cpu_count() or 1))


def check_threads(threads: int | None) -> None:
    """Raise RequestError unless a runtime may use so many threads; None is its own choice."""
    if threads is not None and not 1 <= threads <= most_threads():
        raise RequestError(
            f"threads is {threads}; expected 1 … {most_threads()} on this machine, or none for the runtime's own choice"
        )


def weights_id(bundle: Bundle) -> str:
    """Return what tells this bundle's weights from all others: the checksum of `weights.safetensors`."""
    return bundle.manifest.files[bundle.manifest.weights].sha256


def check_weights(info: RuntimeInfo, bundle: Bundle) -> None:
    """Raise RequestError where a runtime is known to hold other weights than this bundle's."""
    if info.weights_id not in ("", weights_id(bundle)):
        raise RequestError(
            f"the runtime {info.name} was loaded from other weights than those of {bundle.path}; load it from there"
        )
