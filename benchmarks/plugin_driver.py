"""The plugin library as TensorRT would use it, on torch's tensors, without TensorRT: `plugin_driver.cpp` by ctypes."""

import ctypes
import subprocess
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from tnllm_export.plugins.library import SOURCES, find_compiler, find_headers

SOURCE = Path(__file__).with_suffix(".cpp")

INPUTS = {"LightningAttention": 6, "LightningAttentionStep": 5}
OUTPUTS = 2

BUILD, RUNTIME = 0, 1
"""Phases, as `TensorRTPhase` counts them."""

TYPES = {torch.float32: 0, torch.float16: 1, torch.int8: 2, torch.int32: 3, torch.bfloat16: 7, torch.int64: 8}
"""Dtypes, as `DataType` counts them."""

Shaped = tuple[torch.dtype, Sequence[int]]


class PluginError(Exception):
    """A call of the interface returned a code; the message is what the plugin logged."""


class _Tensor(ctypes.Structure):
    _fields_ = (("type", c_int32), ("rank", c_int32), ("shape", c_int64 * 5))


_SIGNATURES = {
    "open_library": (c_void_p, [c_char_p, POINTER(c_int32), POINTER(c_char_p)]),
    "creator_name": (c_char_p, [c_void_p, c_int32]),
    "create": (c_void_p, [c_void_p, c_int32, POINTER(c_char_p), POINTER(c_int32), c_int32, c_int32]),
    "recreate": (c_void_p, [c_void_p, c_int32, c_void_p]),
    "clone": (c_void_p, [c_void_p]),
    "attach": (c_void_p, [c_void_p]),
    "destroy": (None, [c_void_p]),
    "plugin_name": (c_char_p, [c_void_p]),
    "aliased_input": (c_int32, [c_void_p, c_int32]),
    "configure": (c_int32, [c_void_p, POINTER(_Tensor), c_int32, c_int32]),
    "workspace_bytes": (c_uint64, [c_void_p, POINTER(_Tensor), c_int32, c_int32]),
    "change_shapes": (c_int32, [c_void_p, POINTER(_Tensor), c_int32, c_int32]),
    "enqueue": (c_int32, [c_void_p, POINTER(_Tensor), c_int32, c_int32, POINTER(c_void_p), c_void_p, c_void_p]),
    "last_message": (c_char_p, []),
}


def compile_driver(folder: Path) -> Path:
    """Compile the C++ part into a folder, with g++ and TensorRT's headers alone."""
    library = folder / "libplugin_driver.so"
    includes = ["-isystem", str(find_headers()), "-idirafter", str(SOURCES / "stub")]
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC"]
    subprocess.run([find_compiler(), *flags, *includes, str(SOURCE), "-o", str(library), "-ldl"], check=True)
    return library


class PluginLibrary:
    """A library's creators."""

    def __init__(self, driver: Path, library: Path) -> None:
        self.calls = ctypes.CDLL(str(driver))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.calls, name)
            function.restype, function.argtypes = result, arguments
        count, error = c_int32(), c_char_p()
        self.creators = self.calls.open_library(str(library).encode(), ctypes.byref(count), ctypes.byref(error))
        if not self.creators:
            raise PluginError(f"{library}: {(error.value or b'').decode()}")
        self.names = [self.calls.creator_name(self.creators, place).decode() for place in range(count.value)]

    def create(self, op: str, fields: Mapping[str, int] | None = None, phase: int = BUILD) -> "Plugin":
        """Return a plugin of the op's name, made from its fields. Raises PluginError where it is refused."""
        fields = fields or {}
        names = (c_char_p * len(fields))(*(name.encode() for name in fields))
        values = (c_int32 * len(fields))(*fields.values())
        place = self.names.index(op)
        return Plugin(self, op, self.calls.create(self.creators, place, names, values, len(fields), phase))

    def check(self, code: int) -> None:
        """Raise PluginError where a code says so."""
        if code:
            raise PluginError(self.last_message())

    def last_message(self) -> str:
        """Return what was logged last, once."""
        return str(self.calls.last_message().decode())


class Plugin:
    """A plugin, and the calls that TensorRT makes."""

    def __init__(self, library: PluginLibrary, op: str, handle: int | None) -> None:
        self._handle = handle
        if handle is None:
            raise PluginError(library.last_message())
        self.library = library
        self.op = op
        self.inputs = INPUTS[op]

    def __del__(self) -> None:
        if self._handle is not None:
            self.library.calls.destroy(self._handle)

    def recreate(self) -> "Plugin":
        """Return a plugin made from what this one serialises."""
        place = self.library.names.index(self.op)
        return self._made(self.library.calls.recreate(self.library.creators, place, self._handle))

    def clone(self) -> "Plugin":
        """Return a clone."""
        return self._made(self.library.calls.clone(self._handle))

    def attach(self) -> "Plugin":
        """Return the plugin of an execution context."""
        return self._made(self.library.calls.attach(self._handle))

    def aliased_input(self, output: int) -> int:
        """Return the place of the input that an output overwrites, or -1."""
        return int(self.library.calls.aliased_input(self._handle, output))

    def configure(self, tensors: Sequence[Tensor | Shaped]) -> int:
        """Take the largest shapes of inputs and outputs and return the bytes of workspace that they need."""
        described = describe(tensors)
        self.library.check(self.library.calls.configure(self._handle, described, self.inputs, OUTPUTS))
        return int(self.library.calls.workspace_bytes(self._handle, described, self.inputs, OUTPUTS))

    def change_shapes(self, tensors: Sequence[Tensor | Shaped]) -> None:
        """Take the shapes of the calls to come."""
        self.library.check(self.library.calls.change_shapes(self._handle, describe(tensors), self.inputs, OUTPUTS))

    def call(self, tensors: Sequence[Tensor], workspace: Tensor | None) -> "Call":
        """Return a call with its tensors bound, inputs first; they must live on."""
        return Call(self, tensors, workspace)

    def run(self, tensors: Sequence[Tensor], workspace: Tensor | None, stream: int = 0) -> None:
        """Change shapes and enqueue on a stream."""
        self.change_shapes(tensors)
        self.call(tensors, workspace)(stream)

    def _made(self, handle: int | None) -> "Plugin":
        return Plugin(self.library, self.op, handle)


class Call:
    """A call that can be made again and again: its arguments are made once, so that no Python is timed."""

    def __init__(self, plugin: Plugin, tensors: Sequence[Tensor], workspace: Tensor | None) -> None:
        self._plugin = plugin
        self._kept = (*tensors, workspace)
        self._arguments = (
            plugin._handle,
            describe(tensors),
            plugin.inputs,
            OUTPUTS,
            (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors)),
            None if workspace is None else workspace.data_ptr(),
        )

    def __call__(self, stream: int = 0) -> None:
        """Enqueue. Raises PluginError where the plugin returns a code."""
        self._plugin.library.check(self._plugin.library.calls.enqueue(*self._arguments, stream))


def describe(tensors: Sequence[Tensor | Shaped]) -> "ctypes.Array[_Tensor]":
    """Return what the C++ part takes: types, ranks, shapes."""
    found = (_Tensor * len(tensors))()
    for place, tensor in enumerate(tensors):
        dtype, shape = (tensor.dtype, tensor.shape) if isinstance(tensor, Tensor) else tensor
        found[place] = _Tensor(TYPES[dtype], len(shape), (c_int64 * 5)(*shape))
    return found
