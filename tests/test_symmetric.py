"""Symmetric matrices of which one triangle is computed, against NumPy on all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxprune.recovery.symmetric import BLOCK, Factors, add_square, inverse, mirror, subtract_outer

Array = np.ndarray[Any, Any]
SIZES = [1, 7, BLOCK, 2 * BLOCK + 3]


def definite(size: int, least: float = 1e-2) -> Array:
    x = np.random.default_rng(size).standard_normal((2 * size, size))
    return np.asarray(x.T @ x / size + least * np.eye(size))


@pytest.mark.parametrize("size", SIZES)
def test_triangles_make_the_whole(size: int) -> None:
    x = np.random.default_rng(0).standard_normal((50, size)).astype(np.float32)
    total = np.zeros((size, size))
    add_square(total, x)
    add_square(total, 2 * x)
    assert size == 1 or (np.tril(total, -1) == 0).all()
    whole = x.T.astype(np.float64) @ x
    assert mirror(total) is total
    np.testing.assert_allclose(total, 5 * whole, atol=2e-5 * np.abs(whole).max())
    np.testing.assert_array_equal(total, total.T)
    again = total.copy()
    add_square(again, x.astype(np.float64), -2.0)  # in place
    np.testing.assert_allclose(mirror(again), total - 2 * whole, atol=1e-12 * np.abs(whole).max())
    u, v = np.random.default_rng(1).standard_normal((2, size))
    before = total.copy()
    subtract_outer(total, u, v)
    np.testing.assert_allclose(total, before - np.outer(u, v) - np.outer(v, u), atol=1e-12 * np.abs(whole).max())


@pytest.mark.parametrize("size", SIZES)
def test_inverse_and_factors_are_numpys(size: int) -> None:
    a = definite(size)
    right = np.random.default_rng(2).standard_normal((size, 3))
    np.testing.assert_allclose(Factors(a, 0.5).solve(right), np.linalg.solve(a + 0.5 * np.eye(size), right), atol=1e-9)
    single = Factors(a.astype(np.float32), 0.5).solve(right)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, np.linalg.solve(a + 0.5 * np.eye(size), right), atol=1e-4)
    np.testing.assert_allclose(inverse(a.copy()), np.linalg.inv(a), atol=1e-9)


def test_what_is_not_definite_is_inverted_but_not_factorised() -> None:
    a = definite(300) - 0.05 * np.eye(300)
    a[0, 0] = -1
    before = a.copy()
    with pytest.raises(np.linalg.LinAlgError):
        Factors(a, 0.0)
    np.testing.assert_array_equal(a, before)
    np.testing.assert_allclose(inverse(a) @ before, np.eye(300), atol=1e-7)
    with pytest.raises(np.linalg.LinAlgError):
        inverse(np.zeros((4, 4)))
