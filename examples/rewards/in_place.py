"""A reward function, for `function.yaml`."""

from __future__ import annotations


def share_in_place(response: str, answer: str) -> float:
    """The share of the answer's words that the response has in their places.

    >>> share_in_place(" 4 9 31 25", "4 9 12 25 31")
    0.4
    """
    wanted, given = answer.split(), response.split()
    return sum(a == b for a, b in zip(wanted, given, strict=False)) / max(len(wanted), len(given))
