"""Large symmetric matrices, in place: BLAS and LAPACK compute one triangle, and a copy more is a matter of time here."""

from __future__ import annotations

import numpy as np
from scipy.linalg.blas import get_blas_funcs
from scipy.linalg.lapack import get_lapack_funcs

from onnxprune.graph import Array

BLOCK = 256  # rows at a time, so that what is read across the rows stays in the cache


def mirror(a: Array) -> Array:
    """Copies the triangle above the diagonal of `a` [D, D] to the one below; returns `a`."""
    for i in range(0, len(a), BLOCK):
        for j in range(0, i, BLOCK):
            a[i : i + BLOCK, j : j + BLOCK] = a[j : j + BLOCK, i : i + BLOCK].T
        square = a[i : i + BLOCK, i : i + BLOCK]
        below = np.tril_indices(len(square), -1)
        square[below] = square.T[below]
    return a


def add_square(a: Array, rows: Array, times: float = 1.0, space: Array | None = None) -> None:
    """Adds the triangle above the diagonal of X'X, so many times, to `a` [D, D]; X [n, D], as precise as X is.

    space: [D, D] in the precision of X, of which the other triangle is zero; the product goes there where `a` has another one.
    """
    if not len(a):
        return
    square = get_blas_funcs("syrk", (rows,))
    columns = np.ascontiguousarray(rows).T
    if a.dtype == rows.dtype and a.flags.c_contiguous:
        square(times, columns, beta=1.0, c=a.T, lower=1, overwrite_c=1)
        return
    product = np.zeros(a.shape, rows.dtype) if space is None else space
    square(times, columns, beta=0.0, c=product.T, lower=1, overwrite_c=1)
    for i in range(0, len(a), BLOCK):
        a[i : i + BLOCK, i:] += product[i : i + BLOCK, i:]


def subtract_outer(a: Array, u: Array, v: Array) -> None:
    """Takes u v' + v u' from `a` [D, D]; u, v [D]."""
    for i in range(0, len(a), BLOCK):
        part = slice(i, i + BLOCK)
        a[part] -= np.stack([u[part], v[part]], 1) @ np.stack([v, u])


def inverse(a: Array) -> Array:
    """The inverse of a symmetric positive definite matrix [D, D], whose memory it takes. Rounding may have made it indefinite.

    Raises LinAlgError where it is singular.
    """
    factorise, invert = get_lapack_funcs(("potrf", "potri"), (a,))
    diagonal = a.diagonal().copy()
    factor, failed = factorise(a.T, lower=1, overwrite_a=1, clean=0)
    if not failed:
        found, failed = invert(factor, lower=1, overwrite_c=1)
        if not failed:
            return mirror(found.T)
    return np.linalg.inv(_restored(a, diagonal))


class Factors:
    """Cholesky's factor of a symmetric matrix [D, D] plus a number on its diagonal, in the precision of the matrix.

    Raises LinAlgError where that is not positive definite, by rounding or otherwise.
    """

    def __init__(self, a: Array, ridge: float) -> None:
        factorise, self._solve = get_lapack_funcs(("potrf", "potrs"), (a,))
        own = a.copy()
        own[np.diag_indices_from(own)] += own.dtype.type(ridge)
        self._factor, failed = factorise(own.T, lower=1, overwrite_a=1, clean=0)
        if failed:
            raise np.linalg.LinAlgError("not positive definite")

    def solve(self, right: Array) -> Array:
        """[D, O] for right sides [D, O]."""
        return np.asarray(self._solve(self._factor, right, lower=1)[0])


def _restored(a: Array, diagonal: Array) -> Array:
    """`a` of which the triangle above the diagonal, and it, were overwritten."""
    whole = np.tril(a, -1)
    whole += whole.T
    whole[np.diag_indices_from(whole)] = diagonal
    return whole
