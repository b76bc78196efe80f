"""How the loops behind the sensitivities are compiled, and the logarithms that they have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy import float32, int32

F = TypeVar("F", bound=Callable[..., Any])
FAST = {"nnan", "nsz", "contract", "reassoc"}
LEVELS = 127  # the largest integer: sums of two products of them fit 16 bits, which not all processors widen in time
STEPS = 256  # of the 16-bit logarithms in one octave
ERROR = 2e-4  # of `log2`
SLACK = 1e-3  # in octaves, more than the rounding of float32 comes to
FAINT = -8 * STEPS  # the least logarithm of a norm; those of integers are 7 at most, and a little for several
DEAD = -70 * STEPS  # the logarithm of 1/z where z counts as zero; with FAINT and ABSENT it fits 16 bits
ABSENT = -40 * STEPS  # of the norm of activations that are all zero
UNKNOWN = 40 * STEPS  # of 1/z where the product of integers is zero
LOWEST = -50 * STEPS  # below every bound that is not dead
FULL = 1 - 1e-6  # shares above this count as 1


GIVEN = "Array(float32, {}, 'C', True)"  # numba's word for an array that may be read-only
PLACES = "i8[:,::1], i8[::1], i8[:,::1], i8[:,::1], i8, i8"  # base, shift, inside, rows, step, line: see `encode`


def compiled(signature: str = "", inline: bool = False) -> Callable[[F], F]:
    """Compiles a function for a signature in numba's words; without one, together with what calls it; `inline`: within that.

    The machine code is kept beside the source or in the user's cache; in memory where neither can be written.
    """
    options: dict[str, Any] = {"nogil": True, "fastmath": FAST, "error_model": "numpy"}

    def decorate(function: F) -> F:
        if not signature:
            return cast(F, numba.njit(inline="always" if inline else "never", **options)(function))
        try:
            return cast(F, numba.njit(signature, cache=True, **options)(function))
        except RuntimeError:  # "no locator available": a read-only installation of a user without a home
            return cast(F, numba.njit(signature, **options)(function))

    return decorate


@compiled()
def log2(v: Any) -> Any:
    """log2 of a float32 >= 0, within ERROR for normal numbers and too large below."""
    bits = np.float32(v).view(np.int32)
    m = float32(bits & int32(0x7FFFFF)) * float32(2.0**-23)
    bend = float32(0.43872575) + m * (float32(-0.23905826) + m * float32(0.08213072))
    return float32(bits - int32(0x3F800000)) * float32(2.0**-23) + m * (float32(1) - m) * bend


@compiled()
def in_steps(octaves: Any) -> Any:
    """A logarithm in STEPS, rounded up."""
    return int32(octaves * float32(STEPS) + float32(32769)) - int32(32768)
