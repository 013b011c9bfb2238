"""A library around kernels that are no code."""

from pathlib import Path

import pytest

from tests.plugins.fake import fake_library, fake_table
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
