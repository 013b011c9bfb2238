"""Tests marked `gpu` run wherever a CUDA device is; without one, Triton kernels run under Triton's interpreter."""

import os
from collections.abc import Iterator

import pytest
import torch
from filelock import FileLock

from tests.workers import shared_folder

if not torch.cuda.is_available():
    # Read when a kernel is defined, so it must be set before any test module is imported.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


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
def much_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For tests that take tens of GB of a GPU: one after the other, in whichever process they run."""
    with FileLock(shared_folder(tmp_path_factory.getbasetemp()) / "much_memory.lock"):
        yield
