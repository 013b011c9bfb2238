"""What each target (runtime and device) can run, as data."""

from dataclasses import dataclass


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
    """

    name: str
    runtime: str
    device: str
    dtypes: tuple[str, ...]
    lowerings: tuple[str, ...]
    max_opset: int | None = None


# ONNX Runtime's own LinearAttention is about as fast, but rounds exp(-s) to float32 at every token: after 32k tokens
# the slowest heads are off by some 5e-4, where the matrix products stay below 1e-5 (docs/parity.md).
TARGETS: tuple[Target, ...] = (
    Target("torch-cpu", "torch", "cpu", ("float32", "float16", "bfloat16"), ()),
    Target(
        "onnxruntime-cpu", "onnxruntime", "cpu", ("float32", "float16"), ("matmul", "contrib", "plugin"), max_opset=26
    ),
)
