"""What bounds the sweep, by Nsight Compute: `python -m benchmarks.profile FILE.csv` takes a profile into the results.

On the GPU machine (the counters need no particular clock):

    ncu --clock-control none --set full -k regex:sweep -c 3 --csv --page raw python -m benchmarks.profile > FILE.csv

With no file, the module runs what is profiled: forwards over batches that fill the device, and over one long and
one short sequence.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.names import CHIP, PROFILE
from benchmarks.records import RESULTS, Record, load, save

SHAPES = ((4, 32, 8192), (1, 32, 65536), (1, 32, 4096))
"""B, H, T; K = V = 128, bfloat16."""

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
                case = ", ".join(str(size) for size in shape)
                yield Record(PROFILE, case, label, units[place], value, versions=versions)


def run_shapes() -> None:
    """Run each shape's forward once: what the profiler looks at."""
    import torch  # noqa: PLC0415

    from tnllm_export.kernels.lightning_attention import lightning_attention  # noqa: PLC0415

    for B, H, T in SHAPES:
        query, key, value = (torch.randn(B, T, H, 128, device="cuda").bfloat16() for _ in range(3))
        slope_rate = torch.tensor([0.5 * 2 ** (-8 * (h + 1) / H) for h in range(H)], device="cuda")
        past_state = torch.zeros(B, H, 128, 128, device="cuda")
        lengths = torch.full((B,), T, dtype=torch.int32, device="cuda")
        lightning_attention(query, key, value, slope_rate, past_state, lengths)
    torch.cuda.synchronize()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        results = RESULTS / "nvidia-h200.json"
        chip = next(record for record in load(results) if record.name == CHIP)
        save(records(Path(sys.argv[1]), chip.versions), results)
    else:
        run_shapes()
