"""Who watches a call: a tracer, which must see one node for each op, or autograd, or nobody.

torch.library's Python wrappers take longer than a short kernel, so an op that nobody watches is called without them.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_TRANSFORMS = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Vmap)


def compiles() -> bool:
    """Whether torch.compile or torch.export reads the program instead of running it."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()


def runs_untraced(*tensors: Tensor) -> bool:
    """Whether there is no tracer, no dispatch mode, no functorch transform, no tensor subclass and no lazy negation.

    Raises:
        NotImplementedError: A tensor has a tangent, which neither kernels nor torch.library's ops would pass on.
    """
    if compiles():
        return False
    if forward_ad._current_level >= 0:
        _refuse_tangents(*tensors)
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN_TYPES or tensor.is_neg():
            return False
    return tensors[0].is_cuda or tensors[0].is_cpu


def runs_transformed() -> bool:
    """Whether torch.func differentiates or maps what runs, and nobody traces it."""
    if compiles():
        return False
    transform = torch._C._functorch.peek_interpreter_stack()
    return transform is not None and transform.key() in _TRANSFORMS


# A loop, not any(): a generator takes longer than everything else here.
def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd has to know of a call on these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False


def _refuse_tangents(*tensors: Tensor) -> None:
    for tensor in tensors:
        if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(
                "found a tensor with a tangent (torch.func.jvp, jacfwd, forward_ad); this op has derivatives in "
                "reverse mode alone: use torch.func.vjp, grad or jacrev"
            )
