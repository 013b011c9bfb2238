"""Native code in packages: which libraries it needs, and whether it holds a C++ standard library of its own."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from tnllm_export.bundle.native_code import libraries_with_own_standard_library, needed_libraries

CODE = """
#include <cmath>
#include <regex>
#include <string>
extern "C" double f(const char* text) {
    return std::regex_match(std::string(text), std::regex("[a-c]+")) + std::sin(1.0);
}
"""


@pytest.fixture(scope="module")
def linked(tmp_path_factory):
    """Return `linked(*options)`: a shared library of a C++ function."""
    folder = tmp_path_factory.mktemp("code")
    source = folder / "code.cpp"
    source.write_text(CODE)

    def link(*options: str) -> bytes:
        library = folder / "code.so"
        subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(library), *options], check=True)
        return library.read_bytes()

    return link


def package(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "decode.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_needed_libraries_are_those_that_readelf_names(linked, tmp_path):
    library = linked("-Wl,--no-as-needed", "-lm", "-ldl")
    (tmp_path / "code.so").write_bytes(library)
    listed = subprocess.run(["readelf", "-d", tmp_path / "code.so"], check=True, capture_output=True, text=True).stdout
    expected = [line.split("[")[1].rstrip("]") for line in listed.splitlines() if "(NEEDED)" in line]
    assert "libstdc++.so.6" in expected
    assert needed_libraries(library) == expected


def test_only_libraries_that_need_no_shared_standard_library_are_named(linked, tmp_path):
    files = {
        "model/data/shared.so": linked(),
        "model/data/static.so": linked("-static-libstdc++"),
        "model/data/other.so": b"\xcf\xfa\xed\xfe of another system",
        "model/data/kernel.cubin": b"\x7fELF\x02\x01",
    }
    assert libraries_with_own_standard_library(package(tmp_path, files)) == ["model/data/static.so"]
