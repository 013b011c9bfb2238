"""The GPU on which a runtime runs, as PyTorch finds it."""

from contextlib import AbstractContextManager, nullcontext

import torch

from tnllm_export.errors import UnsupportedTargetError


def no_gpu() -> str | None:
    """Say that PyTorch finds no CUDA device, as a part of a sentence; None where it finds one."""
    if torch.cuda.is_available():
        return None
    built = "" if torch.version.cuda else ", and this PyTorch is built without CUDA"
    return f"PyTorch finds no CUDA device{built}"


def current_gpu(runtime: str) -> torch.device:
    """Return the current CUDA device, with its index. Raises UnsupportedTargetError where PyTorch finds none."""
    reason = no_gpu()
    if reason is not None:
        raise UnsupportedTargetError(
            f"{runtime} on cuda needs an NVIDIA GPU, and {reason}; run where there is one, or with --device cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one for a while."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
