r"""Mathematics in ``\boxed{}``, compared as mathematics by math-verify.

Whoever calls this must have a deadline: a term may take sympy for ever. math-verify's own one, which is a signal, is
off.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

_BOXES = (r"\boxed", r"\fbox")


def boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{}`` (or ``\fbox{}``) of a text; none where there is none, or it is left open.

    >>> boxed(r"so \boxed{1} or rather \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start = max(text.rfind(mark) for mark in _BOXES)
    if start < 0:
        return None
    opening = text.find("{", start)
    if opening < 0 or text[start:opening].strip() not in _BOXES:
        return None
    depth = 0
    for at in range(opening, len(text)):
        if text[at] in "{}" and text[at - 1] != "\\":
            depth += 1 if text[at] == "{" else -1
            if not depth:
                return text[opening + 1 : at]
    return None


def load() -> None:
    """Load what a comparison needs, and have it build its tables: seconds, which would count for the first one."""
    assert same_mathematics(parsed("1"), parsed(r"\frac{2}{2}")), "math-verify knows that 2/2 is 1"


def parsed(text: str, bare: bool = True) -> list[Any]:
    """The terms that math-verify finds; empty where it finds none.

    Args:
        bare: the text is nothing but LaTeX, without dollars.
    """
    # Here, because only this checker needs it: it loads sympy.
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at each call that its deadline is off
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: list[Any] = parse(rf"\boxed{{{text}}}" if bare else text, parsing_timeout=None)
    return found


def same_mathematics(wanted: list[Any], given: list[Any]) -> bool:
    """Whether two terms are the same, numbers to six decimals."""
    from math_verify import verify

    return bool(verify(wanted, given, timeout_seconds=None))
