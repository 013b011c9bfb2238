"""Speed and memory of a bundle on several runtimes, each beside what the device could do."""

from tnllm_export.bench.bundle import bench_bundle
from tnllm_export.bench.options import BenchOptions
from tnllm_export.bench.page import check_page, write_page
from tnllm_export.bench.records import BenchReport

__all__ = ["BenchOptions", "BenchReport", "bench_bundle", "check_page", "write_page"]
