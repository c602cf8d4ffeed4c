"""What can be wrong with what comes in. Every message says where, what, and what would be right."""

from __future__ import annotations


class DataError(ValueError):
    """The data, or a tokenizer for them, cannot be used as configured."""


class ReadError(DataError):
    """A file, folder, URL or hub name cannot be read."""


class FormatError(DataError):
    """The columns of a source are not of a known format."""


class RowError(DataError):
    """One row is not of its format. The message starts with ``file:line``."""


class TooLongError(DataError):
    """A row has more tokens than ``max_tokens``, and ``too_long`` is ``refuse``."""


class EmptyDataError(DataError):
    """Nothing is left to train or to evaluate on. The message has the counts."""


class TokenizerError(DataError):
    """The tokenizer cannot be loaded, or lacks what the data need of it: EOS, or a chat template."""
