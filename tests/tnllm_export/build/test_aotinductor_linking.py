"""Packages are linked with the libstdc++ that PyTorch has loaded, also by compilers that would link another one."""

import os
import zipfile

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config

from tnllm_export.build import aotinductor, aotinductor_linking
from tnllm_export.build.aotinductor_linking import SONAME, linking_the_loaded_library, loaded_library
from tnllm_export.bundle.native_code import needed_libraries
from tnllm_export.errors import EngineBuildError


@pytest.fixture
def static_compiler(tmp_path):
    """The compiler, made to link libstdc++ statically, as one does that finds no shared one."""
    path = tmp_path / "g++"
    path.write_text('#!/bin/sh\nexec g++ "$@" -static-libstdc++\n')
    path.chmod(0o755)
    with inductor_config.patch({"cpp.cxx": (str(path),)}):
        yield path


@pytest.fixture(scope="module")
def program():
    return torch.export.export(nn.Tanh(), (torch.ones(3),))


def test_a_package_loads_that_a_compiler_without_a_shared_libstdcxx_linked(static_compiler, program, tmp_path):
    path = aotinductor._compile(program, "decode", tmp_path)
    with zipfile.ZipFile(path) as archive:
        (library,) = [name for name in archive.namelist() if name.endswith(".so")]
        assert SONAME in needed_libraries(archive.read(library))
    inputs = torch.tensor([0.5, -1.0, 2.0])
    assert torch.allclose(torch._inductor.aoti_load_package(str(path))(inputs), inputs.tanh())


def test_a_package_that_would_crash_a_process_is_no_package(static_compiler, program, tmp_path, monkeypatch):
    monkeypatch.setattr(aotinductor_linking, "loaded_library", lambda: None)
    monkeypatch.setenv("CXX", str(static_compiler))
    with pytest.raises(EngineBuildError) as caught:
        aotinductor._compile(program, "decode", tmp_path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{static_compiler} linked decode.pt2 with a C++ standard library of its own")
    assert line.endswith("or name another compiler by CXX")


@pytest.mark.parametrize("before", [None, "/somewhere"])
def test_the_linker_searches_elsewhere_only_while_a_package_is_linked(monkeypatch, before):
    monkeypatch.delenv("LIBRARY_PATH", raising=False)
    if before is not None:
        monkeypatch.setenv("LIBRARY_PATH", before)
    with inductor_config.patch({"aot_inductor.custom_op_libs": ["mine"]}), linking_the_loaded_library() as settings:
        assert settings == {"aot_inductor.custom_op_libs": ["mine", f":{SONAME}"]}
        folder, *rest = os.environ["LIBRARY_PATH"].split(os.pathsep)
        assert rest == ([] if before is None else [before])
        assert os.path.samefile(os.path.join(folder, SONAME), loaded_library())
    assert os.environ.get("LIBRARY_PATH") == before
    assert not os.path.exists(folder)


def test_where_no_library_is_known_nothing_is_set(monkeypatch, tmp_path):
    monkeypatch.setattr(aotinductor_linking, "_MAPS", tmp_path / "maps")
    assert loaded_library() is None
    (tmp_path / "maps").write_text("7f00-7f01 r-xp 0 fe:00 12   /usr/lib/libstdc++-a1b2.so.6.0.30\n")
    assert loaded_library() is None
    with linking_the_loaded_library() as settings:
        assert settings == {}
