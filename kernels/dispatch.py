"""Which form computes an op: Triton kernels on CUDA and PyTorch elsewhere, unless the user asks for one of them.

The choice is read when an op runs, never when it is traced: an exported or compiled program holds the op itself.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

Form = Literal["triton", "pytorch"]
Choice = Literal["auto", "triton", "pytorch"]

CHOICES: tuple[Choice, ...] = ("auto", "triton", "pytorch")

ENVIRONMENT_VARIABLE = "TNLLM_KERNELS"
"""`auto`, `triton` or `pytorch`; what `use_kernels` says goes first."""


@dataclass(frozen=True, eq=False)
class _Context:
    """A `use_kernels` that has not ended."""

    choice: Choice


# One list for the process, no context variable: autograd runs a CUDA backward in a thread of its own.
_contexts: list[_Context] = []


@contextmanager
def use_kernels(choice: Choice) -> Iterator[None]:
    """Compute the ops inside this context by Triton kernels ("triton"), in PyTorch ("pytorch") or as fits ("auto").

    The choice holds for all threads of the process. Of several contexts the one that was entered last counts, in
    whichever order they end.

    Raises:
        ValueError: No such choice.
    """
    context = _Context(_checked(choice, "use_kernels"))
    _contexts.append(context)
    try:
        yield
    finally:
        _contexts.remove(context)


def kernel_choice() -> Choice:
    """Return what the user asked for: by `use_kernels`, else by the environment variable, else "auto".

    Raises:
        ValueError: The environment variable holds no choice.
    """
    if _contexts:
        return _contexts[-1].choice
    return _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


def form_for(device: torch.device) -> Form:
    """Return the form that computes an op whose tensors lie on `device`.

    Raises:
        RuntimeError: Triton was asked for and cannot run there.
        ValueError: The environment variable holds no choice.
    """
    choice = kernel_choice()
    if choice == "pytorch":
        return "pytorch"
    reason = _obstacle(device)
    if reason is None:
        return "triton"
    if choice == "triton":
        raise RuntimeError(f"Triton kernels were asked for, but {reason}; use_kernels('pytorch') computes without them")
    return "pytorch"


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on tensors of any device (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _obstacle(device: torch.device) -> str | None:
    if not _triton_installed():
        return "the package triton is not installed"
    if device.type == "cuda" or (interpreted() and kernel_choice() == "triton"):
        return None
    return f"the tensors are on {device.type}, not on a CUDA device"


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


def _checked(choice: str, source: str) -> Choice:
    if choice not in CHOICES:
        raise ValueError(f"{source}: found {choice!r}; expected one of {', '.join(CHOICES)}")
    return choice
