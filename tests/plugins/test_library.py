"""The library compiles with g++ alone, needs neither CUDA nor a driver to load, and says what is missing."""

import ctypes
import dataclasses
import stat
import subprocess
from pathlib import Path

import pytest

from tnllm_export.errors import PluginBuildError, WriteError
from tnllm_export.plugins.library import SOURCES, build_library, find_headers, kernels_of


def test_the_library_needs_no_cuda_and_loads_without_a_driver(library):
    listing = subprocess.run(["readelf", "--dynamic", library], check=True, capture_output=True, text=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in listing.splitlines() if "(NEEDED)" in line]
    assert any(name.startswith("libc.so") for name in needed)
    assert not [name for name in needed if "cuda" in name or "nv" in name]
    # Undefined symbols that nothing provides would show here.
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_LOCAL | 2)  # RTLD_NOW
    count = ctypes.c_int32()
    loaded.getCreators.restype = ctypes.c_void_p
    assert loaded.getCreators(ctypes.byref(count))
    assert count.value == 2


def test_it_exports_what_tensorrt_looks_for_and_nothing_else_of_ours(library):
    listing = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True)
    strong = {line.split()[-1] for line in listing.stdout.splitlines() if line.split()[-2] in "TDBR"}
    assert strong == {"getCreators", "setLoggerFinder"}


def test_it_names_its_kernels_to_who_reads_the_file(table, library, tmp_path):
    rows = {(k.compute_capability, k.dtype, k.key_dim, k.value_dim) for k in table.kernels}
    assert kernels_of(library) == rows
    (tmp_path / "other").write_bytes(b"\x7fELF of others")
    assert kernels_of(tmp_path / "other") is None


def test_the_code_of_every_kernel_is_in_the_library(table, library):
    content = library.read_bytes()
    assert {kernel.cubin for kernel in table.kernels if kernel.cubin not in content} == set()


def test_the_same_kernels_come_from_the_cache_and_others_do_not(table, library, cache):
    stamp = library.stat().st_mtime_ns
    assert build_library(table, cache=cache) == library
    assert library.stat().st_mtime_ns == stamp
    kernels = (dataclasses.replace(table.kernels[0], cubin=b"other code"), *table.kernels[1:])
    other = build_library(dataclasses.replace(table, kernels=kernels), cache=cache)
    assert other != library
    assert not list(cache.glob(".building-*"))


def test_headers_are_taken_from_where_they_are_named(monkeypatch, tmp_path):
    carried = find_headers()
    assert (carried / "NvInferRuntime.h").is_file()
    for path in carried.glob("*.h"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    assert find_headers() == tmp_path
    assert find_headers(carried) == carried


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda patch, folder: patch.setenv("CXX", "no-such-compiler"),
            "no C++ compiler no-such-compiler; install g++",
        ),
        (
            lambda patch, folder: patch.setenv("TENSORRT_INCLUDE_DIR", str(folder)),
            "no NvInferRuntime.h; name their folder",
        ),
        (
            lambda patch, folder: patch.setattr("tnllm_export.plugins.library._carried_headers", lambda: None),
            "TensorRT's headers are not installed; name their folder with --include or TENSORRT_INCLUDE_DIR",
        ),
        (
            lambda patch, folder: (
                (folder / "NvInferRuntime.h").write_text(""),
                (folder / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 6\n"),
                patch.setenv("TENSORRT_INCLUDE_DIR", str(folder)),
            ),
            "headers of TensorRT 8.6; expected 10.3 or newer",
        ),
        (
            lambda patch, folder: (
                (folder / "NvInferRuntime.h").write_text("#error spoiled\n"),
                (folder / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 10\n#define NV_TENSORRT_MINOR 9\n"),
                patch.setenv("TENSORRT_INCLUDE_DIR", str(folder)),
            ),
            "could not compile the plugin library",
        ),
    ],
    ids=["no compiler", "no headers there", "no headers", "old headers", "broken headers"],
)
def test_what_is_missing_is_told_in_one_line(table, monkeypatch, tmp_path, spoil, words):
    (tmp_path / "include").mkdir()
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)
    spoil(monkeypatch, tmp_path / "include")
    with pytest.raises(PluginBuildError) as error:
        build_library(table, cache=tmp_path / "cache")
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not list(tmp_path.glob("cache/*"))


def test_a_cache_that_cannot_be_written_is_named(table, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WriteError, match="file/cache: could not be written"):
        build_library(table, cache=tmp_path / "file" / "cache")


def test_an_argument_that_the_launcher_does_not_know_is_named(table, tmp_path):
    kernel = dataclasses.replace(table.kernels[0], arguments=("query", "temperature"))
    with pytest.raises(ValueError, match="temperature"):
        build_library(dataclasses.replace(table, kernels=(kernel,)), cache=tmp_path)


def test_the_sources_are_readable_and_say_their_arguments_in_the_order_of_the_seam():
    from tnllm_export.kernels.compiled import INTEGERS, MAPS, POINTERS, UNUSED

    text = (SOURCES / "kernels.h").read_text()
    block = text.split("enum class Argument : uint8_t {")[1].split("}")[0]
    assert tuple(name.strip() for name in block.split(",") if name.strip()) == (*POINTERS, *MAPS, UNUSED, *INTEGERS)
    assert f"kPointers = {len(POINTERS)};" in text
    assert f"kMaps = {len(MAPS)};" in text
    for path in Path(SOURCES).rglob("*.*"):
        assert path.stat().st_mode & stat.S_IRUSR
        assert max(len(line) for line in path.read_text().splitlines()) <= 130
