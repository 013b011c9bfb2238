"""The few calls of the CUDA driver that launch a kernel which somebody else has compiled, by ctypes.

A launch that is prepared here costs the host a few microseconds. Triton's launcher takes several times as long: it
finds out anew what it is given.
"""

import ctypes
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

_MAP_BYTES, _MAP_ALIGNMENT = 128, 64  # of a CUtensorMap
_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CAPTURING = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE
_BFLOAT16, _SWIZZLE_128B, _NONE = 9, 3, 0  # of CUtensorMapDataType, CUtensorMapSwizzle, and of the others


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        *((f"grid_{axis}", ctypes.c_uint) for axis in "xyz"),
        *((f"block_{axis}", ctypes.c_uint) for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


@dataclass(frozen=True)
class TensorMap:
    """Where the copy engine finds blocks of a tensor: sizes and strides, but not the address.

    Attributes:
        sizes: From the innermost dimension on, which is dense.
        strides: In bytes, multiples of 16, from the second dimension on.
        block: Sizes of a block, from the innermost dimension on; that one has 128 bytes.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]

    def encode(self, address: int) -> "EncodedMap":
        """Encode the map of a bfloat16 tensor at an address, a multiple of 16. What lies outside reads as 0.

        Raises:
            RuntimeError: The driver refuses.
        """
        memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
        place = -(-ctypes.addressof(memory) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
        rank = len(self.sizes)
        _check(
            _driver().cuTensorMapEncodeTiled(
                ctypes.c_void_p(place),
                _BFLOAT16,
                ctypes.c_uint(rank),
                ctypes.c_void_p(address),
                (ctypes.c_uint64 * rank)(*self.sizes),
                (ctypes.c_uint64 * (rank - 1))(*self.strides),
                (ctypes.c_uint32 * rank)(*self.block),
                (ctypes.c_uint32 * rank)(*[1] * rank),
                _NONE,
                _SWIZZLE_128B,
                _NONE,
                _NONE,
            ),
            f"a tensor map of {self} at {address:#x}",
        )
        return EncodedMap(memory, place)


@dataclass(frozen=True)
class EncodedMap:
    """A tensor map as a kernel takes it, and the memory that it lies in."""

    memory: Any
    place: int


class _Thread(threading.local):
    """Whether a thread is known to have a context."""

    has_context = False


_thread = _Thread()


def use_context(device: int) -> None:
    """Make a device's context current in this thread if none is: autograd's threads begin without one.

    Raises:
        RuntimeError: The driver refuses.
    """
    if _thread.has_context:
        return
    driver, context, handle = _driver(), ctypes.c_void_p(), ctypes.c_int()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "asking for the current context")
    if not context.value:
        _check(driver.cuDeviceGet(ctypes.byref(handle), device), f"finding device {device}")
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), f"the context of device {device}")
        _check(driver.cuCtxSetCurrent(context), f"making the context of device {device} current")
    _thread.has_context = True


def load_function(code: bytes, entry: str, shared_bytes: int) -> int:
    """Load a kernel into the current context, which keeps it, and return its handle.

    Raises:
        RuntimeError: The driver refuses.
    """
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), code), f"loading {entry}")
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, entry.encode()), f"finding {entry}")
    _check(
        _driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes),
        f"{shared_bytes} bytes of shared memory for {entry}",
    )
    return int(function.value or 0)


def capture_of(stream: int) -> int:
    """Return the number of the CUDA graph that a stream is captured into, 0 if there is none.

    Raises:
        RuntimeError: The capture has failed.
    """
    status, number = ctypes.c_int(), ctypes.c_uint64()
    _check(
        _driver().cuStreamGetCaptureInfo_v2(
            ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
        ),
        "asking what a stream is captured into",
    )
    return number.value if status.value == _CAPTURING else 0


class PreparedLaunch:
    """A kernel with its grid and all arguments but addresses, to be launched many times, by one thread at a time.

    Args:
        function: Handle of the kernel.
        grid: Programs.
        threads: Of a program.
        shared_bytes: Dynamic shared memory of a program.
        parameters: Of the kernel in order: None for a tensor map, "" for an address, or a number.
    """

    def __init__(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        parameters: Sequence[int | str | None],
    ) -> None:
        self._function = ctypes.c_void_p(function)
        self._config = _LaunchConfig(*grid, threads, 1, 1, shared_bytes, None, None, 0)
        self._config_place = ctypes.byref(self._config)
        self._map_places = [place for place, value in enumerate(parameters) if value is None]
        addresses = [place for place, value in enumerate(parameters) if value == ""]
        self._addresses = (ctypes.c_uint64 * max(len(addresses), 1))()
        self._put_addresses = partial(struct.Struct(f"{len(addresses)}Q").pack_into, self._addresses, 0)
        # The driver reads as many bytes as a parameter has, the low ones first.
        self._numbers = (ctypes.c_int64 * max(len(parameters), 1))()
        self._places = [ctypes.addressof(self._numbers) + 8 * place for place in range(len(parameters))]
        for place, value in enumerate(parameters):
            if isinstance(value, int):
                self._numbers[place] = value
        for index, place in enumerate(addresses):
            self._places[place] = ctypes.addressof(self._addresses) + 8 * index
        self._launch = _driver().cuLaunchKernelEx

    def parameters(self, maps: Sequence[EncodedMap]) -> "Parameters":
        """Return what the kernel is given with these tensor maps, which are in the order of the parameters."""
        places = list(self._places)
        for place, tensor_map in zip(self._map_places, maps, strict=True):
            places[place] = tensor_map.place
        return Parameters((ctypes.c_void_p * len(places))(*places), tuple(maps))

    def __call__(self, parameters: "Parameters", addresses: Sequence[int], stream: int) -> None:
        """Launch it.

        Args:
            parameters: What `parameters` has returned for the tensor maps.
            addresses: The others, in the order of the parameters.
            stream: Handle of a stream.

        Raises:
            RuntimeError: The driver refuses.
        """
        self._put_addresses(*addresses)
        self._config.stream = stream
        result = self._launch(self._config_place, self._function, parameters.places, None)
        if result:
            _check(result, "launching a kernel")


class Parameters(NamedTuple):
    """Where the driver finds each parameter of a `PreparedLaunch`, and the tensor maps that lie there."""

    places: Any
    maps: tuple[EncodedMap, ...]


class PerThread(threading.local):
    """One object for each thread, which is made when it is first wanted."""

    def __init__(self) -> None:
        self.made: Any = None


@cache
def _driver() -> Any:
    # Its calls let other threads run Python: a launch blocks while the queue is full, perhaps with what waits for them.
    return ctypes.CDLL("libcuda.so.1")


def _check(result: int, what: str) -> None:
    if result == 0:
        return
    name = ctypes.c_char_p()
    _driver().cuGetErrorName(result, ctypes.byref(name))
    raise RuntimeError(f"{what}: the CUDA driver answered {(name.value or b'an unknown error').decode()} ({result})")
