"""Statistics of a batch that tell whether learning is well."""

from __future__ import annotations

from torch import Tensor

from algorithms.shapes import require_same_length


def explained_variance(values_T: Tensor, returns_T: Tensor) -> Tensor:
    """``1 - var(returns - values) / var(returns)``, a scalar: how much of the returns the critic foresaw.

    1 is a perfect critic (up to a constant), 0 one that might as well say the mean, below 0 a harmful one. Where
    returns do not vary there is nothing to foresee, and it is 0.

    Raises:
        ShapeMismatch: lengths differ.
    """
    require_same_length(values=values_T, returns=returns_T)
    spread = returns_T.var(correction=0)
    unexplained = (returns_T - values_T).var(correction=0)
    return (1 - unexplained / spread).where(spread > 0, 0)
