"""Finding NaN and infinity in weights, and casting them without making any."""

import torch
from torch import Tensor

from tnllm_export.errors import NonFiniteWeightsError


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    The extremes tell: NaN wins every comparison in `aminmax`, and an infinity is one of them. This reads memory at
    full speed and allocates nothing, where `isfinite().all()` makes a mask and is forty times slower in bfloat16.
    """
    if tensor.numel() == 0 or not tensor.dtype.is_floating_point:
        return True
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite()) and bool(high.isfinite())


def check_cast(name: str, source: Tensor, cast: Tensor) -> None:
    """Check what became of a weight, or a piece of it, that was cast.

    Args:
        name: The tensor's name, for the message.
        source: Values as the checkpoint holds them.
        cast: The same values in the dtype that is kept. May be `source` itself.

    Raises:
        NonFiniteWeightsError: The source holds NaN or infinity, or a finite value left the range of the cast's dtype.
    """
    if is_finite(cast):
        return
    bad = int((~source.isfinite()).sum())
    if bad:
        kinds = "NaN" if bool(source.isnan().any()) else "infinite"
        raise NonFiniteWeightsError(
            f"{name}: holds {kinds} values ({bad} of the {source.numel()} last read); expected finite weights, "
            "restore the file or take an earlier training step"
        )
    found = f"{float(source.abs().max()):g}"
    kept = str(cast.dtype).removeprefix("torch.")
    raise NonFiniteWeightsError(
        f"{name}: holds {found}, which is too large for {kept} (at most {torch.finfo(cast.dtype).max:g}); "
        "use float32 or bfloat16"
    )
