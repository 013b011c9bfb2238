"""Ops go past torch.library only where nobody has to see them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tnllm_export.kernels.dispatch import use_kernels
from tnllm_export.kernels.layer import gated_norm, split_heads, srmsnorm
from tnllm_export.kernels.tracing import needs_gradient, runs_untraced

pytest.importorskip("triton")


class Names(TorchDispatchMode):
    """Notes the ops that come by."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


CALLS = {
    "tnllm.srmsnorm.default": srmsnorm,
    "tnllm.gated_norm.default": lambda x: gated_norm(x, x),
    "tnllm.split_heads.default": lambda x: split_heads(x.unsqueeze(0), 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_dispatch_mode_sees_the_op(device, name):
    with use_kernels("triton"), torch.no_grad(), Names() as names:
        CALLS[name](torch.randn(3, 32, device=device))
    assert name in names.seen


@pytest.mark.parametrize("name", CALLS)
def test_autograd_records_the_op(device, name):
    x = torch.randn(3, 32, device=device, requires_grad=True)
    with use_kernels("triton"):
        found = CALLS[name](x)
        (found if isinstance(found, torch.Tensor) else found[0]).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", CALLS)
def test_the_bits_are_those_of_the_op(device, name):
    x = torch.randn(3, 32, device=device)
    with use_kernels("triton"):
        direct, recorded = CALLS[name](x), CALLS[name](x.clone().requires_grad_())
    pairs = [(direct, recorded)] if isinstance(direct, torch.Tensor) else zip(direct, recorded, strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)


def test_who_watches(device):
    x = torch.randn(2, device=device)
    assert runs_untraced(x)
    assert not runs_untraced(x, torch.empty(2, device="meta").as_subclass(type("Own", (torch.Tensor,), {})))
    assert not runs_untraced(torch.empty(2, device="meta"))
    assert not torch.func.vmap(lambda row: torch.tensor(runs_untraced(row)))(x.unsqueeze(0)).any()
    assert needs_gradient(x, x.clone().requires_grad_())
    with torch.no_grad():
        assert not needs_gradient(x.clone().requires_grad_())
