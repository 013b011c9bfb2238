"""Who watches a call: a tracer, which must see one node for each op, or autograd, or nobody.

torch.library's Python wrappers take longer than a short kernel, so an op that nobody watches is called without them.
"""

import torch
from torch import Tensor

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def runs_untraced(*tensors: Tensor) -> bool:
    """Whether there is no tracer, no dispatch mode, no functorch transform and no tensor subclass."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN_TYPES:
            return False
    return tensors[0].is_cuda or tensors[0].is_cpu


# A loop, not any(): a generator takes longer than everything else here.
def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd has to know of a call on these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False
