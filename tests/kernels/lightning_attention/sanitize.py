"""A short run of every kind of kernel, for NVIDIA's compute-sanitizer.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck python tests/kernels/lightning_attention/sanitize.py

and the same with `--tool racecheck` and `--tool synccheck`. Without the allocator's cache every tensor has its own
memory, so that an access beyond its end is seen. What racecheck reports of the kernel for Hopper is explained in
`docs/kernels.md`.
"""

from itertools import product

import torch

from tnllm_export.kernels.lightning_attention import lightning_attention, lightning_attention_step
from tnllm_export.kernels.lightning_attention.chunk import sweep
from tnllm_export.kernels.lightning_attention.launch import capability
from tnllm_export.kernels.lightning_attention.sweep_plan import Handover, SweepPlan, sweep_tiles

PLANS: dict[Handover, int] = {"none": 1, "recompute": 3, "lookback": 5}
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


def main() -> None:
    architecture = capability(torch.device("cuda", torch.cuda.current_device()))
    sizes = ((128, 128), (256, 128), (48, 80))
    for (name, dtype), (K, V), (handover, segments) in product(DTYPES.items(), sizes, PLANS.items()):
        tiles = sweep_tiles(K, V, name, architecture)  # type: ignore[arg-type]
        chunks = 10
        arguments = inputs(3, tiles[0].chunk * chunks - 5, 1, K, V, dtype)
        plan = SweepPlan(handover, segments)
        for tile, reverse in product(tiles, (False, True)):
            output, state = torch.empty_like(arguments[2]), torch.empty_like(arguments[4])
            sweep(*arguments, output, state, reverse=reverse, tile=tile, plan=plan)
            torch.cuda.synchronize()
            assert output.isfinite().all()
            assert state.isfinite().all()
        print(name, K, V, handover, flush=True)
    for dtype, (K, V) in product(DTYPES.values(), ((48, 80), (128, 128), (256, 128))):
        *activations, slope_rate, past_state, _ = inputs(3, 1, 2, K, V, dtype)
        lightning_attention_step(*(x[:, 0] for x in activations), slope_rate, past_state)
        leaves = [x.requires_grad_(i in (0, 1, 2, 4)) for i, x in enumerate(inputs(3, 300, 2, K, V, dtype))]
        output, state = lightning_attention(*leaves)
        (output.float().sum() + state.sum()).backward()
        torch.cuda.synchronize()
        print(dtype, K, V, "step and gradients", flush=True)


if __name__ == "__main__":
    main()
