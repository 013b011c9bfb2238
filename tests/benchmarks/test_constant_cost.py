"""A token costs the same after 16,384 tokens of context as after 512, on ONNX Runtime on the CPU."""

import pytest

from benchmarks.constant_cost import LIMIT, LONG, SHORT, compare
from tnllm_export.demo import checkpoint_folder
from tnllm_export.export import export_bundle
from tnllm_export.runtime import load_runtime


@pytest.mark.slow
def test_decode_time_and_state_size_do_not_grow_with_the_context(tmp_path):
    runtime = load_runtime(export_bundle(checkpoint_folder(), tmp_path / "bundle"), threads=1)
    seconds, size = compare(runtime)
    assert size[LONG] == size[SHORT] > 0
    assert abs(seconds[LONG] / seconds[SHORT] - 1) <= LIMIT
