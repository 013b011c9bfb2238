"""A short run of every kind of kernel, for NVIDIA's compute-sanitizer.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck python tests/kernels/lightning_attention/sanitize.py

and the same with `--tool racecheck` and `--tool synccheck`. Without the allocator's cache every tensor has its own
memory, so that an access beyond its end is seen. Racecheck takes half a minute for each kernel for Hopper: name what
to run ("float32", "bfloat16 128x128", "bfloat16 128x128 lookback", …; all by default) to several processes at once.
What it reports of these kernels is explained in `docs/kernels.md`.
"""

import sys
from itertools import product

import torch

from tnllm_export.kernels.lightning_attention import lightning_attention, lightning_attention_step
from tnllm_export.kernels.lightning_attention.chunk import sweep
from tnllm_export.kernels.lightning_attention.launch import capability
from tnllm_export.kernels.lightning_attention.sweep_plan import Handover, SweepPlan, sweep_tiles

PLANS: dict[Handover, int] = {"none": 1, "recompute": 3, "lookback": 5}
GRADIENTS = "step and gradients"
PARTS = (*PLANS, GRADIENTS)
CHUNKS = 10
SIZES = ((128, 128), (256, 128), (48, 80))
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def inputs(B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [
        torch.randn(B, T, H, K, device="cuda").to(dtype),
        torch.randn(B, T, H, K, device="cuda").to(dtype),
        torch.randn(B, T, H, V, device="cuda").to(dtype),
        torch.logspace(-3, 0, H, device="cuda"),
        torch.randn(B, H, K, V, device="cuda"),
        torch.tensor([T, 0, T // 2 + 1], dtype=torch.int32, device="cuda")[:B],
    ]


def main(chosen: list[str]) -> None:
    runs = {f"{name} {K}x{V} {part}": (name, K, V, part) for name, (K, V), part in product(DTYPES, SIZES, PARTS)}
    wanted = [run for run in runs if not chosen or any(run.startswith(words) for words in chosen)]
    if not wanted:
        sys.exit(f"found {', '.join(chosen)}; there are: {', '.join(runs)}")
    for run in wanted:
        name, K, V, part = runs[run]
        if part == GRADIENTS:
            _step_and_gradients(DTYPES[name], K, V)
        else:
            _sweep(name, K, V, SweepPlan(part, PLANS[part]))
        print(run, flush=True)


def _sweep(name: str, K: int, V: int, plan: SweepPlan) -> None:
    architecture = capability(torch.device("cuda", torch.cuda.current_device()))
    tiles = sweep_tiles(K, V, name, architecture)  # type: ignore[arg-type]
    arguments = inputs(3, tiles[0].chunk * CHUNKS - 5, 1, K, V, DTYPES[name])
    for tile, reverse in product(tiles, (False, True)):
        output, state = torch.empty_like(arguments[2]), torch.empty_like(arguments[4])
        sweep(*arguments, output, state, reverse=reverse, tile=tile, plan=plan)
        torch.cuda.synchronize()
        assert output.isfinite().all()
        assert state.isfinite().all()


def _step_and_gradients(dtype: torch.dtype, K: int, V: int) -> None:
    *activations, slope_rate, past_state, _ = inputs(3, 1, 2, K, V, dtype)
    lightning_attention_step(*(x[:, 0] for x in activations), slope_rate, past_state)
    leaves = [x.requires_grad_(i in (0, 1, 2, 4)) for i, x in enumerate(inputs(3, 300, 2, K, V, dtype))]
    output, state = lightning_attention(*leaves)
    (output.float().sum() + state.sum()).backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
