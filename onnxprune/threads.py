"""Threads that share work, also work that wants to share some of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


class Workers:
    """A `map` on some threads.

    What runs on one of them and calls `map` again does that work itself: waiting for the others could last for ever, and they
    have enough to do.
    """

    def __init__(self, count: int) -> None:
        self.count = max(1, count)
        self._inside = threading.local()
        self._pool = ThreadPoolExecutor(self.count, initializer=self._enter) if self.count > 1 else None

    def _enter(self) -> None:
        self._inside.here = True

    def map(self, work: Callable[[A], B], items: Iterable[A]) -> Iterable[B]:
        """work(item) for every item, in their order. The first exception is raised."""
        if self._pool is None or getattr(self._inside, "here", False):
            return map(work, items)
        return self._pool.map(work, items)
