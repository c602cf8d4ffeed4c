"""A clean stop: the first Ctrl-C or SIGTERM asks for a checkpoint and an end, the second ends at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether somebody asked the run to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        """A stop was asked for."""
        return self.signal is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of the signals for the time of the ``with`` block.

        The second signal raises ``KeyboardInterrupt`` wherever the process is.
        """
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        # Written as it stands: a handler may interrupt whoever holds the terminal.
        os.write(2, b"\nstopping after this step, with a checkpoint; the same again ends at once\n")
