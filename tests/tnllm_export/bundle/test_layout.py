"""The plan of the weights file: what safetensors and numpy read is what was planned."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tnllm_export.bundle import DTYPES, TensorSpec, plan_weights, read_layout

specs = st.lists(
    st.builds(
        TensorSpec,
        name=st.uuids().map(str),
        dtype=st.sampled_from(sorted(DTYPES)),
        shape=st.lists(st.integers(1, 70), max_size=3).map(tuple),
    ),
    unique_by=lambda spec: spec.name,
    max_size=8,
)


@settings(deadline=None)
@given(specs=specs)
def test_tensors_stand_without_holes_and_aligned(specs: list[TensorSpec]) -> None:
    layout = plan_weights(specs)
    assert set(layout.weights) == {spec.name for spec in specs}
    end = len(layout.header)
    assert end % 4096 == 0
    for name in layout.names:
        assert layout.offset(name) == end
        assert layout.offset(name) % DTYPES[layout.weights[name].spec.dtype].itemsize == 0
        end += layout.nbytes(name)
    assert layout.total_bytes == end
    assert layout.parameters == sum(spec.numel for spec in specs)


@settings(deadline=None, max_examples=30)
@given(specs=specs)
def test_safetensors_reads_what_was_planned(tmp_path_factory: pytest.TempPathFactory, specs: list[TensorSpec]) -> None:
    path = tmp_path_factory.mktemp("layout") / "w.safetensors"
    layout = plan_weights(specs)
    content = np.random.default_rng(3).integers(0, 2, layout.total_bytes - len(layout.header), dtype=np.uint8).tobytes()
    path.write_bytes(layout.header + content)
    loaded = load_file(path)
    assert set(loaded) == set(layout.weights)
    for name, tensor in loaded.items():
        spec = layout.weights[name].spec
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, DTYPES[spec.dtype])
        start = layout.offset(name) - len(layout.header)
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == content[start : start + spec.nbytes]
    assert read_layout(path) == layout


def test_big_matrices_start_at_pages() -> None:
    layout = plan_weights(
        [
            TensorSpec("odd", "bfloat16", (3,)),
            TensorSpec("matrix", "bfloat16", (64, 64)),
            TensorSpec("embedding", "bfloat16", (97, 64)),
            TensorSpec("other", "bfloat16", (128, 64)),
        ]
    )
    assert layout.names == ("matrix", "other", "embedding", "odd")
    assert [layout.offset(name) % 4096 for name in ("matrix", "other", "embedding")] == [0, 0, 0]


def test_the_same_specs_give_the_same_bytes() -> None:
    make = [TensorSpec(f"t{i}", "float16", (i + 1, 5)) for i in range(20)]
    assert plan_weights(make) == plan_weights(iter(make))
    header = json.loads(plan_weights(make).header[8:])
    assert header["__metadata__"] == {"format": "pt"}


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two tensors are named a"):
        plan_weights([TensorSpec("a", "float32", (1,)), TensorSpec("a", "float32", (2,))])


def test_reading_a_layout_names_a_broken_file(tmp_path: Path) -> None:
    from tnllm_export.errors import WeightsUnreadableError

    path = tmp_path / "w.safetensors"
    path.write_bytes(plan_weights([TensorSpec("a", "float32", (9,))]).header)
    with pytest.raises(WeightsUnreadableError, match=str(path)):
        read_layout(path)
