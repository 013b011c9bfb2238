"""A library around kernels that are no code; on a GPU, one around all kernels that run there."""

from pathlib import Path

import pytest
import torch

from benchmarks.plugin_driver import PluginLibrary, compile_driver
from tests.plugins.fake import fake_library, fake_table
from tests.plugins.on_gpu import gpu_library_in
from tests.workers import shared_folder
from tnllm_export.kernels.compiled import KernelTable


@pytest.fixture(scope="session")
def table() -> KernelTable:
    return fake_table()


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_library(tmp_path_factory.getbasetemp())


@pytest.fixture
def cache(library: Path) -> Path:
    return library.parents[1]


@pytest.fixture(scope="session")
def gpu_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library for this machine's GPU; one of all workers builds it."""
    major, minor = torch.cuda.get_device_capability()
    return gpu_library_in(shared_folder(tmp_path_factory.getbasetemp()), 10 * major + minor)


@pytest.fixture(scope="session")
def plugin_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="session")
def plugins(gpu_library: Path, plugin_driver: Path) -> PluginLibrary:
    torch.zeros((), device="cuda")  # makes the context
    return PluginLibrary(plugin_driver, gpu_library)
