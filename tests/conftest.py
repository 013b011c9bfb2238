"""Tests marked `gpu` run wherever a CUDA device is; without one, Triton kernels run under Triton's interpreter."""

import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch

from tests.workers import shared_device

if not torch.cuda.is_available():
    # Read when a kernel is defined, so it must be set before any test module is imported.
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Else each of the workers starts a thread for each core.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test marked `gpu(alone=True)` have the GPU alone, with what it sets up and leaves behind."""
    marker = item.get_closest_marker("gpu")
    if marker is None or not torch.cuda.is_available():
        return (yield)
    folder = Path(tempfile.gettempdir()) / f"tnllm-export-tests-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    with shared_device(folder, alone=marker.kwargs.get("alone", False)):
        return (yield)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that Triton kernels are tried on: a CUDA device, or the CPU with the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _memory_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave no freed memory of a GPU with one of the processes that share it."""
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture
def far_apart(device: torch.device, tmp_path: Path) -> Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor]:
    """Give a tensor with the same numbers and such strides; what lies between takes no memory but a GPU's."""

    def spread(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
        size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
        if device.type == "cuda":
            memory = torch.empty(size, dtype=x.dtype, device=device)
        else:
            memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=x.dtype)
        return memory.as_strided(x.shape, strides).copy_(x)

    return spread
