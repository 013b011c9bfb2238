"""Where the package, caches or a bundle can't be written, all works that can, or one line says what to do."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import tnllm_export
from tnllm_export.errors import PluginBuildError, TnllmError, WriteError

# Not importorskip: nothing imports TensorRT that does not use it.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX has no wheel for this platform"),
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton has no wheel for this platform"),
    pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root may write, without setpriv"),
]

Tnllm = Callable[..., "subprocess.CompletedProcess[str]"]

# root may write whatever permissions say, unless it gives these rights up.
OBEYING = "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"

MAIN = """
import sys
import tnllm_export
assert tnllm_export.__file__.startswith(sys.argv.pop(1)), tnllm_export.__file__
from tnllm_export.cli.main import main
main()
"""


def lock(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)


def unlock(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package as it is when installed, in a folder that nobody may write."""
    folder = tmp_path_factory.mktemp("site-packages")
    ours = folder / "tnllm_export"
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(next(iter(tnllm_export.__path__)), ours, ignore=without_caches)
    for name in ("kernels", "graphs", "plugins"):
        if not (ours / name).exists():  # an editable install has them elsewhere
            spec = find_spec(f"tnllm_export.{name}")
            shutil.copytree(Path(spec.origin).parent, ours / name, ignore=without_caches)
    lock(folder)
    yield folder
    unlock(folder)


@pytest.fixture
def tnllm(site_packages: Path, tmp_path: Path) -> Iterator[Tnllm]:
    """Run the command line with folders `cache` and `home` of the test's own; `locked` names what can't be written."""

    def run(*arguments: object, locked: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(site_packages),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "HOME": str(tmp_path / "home"),
        }
        environment.pop("TRITON_CACHE_DIR", None)
        obeying = ["setpriv", *OBEYING] if os.geteuid() == 0 else []
        command = [*obeying, sys.executable, "-c", MAIN, str(site_packages), *map(str, arguments)]
        for folder in locked:
            lock(folder)
        try:
            return subprocess.run(
                command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
            )
        finally:
            for folder in locked:
                unlock(folder)

    (tmp_path / "cache").mkdir()
    (tmp_path / "home").mkdir()
    return run


def test_a_package_that_can_not_be_written_makes_a_plugin_library_and_engines(tnllm, bundle_of, site_packages):
    bundle = bundle_of("tiny", "float16", "plugin").path
    made = tnllm("build-plugin", "--sm", "86", "--bundle", bundle, "--json")
    assert made.returncode == 0, made.stderr
    built = tnllm("build", bundle, "--plugin-library", json.loads(made.stdout)["library"], "--max-prompt", 9, "--json")
    assert built.returncode == 0, built.stderr
    assert Path(json.loads(built.stdout)["engines"], "decode.engine").is_file()
    assert not list(site_packages.rglob("__pycache__"))


def one_line(done: "subprocess.CompletedProcess[str]", error: type[TnllmError] = WriteError) -> str:
    assert done.returncode == error.exit_code, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_a_cache_that_can_not_be_written_is_named_before_kernels_are_compiled(tnllm, bundle_of, tmp_path):
    bundle = bundle_of("tiny", "float16", "plugin").path
    done = tnllm("build-plugin", "--sm", "86", "--bundle", bundle, locked=(tmp_path / "cache",))
    assert f"{tmp_path}/cache/tnllm: could not be written, Permission denied; set XDG_CACHE_HOME" in one_line(done)
    assert not list((tmp_path / "home").iterdir())


def test_tritons_cache_that_can_not_be_written_is_named(tnllm, bundle_of, tmp_path):
    bundle = bundle_of("tiny", "float16", "plugin").path
    done = tnllm("build-plugin", "--sm", "86", "--bundle", bundle, locked=(tmp_path / "home",))
    said = one_line(done, PluginBuildError)
    assert f"Permission denied: '{tmp_path}/home/.triton'" in said
    assert "a cache that can be written (TRITON_CACHE_DIR)" in said


def test_engines_need_no_cache_and_a_bundle_that_can_not_be_written_is_named(tnllm, bundle_of, tmp_path):
    bundle = bundle_of("tiny", "float16", "matmul").path
    places = tmp_path / "cache", tmp_path / "home"
    refused = tnllm("build", bundle, "--max-prompt", 9, locked=(bundle, *places))
    assert str(bundle) in one_line(refused)
    built = tnllm("build", bundle, "--max-prompt", 9, "--json", locked=places)
    assert built.returncode == 0, built.stderr
    assert Path(json.loads(built.stdout)["engines"], "decode.engine").is_file()
    # What is there is found in a bundle that can't be written.
    again = tnllm("build", bundle, "--max-prompt", 9, "--json", locked=(bundle, *places))
    assert json.loads(again.stdout)["cached"] is True
