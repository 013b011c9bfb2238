"""When the fused kernels run, and what holds for all of them on a GPU."""

import subprocess
import sys

import pytest
import torch

from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.kernels.layer import fused, gated_norm, glu_product, split_heads, srmsnorm

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from tnllm_export.kernels.layer import gated_norm, glu_product, split_heads, srmsnorm
x = torch.randn(2, 3, 64, requires_grad=True)
query, *_, gate = split_heads(x, 1)
total = (srmsnorm(x).sum() + gated_norm(gate, gate).sum() + glu_product(query, query).sum())
total.backward()
print(x.grad.shape[-1])
"""


def test_without_triton_everything_is_computed_in_pytorch():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.stdout == "64\n", done.stderr


@pytest.mark.usefixtures("triton")
def test_only_three_dtypes_are_fused(draw):
    assert fused(draw(1), draw(1, dtype=torch.float16), draw(1, dtype=torch.bfloat16))
    assert not fused(draw(1), draw(1, dtype=torch.float64))


@pytest.mark.usefixtures("triton")
def test_nothing_is_fused_where_pytorch_is_asked_for(draw):
    with use_kernels("pytorch"):
        assert not fused(draw(1))


@pytest.mark.gpu
@pytest.mark.slow
def test_rows_beyond_two_to_the_31_elements_are_found():
    rows, width = 2**31 // 2048 + 3, 2048
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    x[-3:] = torch.randn(3, width, device="cuda")
    last = x[-3:].clone()
    assert torch.equal(srmsnorm(x)[-3:], srmsnorm(last))
    assert torch.equal(gated_norm(x, x)[-3:], gated_norm(last, last))
    strided = x.view(-1)[: (rows - 1) // 4 * 4 * width].view(1, -1, 4 * width)
    tail = strided[:, -2:].clone()
    for found, expected in zip(split_heads(strided, 16), split_heads(tail, 16), strict=True):
        assert torch.equal(found[:, -2:], expected)
    gate = strided.chunk(4, dim=-1)[3]
    assert torch.equal(gated_norm(gate, gate)[:, -2:], gated_norm(gate[:, -2:], gate[:, -2:]))


@pytest.mark.gpu
def test_a_cuda_graph_repeats_both_directions(draw):
    projected = draw(2, 63, 8192, dtype=torch.bfloat16).requires_grad_()

    def step():
        query, key, value, gate = split_heads(projected, 16)
        mixed = gated_norm(gate, srmsnorm(value.flatten(2)))
        return torch.autograd.grad((glu_product(query, key).flatten(2) * mixed).sum(), projected)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        projected.copy_(draw(2, 63, 8192, dtype=torch.bfloat16, seed=1))
    graph.replay()
    assert captured.count_nonzero() > 0
    assert torch.equal(captured, step())
