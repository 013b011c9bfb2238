"""Tests marked `gpu` run wherever a CUDA device is; without one, Triton kernels run under Triton's interpreter."""

import os

import pytest
import torch

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
