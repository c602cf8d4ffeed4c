"""What can go wrong in the algorithms: one tree of errors. Imports no torch."""

from __future__ import annotations


class AlgorithmError(ValueError):
    """Base of every error of this package: an argument that makes no sense, named with what would."""


class ShapeMismatch(AlgorithmError):
    """Tensors that belong together differ in shape, or offsets do not cover what they cut."""
