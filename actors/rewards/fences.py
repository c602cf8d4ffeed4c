"""Blocks between lines of three backticks."""

from __future__ import annotations

import re

_FENCE = re.compile(r"^```[^\n`]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)


def last_fenced(text: str) -> str | None:
    r"""What stands in the last block of a text, or none.

    >>> last_fenced("so:\n```python\nx = 1\n```\nfine")
    'x = 1\n'
    """
    blocks = _FENCE.findall(text)
    return str(blocks[-1]) if blocks else None
