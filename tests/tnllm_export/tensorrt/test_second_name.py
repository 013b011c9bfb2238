"""A library that is open can be opened under another name, and is the same library."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from tnllm_export.tensorrt.second_name import open_under

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux opens files in memory")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library `libcounter.so.1`, whose `count` says how often it was called."""
    source = tmp_path_factory.mktemp("counter") / "counter.cpp"
    source.write_text('static int calls = 0; extern "C" int count() { return ++calls; }\n')
    path = source.with_name("libcounter.so.1")
    subprocess.run(["g++", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", source, "-o", path], check=True)
    return path


def test_a_library_has_its_second_name_without_a_file_and_is_opened_once(library):
    opened = ctypes.CDLL(str(library))
    assert opened.count() == 1
    with pytest.raises(OSError, match=r"libcounter\.so"):
        ctypes.CDLL("libcounter.so")
    open_under("libcounter.so", library)
    assert ctypes.CDLL("libcounter.so").count() == 2
    assert opened.count() == 3
    assert [path.name for path in library.parent.glob("lib*")] == [library.name]


def test_two_names_do_not_get_in_each_others_way(library):
    opened = ctypes.CDLL(str(library))
    before = opened.count()
    open_under("libone.so", library)
    open_under("libanother_rather_long_name.so.0", library)
    found = [ctypes.CDLL(name).count() for name in ("libone.so", "libanother_rather_long_name.so.0")]
    assert found == [before + 1, before + 2]


def test_stacks_stay_not_executable(library):
    code = """
import sys
from pathlib import Path
from tnllm_export.tensorrt.second_name import open_under
import ctypes
ctypes.CDLL(sys.argv[1])
open_under("libsecond.so", Path(sys.argv[1]))
print([line.split()[1] for line in open("/proc/self/maps") if "[stack]" in line])
"""
    done = subprocess.run([sys.executable, "-c", code, library], check=True, capture_output=True, text=True)
    assert done.stdout == "['rw-p']\n"
