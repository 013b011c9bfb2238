"""Embedding, norms and the recurrent step of one token against PyTorch and against the step op's own kernel."""

import pytest
import torch

pytest.importorskip("triton")

from tnllm_export.kernels.decode.recurrence import recurrence
from tnllm_export.kernels.decode.rows import embed, normalise
from tnllm_export.kernels.layer.norm import srmsnorm_pytorch
from tnllm_export.kernels.lightning_attention.step_kernel import step

pytestmark = pytest.mark.usefixtures("triton")


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@pytest.mark.parametrize("d", [1, 72, 1500])
@pytest.mark.parametrize("scale", [1.0, 8.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_embed_takes_scaled_rows(device, d, scale, dtype):
    table = draw(11, d, dtype=dtype, device=device)
    ids = torch.tensor([[10], [0], [7]], device=device)
    output = torch.full((3, d), float("nan"), dtype=dtype, device=device)
    embed(ids, table, scale, output)
    assert torch.equal(output, (table[ids[:, 0]].float() * scale).to(dtype))


@pytest.mark.parametrize("d", [1, 72, 257])
@pytest.mark.parametrize("gated", [False, True])
def test_normalise_agrees_with_float64(device, d, gated):
    x, other = draw(5, d, device=device), draw(5, d, device=device, seed=1)
    output = torch.full_like(x, float("nan"))
    normalise(x, output, other=other if gated else None)
    wide = x.double()
    right = wide * srmsnorm_pytorch(other.double(), torch.float64) if gated else srmsnorm_pytorch(wide, torch.float64)
    assert (output - right).norm() < 1e-6 * right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 2, 40, 20), (3, 1, 32, 16)])
def test_recurrence_computes_the_step_kernel_in_place(device, shape, dtype):
    B, H, K, V = shape
    query, key = (draw(B, H, K, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    value, past = draw(B, H, V, dtype=dtype, device=device, seed=3), draw(*shape, device=device, seed=4)
    rates = torch.logspace(-7, 0.5, H).to(device)
    output, expected = (torch.full_like(value, float("nan")) for _ in range(2))
    present = torch.full_like(past, float("nan"))
    step(query, key, value, rates, past, expected, present)
    state = past.clone()
    recurrence(query, key, value, rates, state, output)
    # But for where the compiler fuses a product with a sum.
    assert (state - present).norm() <= 2e-7 * present.norm()
    rounded = torch.finfo(dtype).eps
    assert (output - expected).float().norm() <= 2 * rounded * expected.float().norm()
    assert not torch.equal(state, past)
