"""The plugins, driven through TensorRT's C++ interface alone: no TensorRT library, no GPU."""

import subprocess
from pathlib import Path

from tnllm_export.plugins.library import SOURCES, find_headers

HARNESS = Path(__file__).with_name("harness.cpp")


def test_the_plugins_keep_tensorrts_contract_and_name_what_does_not_fit(library, tmp_path):
    harness = tmp_path / "harness"
    includes = ["-isystem", find_headers(), "-idirafter", SOURCES / "stub"]
    subprocess.run(["g++", "-std=c++17", "-fsanitize=undefined", *includes, HARNESS, "-o", harness, "-ldl"], check=True)
    done = subprocess.run([harness, library], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
