"""Exports of 1B- and 7B-shaped checkpoints: peak memory, and time against copying the same files.

Both the copy and the export end with everything on the disk (fsync). They alternate, after one warm-up copy, and the
median counts. The export is `tnllm export`, from the start of its process to its end, so that its peak memory is its
own. It makes the graphs in two child processes: their peaks are added, as if no page were shared and all came at once.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.records import Record
from tnllm_export.export import export_bundle
from tnllm_export.models.checkpoint import expected_tensors
from tnllm_export.models.config import TransnormerConfig
from tnllm_export.progress import Progress, silent
from tnllm_export.runtime import Runtime, load_runtime

NAME = "scale"
MEMORY_LIMIT = 4 * 2**30
TIME_LIMIT = 4.0
AGREEMENT_LIMIT = 1e-4

SHAPES = {
    "1B": {"decoder_embed_dim": 2048, "decoder_layers": 16, "decoder_attention_heads": 16, "glu_dim": 5632},
    "7B": {"decoder_embed_dim": 4096, "decoder_layers": 30, "decoder_attention_heads": 32, "glu_dim": 11008},
}
SHARDS = {"1B": 2, "7B": 3}

_EXPORT = r"""
import atexit, pathlib, re, resource, sys
from tnllm_export.cli.main import main

def print_peak():
    # Of itself not getrusage: its maximum outlives exec, so it would be that of the process which started this one.
    own = int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
    largest_child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(own + 2 * largest_child)

atexit.register(print_peak)
main()
"""


def run(progress: Progress = silent, rounds: int = 3) -> list[Record]:
    """Measure both sizes, as `.bin` shards and as safetensors shards, and run the smaller one."""
    with tempfile.TemporaryDirectory(prefix="tnllm-scale-", dir=os.environ.get("TNLLM_BENCH_DIR")) as folder:
        records = _measure_agreement(Path(folder), progress)
        for size in SHAPES:
            for kind in ("bin", "safetensors"):
                records += _measure(size, kind, Path(folder), rounds, progress)
    return records


def make_checkpoint(folder: Path, size: str, kind: str) -> None:
    """Write a random bfloat16 checkpoint of a released shape, in shards with an index."""
    fields = {"vocab_size": 64000, "model_type": "transnormer", "torch_dtype": "bfloat16", **SHAPES[size]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    shapes = expected_tensors(TransnormerConfig.model_validate(fields))
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    shard: dict[str, Tensor] = {}
    shards: list[dict[str, Tensor]] = []
    weight_map, filled = {}, 0
    name_of = (lambda n: f"pytorch_model-{n:05}.bin") if kind == "bin" else (lambda n: f"model-{n:05}.safetensors")
    for name, tensor in _random_weights(shapes):
        shard[name] = tensor
        weight_map[name] = name_of(len(shards) + 1)
        filled += tensor.numel()
        if filled >= total * (len(shards) + 1) / SHARDS[size]:
            path = folder / name_of(len(shards) + 1)
            if kind == "bin":
                torch.save(shard, path)
            else:
                save_file(shard, path, metadata={"format": "pt"})
            shards.append({})
            shard = {}
    index = "pytorch_model.bin.index.json" if kind == "bin" else "model.safetensors.index.json"
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 2 * total}, "weight_map": weight_map}))


def copy_durably(source: Path, target: Path) -> float:
    """Copy a folder's files and put them on the disk; return the seconds."""
    start = time.perf_counter()
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


def export(checkpoint: Path, output: Path) -> tuple[float, int]:
    """Run `tnllm export`; return its seconds, from start to end of its process, and its peak resident bytes."""
    arguments = ["export", str(checkpoint), "--output", str(output), "--dtype", "bfloat16", "--overwrite", "--json"]
    start = time.perf_counter()
    answer = subprocess.run([sys.executable, "-c", _EXPORT, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - start, int(answer.stdout.splitlines()[-1]) * 1024


def _measure(size: str, kind: str, folder: Path, rounds: int, progress: Progress) -> list[Record]:
    case = f"{size}, bfloat16, .{kind} shards"
    checkpoint, copied, bundle = folder / "checkpoint", folder / "copy", folder / "bundle"
    make_checkpoint(checkpoint, size, kind)
    copy_durably(checkpoint, copied)
    shutil.rmtree(copied)
    copies, exports, peaks = [], [], []
    for done in range(rounds):
        progress(case, done, rounds, "rounds")
        copies.append(copy_durably(checkpoint, copied))
        shutil.rmtree(copied)
        seconds, peak = export(checkpoint, bundle)
        shutil.rmtree(bundle)
        exports.append(seconds)
        peaks.append(peak)
    progress(case, rounds, rounds, "rounds")
    shutil.rmtree(checkpoint)
    copy_seconds = statistics.median(copies)
    return [
        Record(NAME, case, "export time", "s", statistics.median(exports), floor=TIME_LIMIT * copy_seconds,
               peer="copy of the files, fsync included", peer_value=copy_seconds),
        Record(NAME, case, "peak resident memory", "GiB", max(peaks) / 2**30, floor=MEMORY_LIMIT / 2**30),
    ]  # fmt: skip


def _measure_agreement(folder: Path, progress: Progress) -> list[Record]:
    """Prefill 128 tokens and decode 16 with a float32 bundle on ONNX Runtime, beside the eager model."""
    case = "1B, float32, ONNX Runtime CPU against eager"
    checkpoint = folder / "checkpoint"
    make_checkpoint(checkpoint, "1B", "bin")
    progress(case, 0, 3, "steps")
    bundle = export_bundle(checkpoint, folder / "bundle", dtype="float32")
    shutil.rmtree(checkpoint)
    answers = []
    for done, name in enumerate(("onnxruntime", "torch"), start=1):
        progress(case, done, 3, "steps")
        answers.append(_answer(load_runtime(bundle, name)))
    progress(case, 3, 3, "steps")
    shutil.rmtree(bundle.path)
    return [
        Record(NAME, case, f"relative error, {what}", "1", ((found - expected).norm() / expected.norm()).item(),
               floor=AGREEMENT_LIMIT)
        for what, found, expected in zip(("logits after prefill of 128", "logits of 16 decoded tokens", "final states"),
                                         *answers, strict=True)
    ]  # fmt: skip


def _answer(runtime: Runtime) -> tuple[Tensor, Tensor, Tensor]:
    """Logits after a prefill of 128 tokens, logits of 16 decoded ones, and all states at the end."""
    ids = torch.randint(3, runtime.info.config.vocab_size, (1, 144), generator=torch.Generator().manual_seed(0))
    start, lengths = torch.zeros(1, dtype=torch.int64), torch.tensor([128], dtype=torch.int32)
    first, state = runtime.prefill(ids[:, :128], lengths, start, runtime.initial_state(1))
    decoded = []
    for position in range(128, 144):
        logits, state = runtime.decode(ids[:, position : position + 1], torch.tensor([position]), state)
        decoded.append(logits)
    return first, torch.stack(decoded), torch.cat([layer.flatten() for layer in runtime.host_state(state)])


def _random_weights(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Normal weights, drawn from one long stretch of random numbers at ever other places: drawing 7B takes minutes."""
    pool = (torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    offset = 0
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        offset = (offset + 7919) % 4096
        tensor = pool[offset:].repeat(numel // (pool.numel() - offset) + 1)[:numel].clone()
        yield name, (tensor.abs() + 0.001 if name.endswith("theta") else tensor).reshape(shape)
