"""A plugin library that calls another CUDA driver: one that counts, and that needs no device. See `cuda_driver.cpp`."""

import ctypes
import subprocess
from itertools import count
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
_numbers = count()
CALLS = ("module", "function", "memset", "copy", "launch", "map")


class State(ctypes.Structure):
    """What it has counted and was last told, and what it shall do."""

    _fields_ = (
        ("counts", ctypes.c_int64 * len(CALLS)),
        ("failing", ctypes.c_int32),
        ("capability", ctypes.c_int32),
        ("processors", ctypes.c_int32),
        ("context", ctypes.c_int32),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("arguments", ctypes.c_uint64 * 128),
        ("argument_count", ctypes.c_int64),
        ("memset", ctypes.c_uint64 * 2),
        ("copy", ctypes.c_uint64 * 3),
        ("map_sizes", ctypes.c_uint64 * 4),
        ("map_strides", ctypes.c_uint64 * 3),
        ("map_block", ctypes.c_uint32 * 4),
        ("stream", ctypes.c_uint64),
        ("capture", ctypes.c_uint64),
        ("overlaps", ctypes.c_int32),
    )

    def count(self, call: str) -> int:
        """Return how often the driver was asked for it."""
        return self.counts[CALLS.index(call)]

    def fail(self, call: str | None) -> None:
        """Let a call fail from now on."""
        self.failing = -1 if call is None else CALLS.index(call)


def compile_driver(folder: Path) -> Path:
    """Compile a driver with a name of its own: libraries are known by their name throughout a process."""
    name = f"lib{next(_numbers):04}.so.1"  # as long as the real one's
    driver = folder / name
    flags = ["-std=c++17", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
    subprocess.run(["g++", *flags, str(SOURCE), "-o", str(driver), "-ldl"], check=True)
    return driver


def state_of(driver: ctypes.CDLL) -> State:
    """Return what a driver has recorded, and obeys."""
    driver.state.restype = ctypes.POINTER(State)
    state: State = driver.state().contents
    return state


class CudaDriver:
    """A driver of its own in the process, and the copy of a plugin library that calls it."""

    def __init__(self, library: Path, folder: Path) -> None:
        driver = compile_driver(folder)
        # The plugin library opens this name and finds what is loaded here.
        self._driver = ctypes.CDLL(str(driver))
        self.state = state_of(self._driver)
        content = library.read_bytes()
        assert content.count(b"libcuda.so.1\0") == 1
        self.library = folder / library.name
        self.library.write_bytes(content.replace(b"libcuda.so.1\0", driver.name.encode() + b"\0"))

    def forward(self) -> bool:
        """Pass calls on to the machine's driver; return whether there is one."""
        return bool(self._driver.forward())
