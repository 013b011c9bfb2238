"""How far a decoded state drifts from float64 over 32,768 tokens, for the slowest and fastest heads of a 7B model.

Every form is fed the same q, k, v: rounded to the activations' dtype and then held exactly. The float64 reference uses
the decay rates as float64 numbers of the same value. Beside our float32 state: a plain S exp(-s) + k vᵀ in float32,
ONNX Runtime's LinearAttention, and a float16 state, which is what runtimes keep that give it the activations' dtype.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from benchmarks.records import Record
from tnllm_export.graphs.lowerings import LOWERINGS
from tnllm_export.graphs.passes.set_opset import SetOpset
from tnllm_export.graphs.pipeline import DOMAINS
from tnllm_export.kernels.contract import LIGHTNING_ATTENTION_STEP, NAMESPACE, OPSET_VERSION
from tnllm_export.kernels.lightning_attention import lightning_attention_step
from tnllm_export.models.decay import slope_rates
from tnllm_export.progress import Progress, silent

NAME = "drift"
TOKENS = 32768
LIMIT = 1e-4
LAYERS, HEADS = 30, 32

Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Drift:
    """Relative error of the state, ‖S − S64‖ / ‖S64‖, of one head in one form after some tokens."""

    activations: str
    form: str
    head: str
    tokens: int
    error: float


def extreme_rates() -> dict[str, float]:
    """The largest and smallest decay rates of the first and last layer of the released 7B model."""
    rates = {}
    for name, layer in (("first", 0), ("last", LAYERS - 1)):
        layer_rates = slope_rates("release", layer, LAYERS, HEADS)
        rates[f"{name} layer, fastest"] = layer_rates.max().item()
        rates[f"{name} layer, slowest"] = layer_rates.min().item()
    return rates


def measure(
    activations: torch.dtype,
    *,
    tokens: int = TOKENS,
    width: int = 64,
    forms: tuple[str, ...] = ("decode step", "matmul lowering", "contrib lowering", "exp(-s) S + kv", "float16 state"),
    progress: Progress = silent,
) -> Iterator[Drift]:
    """Decode `tokens` tokens in every form and yield the errors at each power of two.

    Args:
        activations: Dtype of q, k and v.
        tokens: How many.
        width: K and V.
        forms: Which forms.
        progress: Told of the tokens.
    """
    heads = extreme_rates()
    slope_rate = torch.tensor(list(heads.values()), dtype=torch.float32)
    steps = {form: _forms(form, len(heads), width) for form in forms}
    states = {form: torch.zeros(1, len(heads), width, width) for form in forms}
    reference = torch.zeros(1, len(heads), width, width, dtype=torch.float64)
    decay = torch.exp(-slope_rate.double())[:, None, None]
    generator = torch.Generator().manual_seed(0)
    checkpoints = {2**n for n in range(tokens.bit_length())} | {tokens}
    label = str(activations).removeprefix("torch.")
    for token in range(1, tokens + 1):
        # As the model has them: SiLU on queries and keys; then rounded to the activations' dtype.
        drawn = torch.randn(3, 1, len(heads), width, generator=generator)
        drawn[:2] = torch.nn.functional.silu(drawn[:2])
        q, k, v = drawn.to(activations)
        reference = decay * reference + k.double()[..., :, None] * v.double()[..., None, :]
        for form, step in steps.items():
            states[form] = step(q, k, v, slope_rate, states[form])[1]
        if token in checkpoints:
            progress(f"drift, {label}", token, tokens, "tokens")
            for form, state in states.items():
                for index, head in enumerate(heads):
                    exact = reference[0, index]
                    error = ((state[0, index].double() - exact).norm() / exact.norm()).item()
                    yield Drift(label, form, head, token, error)


def run(progress: Progress = silent) -> list[Record]:
    """Measure with float32 and bfloat16 activations."""
    return [
        Record(
            name=NAME,
            case=f"{drift.activations} activations | {drift.form} | {drift.head} | {drift.tokens}",
            metric="relative error of the state",
            unit="1",
            value=drift.error,
            floor=LIMIT,
        )
        for activations in (torch.float32, torch.bfloat16)
        for drift in measure(activations, progress=progress)
    ]


def _forms(form: str, heads: int, width: int) -> Step:
    if form == "decode step":
        return lightning_attention_step
    if form == "exp(-s) S + kv":
        return _plain
    if form == "float16 state":
        return lambda *inputs: (inputs[0], _plain(*inputs)[1].half().float())
    return _onnx_runtime(form.removesuffix(" lowering"), heads, width)


def _plain(query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    update = key.float()[..., :, None] * value.float()[..., None, :]
    return query, torch.exp(-slope_rate)[:, None, None] * state + update


def _onnx_runtime(lowering: str, heads: int, width: int) -> Step:
    """The decode step in a lowering, run by ONNX Runtime in float32."""
    contract = LIGHTNING_ATTENTION_STEP
    tokens, state = ["B", heads, width], ["B", heads, width, width]
    shapes = dict.fromkeys((*contract.inputs, *contract.outputs), tokens)
    shapes |= {"slope_rate": [heads], "past_state": state, "present_state": state}
    values = {
        name: ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, shape in shapes.items()
    }
    outputs = [values[name] for name in contract.outputs]
    node = ir.Node(NAMESPACE, contract.onnx_name, [values[name] for name in contract.inputs], outputs=outputs)
    imports = {"": LOWERINGS[lowering].opset, NAMESPACE: OPSET_VERSION}
    model = ir.Model(ir.Graph(node.inputs, outputs, nodes=[node], opset_imports=imports, name="step"), ir_version=10)
    LOWERINGS[lowering].lower(model)
    SetOpset(LOWERINGS[lowering].opset, DOMAINS)(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1  # the tensors are small: handing them around costs more than computing
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)

    def step(query: Tensor, key: Tensor, value: Tensor, slope_rate: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        tensors = (query.float(), key.float(), value.float(), slope_rate, past)
        feeds = {name: np.asarray(tensor) for name, tensor in zip(contract.inputs, tensors, strict=True)}
        output, present = session.run(None, feeds)
        return torch.from_numpy(output), torch.from_numpy(present)

    return step
