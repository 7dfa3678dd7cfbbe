"""Counts that units keep of what clients do, where one process serves all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["LocalCount"]


class LocalCount:
    """A :class:`~nbdkitpy.SharedCount` of one process."""

    def __init__(self, on_zero: Callable[[], None] | None = None) -> None:
        self._on_zero = on_zero
        self._lock = threading.Lock()
        self._value = 0

    @property
    def value(self) -> int:
        """How many there are now."""
        return self._value

    def take(self, limit: int = 0) -> bool:
        """Count one more, unless there are `limit` already."""
        with self._lock:
            if limit and self._value >= limit:
                return False
            self._value += 1
            return True

    def give_back(self) -> None:
        """Count one less."""
        with self._lock:
            self._value -= 1
            is_zero = self._value == 0
        if is_zero and self._on_zero is not None:
            self._on_zero()
