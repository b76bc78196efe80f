"""Distribution-free statements from held-out samples: order statistics and Clopper-Pearson limits.

They need independent samples of one distribution, used for nothing else, and nothing of the network. Clopper, Pearson,
"The use of confidence or fiducial limits illustrated in the case of the binomial", Biometrika 26, 1934; Wilks,
"Determination of sample sizes for setting tolerance limits", Annals of Mathematical Statistics 12, 1941.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy import special

from onnxprune.errors import OptionError

Item = TypeVar("Item")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise OptionError(message)


def _counts(events: int, n: int, delta: float) -> None:
    _require(0.0 < delta < 1.0, f"delta must lie strictly between 0 and 1, not be {delta}")
    _require(n >= 0 and 0 <= events <= n, f"{events} events cannot be seen in {n} samples")


def upper(events: int, n: int, delta: float) -> float:
    """Clopper-Pearson: with confidence 1 - delta the probability of the event is at most this; 1 for n == 0.

    The p at which Pr[Bin(n, p) <= events] = delta. OptionError: events not in 0..n, delta not in (0, 1).
    """
    _counts(events, n, delta)
    return 1.0 if events == n else float(special.betainccinv(events + 1, n - events, delta))


def lower(events: int, n: int, delta: float) -> float:
    """Clopper-Pearson: with confidence 1 - delta the probability of the event is at least this. OptionError like `upper`."""
    _counts(events, n, delta)
    return 0.0 if events == 0 else float(special.betaincinv(events, n - events + 1, delta))


def rank(n: int, alpha: float, delta: float) -> int | None:
    """Which order statistic of n samples (1 is the smallest) at most a fraction alpha exceeds, with confidence 1 - delta.

    X_(r) is too small only if at least r samples lie below the quantile 1 - alpha: the smallest r with
    Pr[Bin(n, 1 - alpha) >= r] <= delta. None where even the largest of n samples does not do; see `enough`.
    """
    _require(0.0 < alpha < 1.0 and 0.0 < delta < 1.0, f"alpha and delta must lie in (0, 1), not be {alpha} and {delta}")
    if n < enough(alpha, delta):
        return None
    return 1 + bisect_left(range(1, n), True, key=lambda r: bool(special.bdtrc(r - 1, n, 1.0 - alpha) <= delta))


def enough(alpha: float, delta: float) -> int:
    """How many samples without an event show, with confidence 1 - delta, that its probability is at most alpha.

    (1 - alpha)^n <= delta. As many are needed for `rank` to find an order statistic.
    """
    _require(0.0 < alpha < 1.0 and 0.0 < delta < 1.0, f"alpha and delta must lie in (0, 1), not be {alpha} and {delta}")
    return math.ceil(math.log(delta) / math.log1p(-alpha) - 1e-9)


def beyond(values: npt.ArrayLike, alpha: float, delta: float) -> float | None:
    """What at most a fraction alpha of fresh values exceeds, with confidence 1 - delta; None where [n] values are too few."""
    found = np.sort(np.asarray(values, np.float64))
    r = rank(found.size, alpha, delta)
    return None if r is None else float(found[r - 1])


def drop(lost: int, gained: int, n: int, delta: float) -> float:
    """With confidence 1 - delta the accuracy falls by at most this, seen `lost` right answers that went and `gained` ones.

    accuracy before - after = Pr[lost] - Pr[gained]; both limits at delta/2 hold together by a union bound. In [-1, 1].
    """
    return upper(lost, n, delta / 2) - lower(gained, n, delta / 2)


def shared(delta: float, candidates: int) -> float:
    """The delta of each candidate when one of several is chosen on the very samples that certify it (Bonferroni)."""
    _require(candidates >= 1, f"there must be at least one candidate, not {candidates}")
    return delta / candidates


def fixed_sequence(items: Iterable[Item], passes: Callable[[Item], bool]) -> tuple[Item | None, int]:
    """(the last item that passed, None if not even the first did; how many were tested), up to the first that fails.

    For hypotheses in an order fixed beforehand, each tested at the full level.

    The chance that any item passed wrongly is at most the level of one test: to pass wrongly, the first item in the order
    that should fail has to (Maurer, Hothorn, Lehmacher 1995). The same samples may serve all tests. `items` is not read
    beyond the first failure.
    """
    last: Item | None = None
    tested = 0
    for item in items:
        tested += 1
        if not passes(item):
            break
        last = item
    return last, tested
