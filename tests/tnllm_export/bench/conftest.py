"""One run on the tiny bundle with the runtimes of the CPU, shared by all tests."""

import pytest

from tnllm_export.bench import BenchOptions, BenchReport, bench_bundle
from tnllm_export.bundle import Bundle

QUICK = BenchOptions(prompt_lengths=(3, 70), contexts=(5, 100, 5000), batches=(1, 3), tokens=4, time_limit=300)


@pytest.fixture(scope="session")
def report(text_bundle: Bundle) -> BenchReport:
    return bench_bundle(text_bundle, ("torch", "onnxruntime", "tensorrt-rtx"), device="cpu", options=QUICK)
