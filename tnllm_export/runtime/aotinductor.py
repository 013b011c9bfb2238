"""AOTInductor packages on the CPU and on CUDA: what `tnllm build --target aotinductor` put into a bundle.

Both packages read one copy of the bundle's weights, memory-mapped on the CPU. On CUDA, decode updates the state in
place and runs as a CUDA graph.
"""

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from tnllm_export.bundle import DTYPES, Bundle
from tnllm_export.bundle.engines import CONSTANTS, PACKAGE_SUFFIX, EngineSet, engines_of, host_device, is_current
from tnllm_export.bundle.native_code import libraries_with_own_standard_library
from tnllm_export.errors import EngineMismatchError, EngineMissingError, RuntimeTargetError
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.runtime.aotinductor_constants import bundle_name, check_constants, free_memory
from tnllm_export.runtime.decode_graphs import DecodeGraphs, GraphState
from tnllm_export.runtime.device_memory import reporting_out_of_memory
from tnllm_export.runtime.gpu import current_gpu, on_device
from tnllm_export.runtime.graph_runtime import GraphRuntime
from tnllm_export.runtime.protocol import RuntimeInfo, State
from tnllm_export.runtime.state import check_handle, state_shapes, zero_state
from tnllm_export.runtime.support import check_supported, weights_id
from tnllm_export.runtime.validation import check_prefill

NAME = "aotinductor"


class AotInductorRuntime(GraphRuntime):
    """Runs a pair of packages. Logits stay on the device."""

    def __init__(self, info: RuntimeInfo, prefill: "Package", decode: "Package", device: torch.device) -> None:
        graphs: DecodeGraphs | None = None
        if device.type == "cuda":
            graphs = DecodeGraphs(_Facts(info.config, device), make_step=lambda _: self._step_in_place)
        super().__init__(info, device, graphs, _Facts.state_dtype)
        self._prefill = prefill
        self._decode = decode

    @classmethod
    def from_bundle(cls, bundle: Bundle, *, device: str = "cpu", threads: int | None = None) -> Self:
        """Load a bundle's packages for this machine's CPU or the current CUDA device: those that were built last.

        `threads` is PyTorch's own setting and holds for the whole process.

        Raises:
            UnsupportedTargetError: There is no CUDA device.
            EngineMissingError: The bundle has no packages for the device.
            EngineMismatchError: They are damaged, of another PyTorch, or for another CPU or GPU; or a weight is not of
                the model's shape and dtype.
            DeviceMemoryError: The weights do not fit into the GPU's memory.
        """
        check_supported(bundle, NAME, device)
        place, found = _place(device)
        packages = choose_packages(bundle, device)
        check_fits(packages, torch.__version__, found)
        packages.check()
        if threads is not None:
            torch.set_num_threads(threads)
        constants: dict[str, Tensor] = {}
        way_out = "free it for others' work, or load the bundle with --device cpu"
        with reporting_out_of_memory(place, f"{bundle.path}: loading the weights", way_out):
            for path in (bundle.weights_path, packages.path / CONSTANTS):
                with safe_open(path, framework="pt", device=str(place)) as file:
                    constants |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        manifest = bundle.manifest
        check_constants(constants, manifest.config, DTYPES[manifest.dtype], str(bundle.weights_path))
        info = RuntimeInfo(
            name=NAME,
            device=device,
            dtype=manifest.dtype,
            config=manifest.config,
            logits=manifest.logits,
            weights_id=weights_id(bundle),
            runs_ahead=place.type == "cuda",
        )
        runtime = cls(
            info, Package(packages, "prefill", constants, place), Package(packages, "decode", constants, place), place
        )
        if place.type == "cuda":
            # PyTorch never gives back its references to tensors that it was told not to manage. (On the CPU they are
            # mappings of files, which cost no memory.)
            weakref.finalize(runtime, free_memory, list(constants.values())).atexit = False
        return runtime

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, lengths: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed input_ids [B, T]; see `Runtime.prefill`. Raises DeviceMemoryError where T is too large for the GPU."""
        check_prefill(self._info.config.vocab_size, input_ids, lengths, positions)
        B, T = input_ids.shape
        handle = check_handle(self, state, B)
        way_out = "feed the prompt in smaller pieces (--prefill-chunk)"
        with on_device(self._device), reporting_out_of_memory(self._device, f"prefill of {B} x {T} tokens", way_out):
            inputs = [tensor.to(self._device).contiguous() for tensor in (input_ids, lengths, positions)]
            logits, *present = self._prefill.run([*inputs, *handle.tensors])
        return logits, GraphState(self, present)

    def _decode_uncaptured(
        self, input_ids: Tensor, positions: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        logits, *present = self._decode.run([input_ids.contiguous(), positions.contiguous(), *past])
        return logits, present

    def _step_in_place(self, input_ids: Tensor, positions: Tensor, state: list[Tensor]) -> Tensor:
        (logits,) = self._decode.run([input_ids, positions, *state])
        return logits


class Package:
    """One compiled program over weights that others may use too; they are kept alive here."""

    def __init__(
        self, packages: EngineSet, program: str, constants: Mapping[str, Tensor], device: torch.device
    ) -> None:
        """Load a package.

        Args:
            packages: The pair that it is of.
            program: "prefill" or "decode".
            constants: Weights and decay rates by their names in the bundle, on the device and of the shapes and dtypes
                that were compiled: nothing below looks at them.
            device: Where it runs; a CUDA device with its index.

        Raises:
            EngineMismatchError: PyTorch refuses it or would crash, or it needs a weight that there is not.
        """
        self._device = device
        self._path = packages.path / f"{program}{PACKAGE_SUFFIX}"
        if libraries_with_own_standard_library(self._path):
            raise EngineMismatchError(
                f"{self._path}: its code has a C++ standard library of its own, linked statically, and would crash "
                f"this process; build again with `tnllm build --target {NAME} --device {device.type}`"
            )
        way_out = "; build again with `tnllm build`"
        with self._naming_the_package("refuses it", EngineMismatchError, way_out), on_device(device):
            self._loader = _load(str(self._path), device)
            names = {name: bundle_name(name, constants) for name in self._loader.get_constant_fqns()}
            self._constants = {name: constants[stored] for name, stored in names.items()}
            # Into use at once; all of them; kept by us.
            self._loader.load_constants(self._constants, False, True, True)

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """Run on contiguous tensors of the package's device, in the program's order.

        Raises:
            torch.OutOfMemoryError: The GPU's memory does not suffice.
            RuntimeTargetError: Something else failed.
        """
        refused = _refused_allocations(self._device)
        try:
            outputs: list[Tensor] = self._loader.run(inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if _refused_allocations(self._device) > refused:  # native code says only that a call failed
                raise torch.OutOfMemoryError(_first_line(error)) from error
            raise RuntimeTargetError(f"{self._path}: failed: {_first_line(error)}") from error
        return outputs

    @contextlib.contextmanager
    def _naming_the_package(self, what: str, kind: type[Exception], way_out: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, KeyError, OSError) as error:
            raise kind(f"{self._path}: torch {torch.__version__} {what} ({_first_line(error)}){way_out}") from error


class _Facts:
    """What the graphs of decode have to know of a model."""

    state_dtype = torch.float32

    def __init__(self, config: TransnormerConfig, device: torch.device) -> None:
        self.config = config
        self.device = device

    def initial_state(self, batch: int) -> list[Tensor]:
        """Return the all-zero state of each layer, [B, H, K, V]."""
        return zero_state(state_shapes(self.config), batch, self.state_dtype, self.device)


def choose_packages(bundle: Bundle, device: str) -> EngineSet:
    """Return the packages of a bundle for "cpu" or "cuda" that were built last.

    Raises:
        EngineMissingError: There are none, or none for the model that the bundle has.
    """
    build = f"build some with `tnllm build {bundle.path} --target {NAME} --device {device}`"
    found = [item for item in engines_of(bundle.path) if item.spec.target == NAME and _kind(item) == device]
    if not found:
        raise EngineMissingError(f"{bundle.path}: no {NAME} packages for {device}; {build}")
    current = [item for item in found if is_current(item, bundle.manifest)]
    if not current:
        raise EngineMissingError(f"{bundle.path}: its {NAME} packages were built from another model; {build}")
    return max(current, key=lambda item: (item.path.stat().st_mtime_ns, item.spec.key))


def check_fits(packages: EngineSet, version: str, device: str) -> None:
    """Check version and device before native code does, which would crash or speak of symbols.

    Args:
        packages: What shall run.
        version: Of PyTorch.
        device: What is here: "cpu (AVX2)" or "NVIDIA H200 (9.0)". Of a GPU, only the architecture has to be the same.

    Raises:
        EngineMismatchError: The packages are for another one.
    """
    spec = packages.spec
    way_out = f"build again with `tnllm build --target {NAME} --device {_kind(packages)}`"
    if spec.version != version:
        raise EngineMismatchError(
            f"{packages.path}: built with torch {spec.version}; {version} is installed: {way_out}"
        )
    if _architecture(spec.device) != _architecture(device):
        raise EngineMismatchError(f"{packages.path}: built for {spec.device}; this is {device}: {way_out}")


def _kind(packages: EngineSet) -> str:
    return "cpu" if packages.spec.device.startswith("cpu (") else "cuda"


def _architecture(device: str) -> str:
    return device.rpartition("(")[2]


def _place(device: str) -> tuple[torch.device, str]:
    """Return where to run, and its name as packages record it."""
    if device == "cpu":
        return torch.device("cpu"), host_device()
    gpu = current_gpu(NAME)
    major, minor = torch.cuda.get_device_capability()
    return gpu, f"{torch.cuda.get_device_name()} ({major}.{minor})"


def _load(path: str, device: torch.device) -> Any:
    """Load a package, to be run without locks between threads: those could not be captured.

    `torch._inductor.aoti_load_package` does this, too, but first compiles programs to see what this CPU has, which may
    take a minute, and parses argument trees call after call.
    """
    index = -1 if device.index is None else device.index
    return torch._C._aoti.AOTIModelPackageLoader(path, "model", True, 1, index)


def _refused_allocations(device: torch.device) -> int:
    """Count the allocations that a GPU's memory did not suffice for, since the process began."""
    return int(torch.cuda.memory_stats_as_nested_dict(device)["num_ooms"]) if device.type == "cuda" else 0


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
