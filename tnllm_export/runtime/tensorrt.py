"""TensorRT and TensorRT-RTX on a CUDA device: the engines that `tnllm build` put into a bundle.

The state stays on the device. A decode step writes it into a second set of buffers, from which the next step goes back
to the first; from the second time on, each of the two directions is one CUDA graph, where TensorRT allows it.

Not run yet: no GPU that TensorRT-RTX runs on, and no TensorRT, was at hand.
"""

import warnings
from collections.abc import Sequence
from typing import Self, cast

import torch
from safetensors import safe_open
from torch import Tensor

from tnllm_export.bundle import Bundle
from tnllm_export.bundle.engines import ProfileRecord
from tnllm_export.errors import ProfileError, RuntimeTargetError, TnllmWarning, UnsupportedTargetError
from tnllm_export.runtime.cuda_graphs import recover
from tnllm_export.runtime.engines import Gpu, check_fits, choose_engines, deserialize
from tnllm_export.runtime.gpu import no_gpu, on_device
from tnllm_export.runtime.protocol import RuntimeInfo, State
from tnllm_export.runtime.state import StateHandle, check_batch, check_handle, check_state_tensors
from tnllm_export.runtime.support import check_supported, weights_id
from tnllm_export.runtime.tensorrt_program import Context, Program
from tnllm_export.runtime.validation import check_decode, check_prefill
from tnllm_export.tensorrt import engine_target, import_tensorrt


class TensorrtRuntime:
    """Runs a pair of engines. Logits are returned on the host."""

    def __init__(
        self, info: RuntimeInfo, prefill: Program, decode: Program, profile: ProfileRecord, device: torch.device
    ) -> None:
        self._info = info
        self._prefill = prefill
        self._prefill_context = prefill.context()
        self._decode = decode
        self._profile = profile
        self._device = device

    @classmethod
    def from_bundle(
        cls, bundle: Bundle, *, name: str, device: str = "cuda", threads: int | None = None, key: str | None = None
    ) -> Self:
        """Load a bundle's engines.

        Args:
            bundle: A bundle with engines for this target.
            name: "tensorrt" or "tensorrt-rtx".
            device: "cuda": the current CUDA device.
            threads: Means nothing here.
            key: Which engines, by the name of their folder; default: those that were built last.

        Raises:
            RuntimeMissingError: TensorRT is not installed.
            UnsupportedTargetError: There is no CUDA device, or PyTorch can't use it.
            EngineMissingError: The bundle has no engines for this target.
            EngineMismatchError: They are damaged, of another version of TensorRT, or not for this GPU.
        """
        del threads
        check_supported(bundle, name, device)
        target = engine_target(name)
        trt = import_tensorrt(target)
        engines = choose_engines(bundle, name, key)
        gpu = current_gpu(name)
        check_fits(engines, target, trt.__version__, gpu)
        engines.check()
        place = torch.device("cuda", torch.cuda.current_device())
        weights: dict[str, Tensor] = {}
        if engines.spec.weights == "external":
            with safe_open(bundle.weights_path, framework="pt", device=str(place)) as file:
                weights = {stored: file.get_tensor(stored) for stored in file.keys()}  # noqa: SIM118 - no dict
        stream = torch.cuda.Stream(place)  # type: ignore[no-untyped-call]
        programs = [
            Program(
                trt,
                deserialize(trt, engines, program, graph),
                weights,
                stream,
                engines.kernel_cache(program, gpu.capability),
                captured=program == "decode",
            )
            for program, graph in (("prefill", bundle.prefill_path), ("decode", bundle.decode_path))
        ]
        info = RuntimeInfo(
            name=name,
            device="cuda",
            dtype=bundle.manifest.dtype,
            config=bundle.manifest.config,
            logits=bundle.manifest.logits,
            weights_id=weights_id(bundle),
        )
        profile = engines.spec.profile
        assert profile is not None, "engines are built for a profile"
        return cls(info, programs[0], programs[1], profile, place)

    @property
    def info(self) -> RuntimeInfo:
        """What is loaded."""
        return self._info

    def initial_state(self, batch: int) -> State:
        """Return the all-zero state of `batch` sequences."""
        check_batch(batch)
        return _DeviceState(self, [tensor.zero_() for tensor in self._empty_state(batch)])

    def prefill(self, input_ids: Tensor, lengths: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed input_ids [B, T]; see `Runtime.prefill`. Raises ProfileError where B or T is above the engine's."""
        vocab = self._info.config.vocab_size
        check_prefill(vocab, input_ids, lengths, positions)
        B, T = input_ids.shape
        check_profile(self._profile, B, T)
        past = check_handle(self, state, B).tensors
        with on_device(self._device):
            present = self._empty_state(B)
            logits = torch.empty((B, T, vocab) if self._info.logits == "all" else (B, vocab), device=self._device)
            inputs = {"input_ids": input_ids, "lengths": lengths, "positions": positions}
            placed = {name: _pinned(tensor).to(self._device, non_blocking=True) for name, tensor in inputs.items()}
            context = self._prefill_context
            context.bind(
                {**placed, **_named("past_state", past)}, {"logits": logits, **_named("present_state", present)}
            )
            current = torch.cuda.current_stream()
            self._prefill.stream.wait_stream(current)
            try:
                context.enqueue()
            finally:  # a part of it may run: nothing that is bound may go before
                current.wait_stream(self._prefill.stream)
            answer = logits.cpu()  # waits, so that what was bound may go
            self._prefill.save_cache()
        return answer, _DeviceState(self, present)

    def decode(self, input_ids: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed input_ids [B, 1] and consume `state`; see `Runtime.decode`. Raises ProfileError as prefill does."""
        check_decode(self._info.config.vocab_size, input_ids, positions)
        check_profile(self._profile, input_ids.shape[0], 1)
        handle = cast(_DeviceState, check_handle(self, state, input_ids.shape[0]))
        with on_device(self._device):
            steps = handle.steps or _DecodeSteps(self._decode, handle.tensors, self._info.config.vocab_size)
            logits = steps.run(handle.side, input_ids, positions)
        handle.consumed = True
        other = 1 - handle.side
        return logits, _DeviceState(self, steps.sides[other], steps, other)

    def host_state(self, state: State) -> list[Tensor]:
        """Copy a state to the host: one [B, H, K, V] float32 per layer."""
        return [tensor.to("cpu", copy=True) for tensor in check_handle(self, state, None).tensors]

    def device_state(self, tensors: list[Tensor]) -> State:
        """Copy host tensors into a new state."""
        check_state_tensors(self._info.config, tensors, torch.float32)
        return _DeviceState(self, [tensor.detach().contiguous().to(self._device, copy=True) for tensor in tensors])

    def _empty_state(self, batch: int) -> list[Tensor]:
        config = self._info.config
        shapes = (config.state_shape(layer, batch) for layer in range(config.decoder_layers))
        return [torch.empty(shape, device=self._device) for shape in shapes]


class _DeviceState(StateHandle):
    """A state that remembers the decode buffers it lies in, if any, and on which of their two sides."""

    __slots__ = ("side", "steps")

    def __init__(
        self, owner: object, tensors: Sequence[Tensor], steps: "_DecodeSteps | None" = None, side: int = 0
    ) -> None:
        super().__init__(owner, tensors)
        self.steps = steps
        self.side = side


class _DecodeSteps:
    """Two sets of state buffers and a context for each direction between them, made once per generation.

    A direction runs once as it is, which TensorRT asks for, and is captured into a CUDA graph the second time, where it
    can be. A graph is bound to the state of its context: nothing else may ever use that one.
    """

    def __init__(self, program: Program, past: Sequence[Tensor], vocab_size: int) -> None:
        B = past[0].shape[0]
        device = past[0].device
        self.sides = [list(past), [torch.empty_like(tensor) for tensor in past]]
        self._program = program
        self._contexts: list[Context | None] = [None, None]
        self._capturing = True
        self._graphs: list[torch.cuda.CUDAGraph | None] = [None, None]
        self._host_ids = torch.empty(B, 1, dtype=torch.int64, pin_memory=True)
        self._host_positions = torch.empty(B, dtype=torch.int64, pin_memory=True)
        self._host_logits = torch.empty(B, vocab_size, pin_memory=True)
        self._input_ids = torch.empty(B, 1, dtype=torch.int64, device=device)
        self._positions = torch.empty(B, dtype=torch.int64, device=device)
        self._logits = torch.empty(B, vocab_size, device=device)

    def run(self, side: int, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Step from the state on `side` to the other side; return logits [B, vocab]."""
        self._host_ids.copy_(input_ids)
        self._host_positions.copy_(positions)
        stream = self._program.stream
        stream.wait_stream(torch.cuda.current_stream())
        context = self._contexts[side]
        if context is not None and self._graphs[side] is None and self._capturing and context.capturable:
            self._graphs[side] = self._capture(context)
        graph = self._graphs[side]
        try:
            with torch.cuda.stream(stream):
                self._input_ids.copy_(self._host_ids, non_blocking=True)
                self._positions.copy_(self._host_positions, non_blocking=True)
                if graph is not None:
                    graph.replay()
                elif context is not None:
                    context.enqueue()
                else:
                    self._contexts[side] = self._first_run(side)
                self._host_logits.copy_(self._logits, non_blocking=True)
        finally:  # where it failed, a part of it may run: no buffer may go before
            stream.synchronize()
        return self._host_logits.clone()

    def _first_run(self, side: int) -> Context:
        context = self._program.context()
        context.bind(
            {"input_ids": self._input_ids, "positions": self._positions, **_named("past_state", self.sides[side])},
            {"logits": self._logits, **_named("present_state", self.sides[1 - side])},
        )
        context.enqueue()
        self._program.save_cache()
        return context

    def _capture(self, context: Context) -> torch.cuda.CUDAGraph | None:
        """Capture a step; None, with a warning, where that fails: steps then go on without a graph."""
        stream, graph, pool = self._program.stream, torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            # The first, since a capture that fails leaves its stream the current one. Other threads may allocate.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                context.enqueue()
        except (RuntimeError, RuntimeTargetError) as error:
            recover(self._logits.device, pool, stream)
            self._capturing = False
            warnings.warn(
                f"a decoded token could not be captured as a CUDA graph ({' '.join(str(error).split())[:300]}), so the "
                "host launches each and tokens take longer",
                TnllmWarning,
                stacklevel=4,
            )
            return None
        return graph


def current_gpu(name: str) -> Gpu:
    """Return the current CUDA device. Raises UnsupportedTargetError where there is none."""
    reason = no_gpu()
    if reason is not None:
        raise UnsupportedTargetError(
            f"{name} runs on NVIDIA GPUs, and {reason}; run where there is one, or use the runtime onnxruntime or torch"
        )
    major, minor = torch.cuda.get_device_capability()
    return Gpu(torch.cuda.get_device_name(), f"{major}.{minor}")


def check_profile(profile: ProfileRecord, batch: int, tokens: int) -> None:
    """Raise ProfileError where engines of this profile do not take so many sequences or tokens."""
    if batch > profile.max_batch:
        raise ProfileError(
            f"batch is {batch}; the engines take at most {profile.max_batch}: build again with --max-batch {batch}"
        )
    if tokens > profile.max_prompt:
        raise ProfileError(
            f"input_ids has {tokens} tokens; the engines take at most {profile.max_prompt} at once: feed it in pieces "
            f"(--prefill-chunk {profile.max_prompt}), or build again with --max-prompt {tokens}"
        )


def _named(prefix: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{layer}": tensor for layer, tensor in enumerate(tensors)}


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.contiguous().pin_memory()
