"""A map on threads that may call itself."""

from __future__ import annotations

import threading

import pytest

from onnxprune.threads import Workers


def test_order_and_threads() -> None:
    meet = threading.Barrier(3)

    def work(i: int) -> tuple[int, str]:
        meet.wait(timeout=60)  # three at a time, or never
        return i, threading.current_thread().name

    found = list(Workers(3).map(work, range(6)))
    assert [i for i, _ in found] == list(range(6))
    assert threading.current_thread().name not in {name for _, name in found}


def test_work_of_work_is_done_where_it_is_asked_for() -> None:
    """With as many waiting as there are threads, others would never come to it."""
    workers = Workers(2)

    def outer(i: int) -> list[bool]:
        here = threading.current_thread()
        return list(workers.map(lambda _: threading.current_thread() is here, range(i)))

    assert list(workers.map(outer, [3] * 8)) == [[True] * 3] * 8


def test_one_thread_is_the_caller() -> None:
    here = threading.current_thread()
    assert all(Workers(1).map(lambda _: threading.current_thread() is here, range(3)))


@pytest.mark.parametrize("count", [1, 2])
def test_errors_arrive(count: int) -> None:
    with pytest.raises(ZeroDivisionError):
        list(Workers(count).map(lambda i: 1 / i, [1, 0]))
