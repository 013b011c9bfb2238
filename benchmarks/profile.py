"""What bounds the sweep, by Nsight Compute: `python -m benchmarks.profile FILE.csv` takes a profile into the results.

On the GPU machine (the counters need no particular clock):

    ncu --clock-control none --set full -k regex:sweep -c 5 --csv --page raw python -m benchmarks.profile > FILE.csv

With no file, the module runs what is profiled: forwards over batches that fill the device, over one long and two short
sequences, and over one with the states of a layer with LRPE.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.attention_cases import Shape, make_inputs
from benchmarks.names import CHIP, PROFILE
from benchmarks.records import RESULTS, Record, load, save
from tnllm_export.kernels.lightning_attention import lightning_attention

SHAPES = (
    Shape(4, 32, 8192),
    Shape(1, 32, 65536),
    Shape(1, 32, 4096),
    Shape(1, 32, 1024),
    Shape(1, 32, 16384, key_dim=256),
)
"""In bfloat16."""

METRICS = {
    "gpu__time_duration.sum": "time",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "tensor cores busy",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots used",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "memory bandwidth used",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "L2 bandwidth used",
    "dram__bytes_read.sum": "bytes read from memory",
    "dram__bytes_write.sum": "bytes written to memory",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps resident of the most",
    "launch__registers_per_thread": "registers per thread",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "waiting at barriers",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "waiting for memory or copies",
    "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio": "waiting for shared memory",
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": "waiting for arithmetic",
    "smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio": "waiting for the tensor cores",
    "smsp__average_warps_issue_stalled_mio_throttle_per_issue_active.ratio": "waiting for a full queue",
    "smsp__average_warps_issue_stalled_dispatch_stall_per_issue_active.ratio": "waiting for dispatch",
    "smsp__average_warps_issue_stalled_not_selected_per_issue_active.ratio": "ready, but not chosen",
}
"""Nsight Compute's names and what they mean; waits are warps per issued instruction."""


def records(file: Path, versions: dict[str, str]) -> Iterator[Record]:
    """Read the raw page of a profile, one kernel per shape: a row of names, one of units, then the values.

    `versions` are those of the GPU machine.
    """
    lines = [line for line in file.read_text().splitlines() if line.startswith('"')]
    header, units, *kernels = csv.reader(lines)
    if len(kernels) != len(SHAPES):
        raise ValueError(f"{file} has {len(kernels)} kernels; expected {len(SHAPES)}, one for each shape")
    for shape, values in zip(SHAPES, kernels, strict=True):
        for name, label in METRICS.items():
            if name in header:
                place = header.index(name)
                value = float(values[place].replace(",", ""))
                yield Record(PROFILE, str(shape), label, units[place], value, versions=versions)


def run_shapes() -> None:
    """Run each shape's forward once: what the profiler looks at."""
    for shape in SHAPES:
        inputs = make_inputs(shape, torch.bfloat16)
        states = (inputs.slope_rate, inputs.past_state, inputs.lengths)
        lightning_attention(inputs.query, inputs.key, inputs.value, *states)
    torch.cuda.synchronize()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        results = RESULTS / "nvidia-h200.json"
        chip = next(record for record in load(results) if record.name == CHIP)
        save(records(Path(sys.argv[1]), chip.versions), results)
    else:
        run_shapes()
