"""Streaming weights through memory maps: any size of file in the memory of its largest tensor."""

from pathlib import Path

import psutil
import pytest
import torch

from tnllm_export.bundle import TensorSpec, plan_weights
from tnllm_export.models.weight_files import name_some, open_weight_file, read_safetensors_header

MEBIBYTE = 1 << 20
COUNT, SIZE = 12, 32 * MEBIBYTE


def write_safetensors(path: Path) -> None:
    layout = plan_weights(TensorSpec(f"t{i}", "bfloat16", (SIZE // 2,)) for i in range(COUNT))
    with path.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.total_bytes)


def write_bin(path: Path) -> None:
    torch.save({f"t{i}": torch.zeros(SIZE // 2, dtype=torch.bfloat16) for i in range(COUNT)}, path)


@pytest.mark.parametrize(("name", "write"), [("w.safetensors", write_safetensors), ("w.bin", write_bin)])
def test_released_tensors_leave_resident_memory(tmp_path: Path, name: str, write: object) -> None:
    assert callable(write)
    write(tmp_path / name)
    file = open_weight_file(tmp_path / name)
    process = psutil.Process()
    before = process.memory_info().rss
    most_with_one = most_after = 0
    for tensor_name in file.infos:
        assert torch.count_nonzero(file.read(tensor_name)) == 0
        most_with_one = max(most_with_one, process.memory_info().rss - before)
        file.release(tensor_name)
        most_after = max(most_after, process.memory_info().rss - before)
    assert SIZE * 0.9 < most_with_one < SIZE * 2  # the measure does see mapped pages
    assert most_after < SIZE / 4


def test_releasing_a_tensor_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    torch.save({str(i): torch.full((3001,), float(i)) for i in range(9)}, path)
    file = open_weight_file(path)
    for i in range(9):
        file.release(str(i))
        for j in range(9):
            assert torch.equal(file.read(str(j)), torch.full((3001,), float(j)))


def test_a_header_tells_where_each_tensor_stands(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    layout = plan_weights([TensorSpec("a", "float32", (2, 3)), TensorSpec("b", "float16", (4,))])
    path.write_bytes(layout.header + bytes(32))
    header = read_safetensors_header(path)
    assert {name: stored.offset for name, stored in header.items()} == {
        name: layout.offset(name) for name in layout.names
    }
    assert header["a"].info.dtype == torch.float32
    assert header["a"].info.nbytes == 24


def test_lists_of_names_are_cut() -> None:
    assert name_some(["a", "b"]) == "a, b"
    assert name_some([str(i) for i in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
