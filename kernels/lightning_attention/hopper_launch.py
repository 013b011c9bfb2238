"""Compiling and launching the kernels for Hopper, `sweep_hopper.py` and `backward_hopper.py`.

Their tensor maps are parameters that the host encodes: a map that a program makes for itself takes it most of a
microsecond, and memory. A map depends on sizes, strides and address, so it is kept for the addresses that come again.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from tnllm_export.kernels.cuda_driver import (
    EncodedMap,
    Parameters,
    PerThread,
    PreparedLaunch,
    TensorMap,
    load_function,
    use_context,
)

CHUNK = 64
BLOCK_COLUMNS = 64
"""A block of a tensor map: so many tokens of one head, and so many columns."""

KEPT_MAPS = 128
"""Addresses of one argument whose maps are kept."""

KEPT_PARAMETERS = 256
"""Addresses of all arguments together that a launch, in one thread, keeps parameters for."""

_MAPS = ("query", "key", "value", "output", "grad_output", "grad_query", "grad_key", "grad_value")
_BFLOAT16 = ("p_output", "p_grad_query", "p_grad_key", "p_grad_value")
_INT32 = ("p_lengths", "p_progress")
_MAP_NUMBERS = 8
"""Sizes and strides, which Triton passes along with a map of four dimensions, and which these kernels do not read."""


def compile_hopper(kernel: Any, constants: dict[str, Any]) -> tuple[Any, list[str]]:
    """Compile a kernel for compute capability 9.0, without a GPU.

    Args:
        kernel: `sweep_hopper_kernel` or `backward_hopper_kernel`.
        constants: Values of its constants, and of strides that are known.

    Returns:
        What Triton made, and the names of the compiled kernel's parameters in order: "query_map" for the map of a
        tensor and "unused" for what is not read, "p_" left out of those of addresses.
    """
    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.experimental.gluon._runtime import GluonASTSource  # noqa: PLC0415

    names = kernel.arg_names
    copied = _copied_at_once(constants)
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in _MAPS:
            signature[name] = _map_type(copied.get(name, BLOCK_COLUMNS))
        else:
            signature[name] = _type(name)
    # What is read and written in vectors.
    aligned = [name for name in names if name in (*_BFLOAT16, "p_carry") or name.startswith("output_stride")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constants}
    source = GluonASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()},
                            attributes)  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    return compiled, parameters_of(kernel, constants)


def parameters_of(kernel: Any, constants: dict[str, Any]) -> list[str]:
    """Return the second result of `compile_hopper`, which needs no compiler."""
    parameters: list[str] = []
    for name in kernel.arg_names:
        if name in _MAPS:
            parameters += [f"{name}_map", *["unused"] * _MAP_NUMBERS]
        elif name not in constants:
            parameters.append(name.removeprefix("p_"))
    return [*parameters, "scratch", "profile_scratch"]


def _copied_at_once(constants: dict[str, Any]) -> dict[str, int]:
    """Columns that a program copies by one instruction, of tensors that it reads: one or more blocks of the map."""
    of_values = 2 * BLOCK_COLUMNS // constants["PARTS"]
    if "SWEEPS" in constants:
        # Each tensor is the rows of one sweep and the values of another.
        shared = min(constants["V"], of_values)
        return dict.fromkeys(("query", "key", "value", "grad_output"), shared)
    return {"query": constants["K"], "key": constants["K"], "value": of_values}


def _map_type(columns: int) -> str:
    layout = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)"
    return f"tensordesc<bf16[1, {CHUNK}, 1, {columns}],{layout}>"


def _type(name: str) -> str:
    if name.startswith("p_"):
        return "*bf16" if name in _BFLOAT16 else "*i32" if name in _INT32 else "*fp32"
    # From one sequence of a batch to the next may be more than 2^31 elements.
    return "i64" if name.endswith(("_stride_b", "_stride_h")) else "i32"


def map_of(shape: Sequence[int], strides: Sequence[int]) -> TensorMap:
    """Return the tensor map of bfloat16 activations [B, T, H, D], with strides in elements."""
    *sizes, columns = shape
    # No stride is followed along a dimension of one place, but the driver wants it valid.
    steps = [2 * (columns if size == 1 else stride) for size, stride in zip(sizes, strides, strict=False)]
    return TensorMap((columns, *sizes[::-1]), tuple(steps[::-1]), (BLOCK_COLUMNS, 1, CHUNK, 1))


class KernelUnavailable(Exception):  # noqa: N818
    """This Triton's Gluon is not one that the kernels for Hopper are written for."""


class HopperLaunch:
    """One launch of a kernel, for all tensors of the same sizes and strides on one device.

    Args:
        kernel: `sweep_hopper_kernel` or `backward_hopper_kernel`.
        constants: Its constants by name.
        grid: Programs.
        maps: Tensor maps of the activations, in order.
        numbers: Arguments that are numbers, by name.
        device: Where it runs.

    Raises:
        ValueError: A state's rows or columns are too far apart.
    """

    def __init__(
        self,
        kernel: Any,
        constants: dict[str, Any],
        grid: tuple[int, int, int],
        maps: Sequence[TensorMap],
        numbers: dict[str, int],
        device: torch.device,
    ) -> None:
        far = {name: value for name, value in numbers.items() if _type(name) == "i32" and value >= 1 << 31}
        if far:
            raise ValueError(f"found {far}; expected steps of fewer than 2^31 numbers: make the state contiguous")
        known = {name: 1 for name, value in numbers.items() if value == 1 and name.endswith(("_stride_k", "_stride_v"))}
        self._arguments = (kernel, tuple((constants | known).items()), device)
        self._grid = grid
        self._maps = maps
        self._encoded: list[dict[int, EncodedMap]] = [{} for _ in maps]
        self._numbers = numbers
        self._device_index = device.index
        self._prepared = PerThread()

    def __call__(self, activations: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Launch it on the current stream of its device, which is current.

        Args:
            activations: Tensors of the maps, in order. Their addresses are multiples of 16.
            others: Tensors of the other addresses, in order.

        Raises:
            KernelUnavailable: The kernel can't be compiled.
        """
        use_context(self._device_index)
        prepared = self._prepared.made
        if prepared is None:
            prepared = self._prepared.made = self._prepare()
        launch, known = prepared
        addresses = tuple([tensor.data_ptr() for tensor in activations])
        parameters = known.get(addresses)
        if parameters is None:
            if len(known) >= KEPT_PARAMETERS:
                known.clear()
            parameters = known[addresses] = launch.parameters(self._encode(addresses))
        stream = torch._C._cuda_getCurrentRawStream(self._device_index)
        launch(parameters, [tensor.data_ptr() for tensor in others], stream)

    def _prepare(self) -> tuple[PreparedLaunch, dict[tuple[int, ...], Parameters]]:
        function, threads, shared_bytes, names = _loaded(*self._arguments)
        parameters = [_parameter(name, self._numbers) for name in names]
        return PreparedLaunch(function, self._grid, threads, shared_bytes, parameters), {}

    def _encode(self, addresses: tuple[int, ...]) -> list[EncodedMap]:
        maps = []
        for kept, tensor_map, address in zip(self._encoded, self._maps, addresses, strict=True):
            encoded = kept.get(address)
            if encoded is None:
                if len(kept) >= KEPT_MAPS:
                    kept.clear()
                encoded = kept[address] = tensor_map.encode(address)
            maps.append(encoded)
        return maps


def _parameter(name: str, numbers: dict[str, int]) -> int | str | None:
    if name.endswith("_map"):
        return None
    if name in numbers:
        return numbers[name]
    return 0 if name in ("unused", "scratch", "profile_scratch") else ""


@lru_cache(maxsize=256)
def _loaded(
    kernel: Any, constants: tuple[tuple[str, Any], ...], device: torch.device
) -> tuple[int, int, int, list[str]]:
    """Return handle, threads, shared memory and parameters of a compiled kernel on a device, which is current."""
    compiled, names = _compiled(kernel, constants)
    metadata = compiled.metadata
    function = load_function(compiled.asm["cubin"], metadata.name, metadata.shared)
    return function, 32 * metadata.num_warps, metadata.shared, names


@cache
def _compiled(kernel: Any, constants: tuple[tuple[str, Any], ...]) -> tuple[Any, list[str]]:
    try:
        return compile_hopper(kernel, dict(constants))
    except Exception as error:  # of many kinds, from Triton's own to LLVM's
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise KernelUnavailable(f"Triton could not compile it ({lines[-1]})") from error
