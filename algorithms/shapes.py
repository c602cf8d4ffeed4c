"""Checks of shapes, so that nothing is broadcast by mistake: (N,) and (N, 1) would give an (N, N) loss.

None of them reads a value that is not on the CPU already, except ``require_offsets``.
"""

from __future__ import annotations

from torch import Tensor

from algorithms.errors import AlgorithmError, ShapeMismatch


def require_same_length(**vectors: Tensor) -> None:
    """Refuse tensors that are not all of one dimension and of one length.

    Raises:
        ShapeMismatch: with the shape of each.
    """
    shapes = {name: tuple(vector.shape) for name, vector in vectors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ShapeMismatch(f"expected vectors of one length, got {shapes}")


def require_offsets(offsets: Tensor, num_tokens: int) -> None:
    """Refuse offsets (N+1,) that do not rise from 0 to the number of tokens.

    Raises:
        ShapeMismatch: with where they begin and end.
    """
    if offsets.dim() != 1 or len(offsets) < 1:
        raise ShapeMismatch(f"offsets are (N + 1,), got shape {tuple(offsets.shape)}")
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != num_tokens or bool((offsets.diff() < 0).any()):
        raise ShapeMismatch(f"offsets go from {first} to {last}; they must rise from 0 to the {num_tokens} tokens")


def require_positive(denominator: float) -> None:
    """Refuse a denominator that would make a loss infinite, NaN or of the wrong sign.

    Raises:
        AlgorithmError: it is not above 0.
    """
    if not denominator > 0:
        raise AlgorithmError(f"a loss is divided by {denominator}; it must be a count of the global batch, above 0")
