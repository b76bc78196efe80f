"""Which channels a reshape leaves independent, against counting them one by one."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from onnxprune.rules.reshape import pairs, units

TOTALS = [6, 12, 30, 36, 72, 120, 210, 360, 840]


@st.composite
def shapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of equal size, of up to four axes longer than 1."""
    total = draw(st.sampled_from(TOTALS))
    return _factors(draw, total), _factors(draw, total)


def _factors(draw: st.DrawFn, rest: int) -> list[int]:
    found: list[int] = []
    while rest > 1:
        divisors = [d for d in range(2, rest + 1) if rest % d == 0]
        found.append(rest if len(found) == 3 else draw(st.sampled_from(divisors)))
        rest //= found[-1]
    return draw(st.permutations(found))


def every_pair(before: list[int], a: int, after: list[int], b: int) -> set[tuple[int, int]]:
    """By moving every element of a tensor."""
    flat = np.arange(math.prod(before))
    here, there = np.unravel_index(flat, before)[a], np.unravel_index(flat, after)[b]
    return set(zip(here.tolist(), there.tolist(), strict=True))


@settings(max_examples=300, deadline=None)
@given(shapes())
def test_pairs_and_units_are_those_of_the_elements(both: tuple[list[int], list[int]]) -> None:
    before, after = both
    for a, b in product(range(len(before)), range(len(after))):
        found = every_pair(before, a, after, b)
        ia, ib = pairs(before, a, after, b)
        assert set(zip(ia.tolist(), ib.tolist(), strict=True)) == found
        i, j = np.array(sorted(found)).T
        graph = coo_matrix((np.ones(len(i)), (i, j + before[a])), shape=[before[a] + after[b]] * 2)
        assert units(tuple(before), a, tuple(after), b) == connected_components(graph, directed=False)[0]


@pytest.mark.parametrize(
    ("before", "a", "after", "b", "count"),
    [
        ([64, 56, 56], 0, [32, 2 * 56 * 56], 0, 32),  # group normalisation: pairs of channels
        ([64, 56, 56], 0, [32, 2 * 56 * 56], 1, 2),  # the same, along the other axis: odd and even channels
        ([1 << 10, 1 << 30], 0, [1 << 12, 1 << 28], 0, 1 << 10),  # elements are not counted one by one
        ([1 << 12, 1 << 28], 0, [1 << 10, 1 << 10, 1 << 20], 1, 1 << 2),
    ],
)
def test_units_of_large_tensors(before: list[int], a: int, after: list[int], b: int, count: int) -> None:
    assert units(tuple(before), a, tuple(after), b) == count
