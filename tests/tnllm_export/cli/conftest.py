"""Calling `tnllm` in this process."""

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from tnllm_export.cli.main import app

Tnllm = Callable[..., Result]


@pytest.fixture
def tnllm() -> Tnllm:
    """Return `tnllm("export", path, ...)`, which gives exit code, stdout and stderr."""
    return lambda *arguments, **options: CliRunner().invoke(app, [str(item) for item in arguments], **options)
