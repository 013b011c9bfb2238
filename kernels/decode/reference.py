"""What `linear` computes, in plain PyTorch: the truth that its kernels are tested against."""

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tnllm_export.kernels.decode.linear import Heads
from tnllm_export.kernels.decode.plan import Input, Output
from tnllm_export.kernels.layer.heads import split_heads_pytorch
from tnllm_export.kernels.layer.norm import srmsnorm_pytorch


def linear_pytorch(
    x: Tensor,
    weight: Tensor,
    output: Tensor,
    *,
    before: Input = "plain",
    after: Output = "store",
    other: Tensor | None = None,
    weight_2: Tensor | None = None,
    heads: Heads | None = None,
    positions: Tensor | None = None,
) -> None:
    """Compute what `linear` computes, each step rounded to the dtype of the tensors."""
    if before == "norm":
        x = srmsnorm_pytorch(x, x.dtype)
    elif before == "gate":
        assert other is not None
        x = x * srmsnorm_pytorch(other, other.dtype)
    mapped = F.linear(x, weight)
    if after == "residual":
        output += mapped
    elif after == "product":
        assert weight_2 is not None
        output.copy_(mapped * F.linear(x, weight_2))
    elif after == "heads":
        assert heads is not None
        times = None if positions is None else positions[:, None]
        query, key, value, gate = split_heads_pytorch(mapped[:, None], heads.count, heads.theta, times)
        for to, part in ((output, query), (heads.key, key), (heads.value, value), (heads.gate, gate)):
            to.copy_(part.reshape(to.shape))
    else:
        output.copy_(mapped)
