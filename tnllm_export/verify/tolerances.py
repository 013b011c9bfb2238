"""Every tolerance of the parity checks, per dtype, with its reason."""

from dataclasses import dataclass

from tnllm_export.errors import UnsupportedTargetError


@dataclass(frozen=True)
class Tolerance:
    """Limits for one activation dtype.

    Attributes:
        logits: Largest relative error ‖x - r‖ / ‖r‖ of the logits of any position.
        state: Largest relative error of any layer's state of any row.
        kl: Largest KL divergence of any position, in nats.
        excess: How much further from the float32 eager model than the eager model of the same dtype the runtime may
            be (root mean square over everything compared). None for float32, which is that model.
    """

    logits: float
    state: float
    kl: float
    excess: float | None


TOLERANCES: dict[str, Tolerance] = {
    # The project's promise is 1e-5 on the golden data. Summation order is all that differs, about 1e-7 per product,
    # and it grows with depth and with the length of the sums: 2e-6 is usual (16 layers, 257 tokens).
    # A runtime that multiplies its state by a rounded decay for each token is off by up to 2^-25 per token, always
    # to the same side: over the 289 tokens of the workload that adds up to 0.9e-5, in the slowest heads.
    # KL is quadratic in the error: with logits of size about 10, 1e-5 of them is 1e-4, and its square 1e-8.
    "float32": Tolerance(logits=1e-5, state=2e-5, kl=1e-8, excess=None),
    # One rounding is 4.9e-4 (2^-11); every layer rounds some ten times and the residual stream adds them up. Where a
    # runtime rounds (after each node, or once per fused group) is its own choice, so two correct ones differ by as
    # much as each differs from float32. The excess is the sharp limit, this one bounds single positions.
    "float16": Tolerance(logits=2e-2, state=2e-2, kl=1e-3, excess=1.5),
    # As float16 with a rounding of 3.9e-3 (2^-8), eight times as large; KL goes with its square.
    "bfloat16": Tolerance(logits=1.6e-1, state=1.6e-1, kl=6.4e-2, excess=1.5),
}

TIE_DEVIATIONS = 8.0
"""A greedy choice may differ where the gap between first and second is up to this many times tolerance.logits times the
root mean square of the logits. An error of just the tolerance, spread evenly, has that as standard deviation in each
logit, the gap of two has √2 times it: 8 are 5.7 deviations, and a larger gap turns by a bug only."""


def tolerance(dtype: str) -> Tolerance:
    """Return the limits for an activation dtype. Raises UnsupportedTargetError for one that has none."""
    if dtype not in TOLERANCES:
        raise UnsupportedTargetError(f"no parity tolerance for dtype {dtype}; expected one of {', '.join(TOLERANCES)}")
    return TOLERANCES[dtype]
