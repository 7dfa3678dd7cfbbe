"""Two ways to the same end, of which the faster one is found out by trying."""

from __future__ import annotations

import time

__all__ = ["Ways"]

#: Bytes after which a look is taken at the time; much more than what is on its way to the client.
_WINDOW = 16 << 20

#: After so many windows in one way the other one is tried for one.
_WINDOWS_TO_TRIAL = 24

#: What takes longer, in seconds, was not limited by us.
_PAUSE = 1.0

#: What else the machine does makes a window slower, never faster. So the best one counts, and is forgotten slowly.
_FORGOTTEN = 0.9

#: By so much copying has to be faster, as it takes more of the processor's time.
_WORTH = 1.15


class Ways:
    """Whether reads of middle size are to be sent from the file or to be copied, for one client.

    Which is faster is the client's business: to send pages of a file costs the server less, but where the client's
    buffer does not begin with a page, some processors copy a page to it eight times more slowly (see
    :mod:`nbdkitpy.protocol.buffers`). So the rate at which the client takes its data is measured.
    """

    def __init__(self) -> None:
        self._from_file = True
        self._trying = False
        self._rates = {True: 0.0, False: 0.0}  # bytes per second, by whether they came from the file
        self._windows = _WINDOWS_TO_TRIAL - 1
        self._bytes = 0  # in this window
        self._begin = 0.0  # of it

    def from_file(self, length: int) -> bool:
        """Tell which way the next `length` bytes should go."""
        if not self._bytes:  # not before, when the client may have had nothing to ask for
            self._begin = time.perf_counter()
        self._bytes += length
        if self._bytes > _WINDOW:
            self._look(length)
        return self._from_file

    def _look(self, length: int) -> None:
        """End the window before the next `length` bytes, with which another one begins."""
        now = time.perf_counter()
        seconds, size = now - self._begin, self._bytes - length
        self._begin, self._bytes = now, length
        if seconds >= _PAUSE:
            return
        self._rates[self._from_file] = max(size / max(seconds, 1e-9), _FORGOTTEN * self._rates[self._from_file])
        self._windows += 1
        if self._trying:
            self._trying = False
            self._windows = 0
            self._from_file = self._rates[True] * _WORTH >= self._rates[False]
        elif self._windows >= _WINDOWS_TO_TRIAL:
            self._trying = True
            self._from_file = not self._from_file
