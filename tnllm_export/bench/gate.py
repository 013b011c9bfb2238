"""Nothing is timed before it has answered as the eager model does, in the same process."""

from dataclasses import dataclass
from typing import cast

import torch
from safetensors import safe_open

from tnllm_export.bench.records import Parity
from tnllm_export.bundle import DTYPES, Bundle
from tnllm_export.errors import DeviceMemoryError, ParityError
from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.models.modeling import parameter_dtype
from tnllm_export.progress import Progress
from tnllm_export.runtime import Runtime, RuntimeInfo, TorchRuntime
from tnllm_export.runtime.ahead import RunsAhead
from tnllm_export.runtime.torch import model_over
from tnllm_export.verify import Workload
from tnllm_export.verify.cases import Case
from tnllm_export.verify.judge import judge, subject_of
from tnllm_export.verify.parity import fresh_seed, make_cases, run_candidate, run_eager
from tnllm_export.verify.records import worst
from tnllm_export.verify.tolerances import tolerance
from tnllm_export.verify.trace import Trace

WORKLOAD = Workload(lengths=(1, 65), decoded=8, greedy=8, piece=50)
"""A short form of what `verify` compares: the same checks and limits."""


@dataclass(frozen=True)
class Truth:
    """The eager model's answers, computed once for all runtimes.

    Attributes:
        where: The device that computed them.
        seed: Of the random token ids.
        cases: What was fed.
        eager: Answers of the model in the bundle's dtype.
        exact: Those in float32, where the dtype is another.
    """

    where: torch.device
    seed: int
    cases: list[Case]
    eager: list[Trace]
    exact: list[Trace] | None

    @property
    def reference(self) -> str:
        """Name what it is, for a report."""
        return f"eager PyTorch model on {self.where.type}, in plain PyTorch operators"


def compute_truth(bundle: Bundle, device: torch.device, progress: Progress) -> Truth:
    """Run the eager model without Triton kernels or CUDA graphs; on the CPU where the GPU's memory does not suffice."""
    try:
        return _truth(bundle, device, progress)
    except (DeviceMemoryError, torch.OutOfMemoryError):
        return _truth(bundle, torch.device("cpu"), progress)


def check_parity(bundle: Bundle, runtime: Runtime, lowering: str | None, truth: Truth, progress: Progress) -> Parity:
    """Compare a loaded runtime with the eager model."""
    answers = run_candidate(runtime, truth.cases, progress)
    subject = subject_of(runtime.info, lowering=lowering, bundle=bundle.path.resolve().name)
    report = judge(subject, truth.cases, answers, truth.eager, truth.exact, seed=truth.seed, seconds=0.0)
    try:
        report.require_pass()
    except ParityError as error:
        reason = str(error)
    else:
        reason = "" if agrees_ahead(runtime) else f"{runtime.info.name}: steps ahead choose other tokens than calls"
    error_of_logits = worst(item.relative for item in report.logits)
    return Parity(not reason, error_of_logits, tolerance(subject.dtype).logits, reason)


def agrees_ahead(runtime: Runtime, batch: int = 1, tokens: int = 12) -> bool:
    """Whether a runtime that runs ahead chooses the likeliest tokens behind its logits; true of one that does not."""
    if not runtime.info.runs_ahead:
        return True
    first, zeros = torch.arange(3, 3 + batch)[:, None], torch.zeros(batch, dtype=torch.int64)
    ids, state, expected = first, runtime.initial_state(batch), []
    for position in range(tokens):
        logits, state = runtime.decode(ids, zeros + position, state)
        ids = logits.argmax(-1, keepdim=True).cpu()
        expected.append(ids[:, 0].tolist())
    ahead = cast(RunsAhead, runtime)
    step, state = ahead.decode_ahead(first, zeros, runtime.initial_state(batch))
    steps = [step]
    for _ in range(tokens - 1):
        step, state = ahead.decode_ahead(None, None, state)
        steps.append(step)
    return [step.wait()[0] for step in steps] == expected


def _truth(bundle: Bundle, device: torch.device, progress: Progress) -> Truth:
    manifest = bundle.manifest
    info = RuntimeInfo("torch", device.type, manifest.dtype, manifest.config, manifest.logits)
    seed = fresh_seed()
    cases = make_cases(info, seed, WORKLOAD, (), "")
    with use_kernels("pytorch"):
        eager = run_eager(_eager(bundle, manifest.dtype, device), cases, progress)
        exact = None if manifest.dtype == "float32" else run_eager(_eager(bundle, "float32", device), cases, progress)
    return Truth(device, seed, cases, eager, exact)


def _eager(bundle: Bundle, dtype: str, device: torch.device) -> Runtime:
    with safe_open(bundle.weights_path, framework="pt", device=str(device)) as file:
        tensors = {
            name: file.get_tensor(name).to(parameter_dtype(name, DTYPES[dtype]))
            for name in file.keys()  # noqa: SIM118 - the handle is no dict
        }
    model = model_over(bundle.manifest.config, tensors, device)
    return TorchRuntime(model, logits=bundle.manifest.logits, capture=None)
