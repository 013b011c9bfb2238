"""What each target (runtime and device) can run, as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineTarget:
    """How a target's engines come to be.

    Attributes:
        module: The Python package that builds and runs them.
        extra: The extra of this package that installs it.
        needs_gpu: Whether a build needs the GPU that it is for.
        placeholders: Whether stripped engines are built without the weights, from their types and sizes.
        capabilities: Compute capabilities that an engine runs on where none are asked for.
        later: And every compute capability from this one on.
    """

    module: str
    extra: str
    needs_gpu: bool
    placeholders: bool = False
    capabilities: tuple[str, ...] = ()
    later: str | None = None

    @property
    def compute_capabilities(self) -> str:
        """What an engine runs on where none are asked for, as a phrase."""
        if self.later is None:
            return "that of the GPU it was built on"
        return f"{', '.join(self.capabilities)}, {self.later} and later"

    def runs_on(self, capability: str) -> bool:
        """Whether an engine that was built for no compute capability in particular runs on "8.6", say."""
        return capability in self.capabilities or (self.later is not None and float(capability) >= float(self.later))


@dataclass(frozen=True)
class Target:
    """Capabilities of one runtime on one device.

    Attributes:
        name: e.g. "onnxruntime-cpu".
        runtime: Name that `load_runtime` takes.
        device: "cpu" or "cuda".
        dtypes: Activation dtypes it runs.
        lowerings: Lowerings it runs, the preferred one first. Empty where the runtime needs no graph.
        max_opset: Newest ai.onnx opset it accepts, or None where that does not apply.
        engine: How its engines are built, or None where it has none.
        compiled: Whether it runs packages, which `tnllm build` compiles.
    """

    name: str
    runtime: str
    device: str
    dtypes: tuple[str, ...]
    lowerings: tuple[str, ...]
    max_opset: int | None = None
    engine: EngineTarget | None = None
    compiled: bool = False


# ONNX Runtime's own LinearAttention is about as fast, but rounds exp(-s) to float32 at every token: after 32k tokens
# the slowest heads are off by some 5e-4, where the matrix products stay below 1e-5 (docs/parity.md).
TARGETS: tuple[Target, ...] = (
    Target("torch-cpu", "torch", "cpu", ("float32", "float16", "bfloat16"), ()),
    Target("torch-cuda", "torch", "cuda", ("bfloat16", "float16", "float32"), ()),
    Target(
        "onnxruntime-cpu",
        "onnxruntime",
        "cpu",
        ("float32", "float16"),
        ("matmul", "contrib", "plugin", "hybrid"),
        max_opset=26,
    ),
    # Its CUDA kernel of LinearAttention is quick for one token, and walks a prompt token by token.
    Target(
        "onnxruntime-cuda",
        "onnxruntime",
        "cuda",
        ("float16", "bfloat16", "float32"),
        ("hybrid", "matmul", "contrib", "plugin"),
        max_opset=26,
    ),
    Target(
        "aotinductor-cpu",
        "aotinductor",
        "cpu",
        ("float32", "float16", "bfloat16"),
        (),
        compiled=True,
    ),
    Target(
        "aotinductor-cuda",
        "aotinductor",
        "cuda",
        ("float32", "float16", "bfloat16"),
        (),
        compiled=True,
    ),
    Target(
        "tensorrt-rtx",
        "tensorrt-rtx",
        "cuda",
        ("float16", "bfloat16", "float32"),
        ("matmul", "plugin"),
        engine=EngineTarget(
            "tensorrt_rtx",
            "tensorrt-rtx",
            needs_gpu=False,
            placeholders=True,
            capabilities=("8.0", "8.6", "8.9"),
            later="12.0",
        ),
    ),
    Target(
        "tensorrt",
        "tensorrt",
        "cuda",
        ("float16", "bfloat16", "float32"),
        ("matmul", "plugin"),
        engine=EngineTarget("tensorrt", "tensorrt", needs_gpu=True),
    ),
)
