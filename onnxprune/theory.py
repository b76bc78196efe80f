"""Sampling theory of Provable Filter Pruning: draws, bounds and random streams over the channels of one layer.

PFP: Liebenwein, Baykal, Lang, Feldman, Rus, "Provable Filter Pruning for Efficient Neural Networks", ICLR 2020,
arXiv 1911.07412. The constants come from the following derivation, which stands on its own.
s_j in [0, 1] is the sensitivity of channel j on the sample set, S = sum_j s_j, p_j = s_j/S. An *event* is one (sign
part, output filter, patch): z = sum_j c_j, all c_j >= 0. m channels are drawn independently from p; channel j, drawn
n_j times, is kept with the weight n_j/(m p_j).
Assumption A(K, K'): Pr_x[g_j(x) <= M_j/K] <= exp(-1/K'), where g_j(x) is the largest share c_j/z that channel j has
in any event of x, and M_j is the essential supremum of g_j.
Lemma 1: with |S| >= K' ln(C/delta_S) i.i.d. samples, with probability >= 1 - delta_S: g_j(x) <= K s_j for all j.
Lemma 2: the estimate is z^ = sum_t X_t, X_t = c_j/(m p_j) for the t-th draw j; by Lemma 1, 0 <= X_t <= K S z/m =: b;
E X_t = z/m and E X_t^2 <= b z/m. Bernstein's inequality, Pr[|sum_t (X_t - E X_t)| > t] <= 2 exp(-(t^2/2)/(V + b t/3))
with V <= m b z/m = K S z^2/m and t = eps z, gives Pr[|z^ - z| > eps z] <= 2 exp(-3 eps^2 m/(K S (6 + 2 eps))).
Theorem: with E events, m >= K S (6 + 2 eps)/(3 eps^2) ln(2E/delta) draws give |z^ - z| <= eps z for all events of one
fresh input at once, with probability >= 1 - delta - delta_S. On the sample set itself K = 1 and delta_S = 0.
A layer with a few hundred channels gets eps > 1 at any useful ratio. There eps tells how to share a budget among
layers; it certifies nothing.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from onnxprune.errors import OptionError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

K_DEFAULT = 3.0
DRAWS_CAP = 2**62  # the largest number of draws that `draws` and `draws_for_distinct` return
STREAM_CAP = 10_000_000  # the longest stream that DrawStream stores (40 MB)
_BLOCK = 4096  # draws generated at a time


def _require(condition: bool | np.bool_, message: str, hint: str = "") -> None:
    if not condition:
        raise OptionError(message, hint=hint)


def _vector(values: npt.ArrayLike, name: str) -> FloatArray:
    out = np.asarray(values, dtype=np.float64)
    _require(out.ndim == 1 and out.size > 0, f"{name} must be a non-empty vector, not an array of shape {out.shape}")
    _require(np.isfinite(out).all() and (out >= 0).all(), f"{name} must be finite and not negative")
    return out


def _distribution(values: npt.ArrayLike) -> FloatArray:
    p = _vector(values, "p")
    _require(abs(float(p.sum()) - 1.0) <= 1e-6, f"p must sum to 1, not to {p.sum():.9g}", "see theory.probabilities")
    return p


def _bernstein_a(sum_s: float, events: int, delta: float, k: float) -> float:
    """A = (K S/3) ln(2E/delta), after a check of all four; the logarithm is split so that nothing overflows."""
    _require(0.0 < delta < 1.0, f"delta must lie strictly between 0 and 1, not be {delta}")
    _require(0.0 <= sum_s < math.inf, f"the sum of sensitivities must be finite and not negative, not {sum_s}")
    _require(events >= 1, f"the number of events must be at least 1, not {events}")
    _require(1.0 <= k < math.inf, f"K must be finite and at least 1, not {k}")
    return k * sum_s / 3.0 * (math.log(2.0) + math.log(events) - math.log(delta))


def epsilon(draws: float, sum_s: float, events: int, delta: float, k: float = K_DEFAULT) -> float:
    """Relative error that `draws` draws guarantee: the inverse of the theorem (PFP, arXiv 1911.07412) in eps.

    2E exp(-3 eps^2 m/(K S (6 + 2 eps))) = delta solved for eps: eps(m) = (A + sqrt(A^2 + 6 A m))/m with
    A = (K S/3) ln(2E/delta). Strictly decreasing in m. For a hybrid, S is the sum over the sampled rest only.
    S == 0 gives 0.0 for every m, 0 included (there is nothing to estimate); otherwise m == 0 gives inf.
    OptionError: draws < 0, S < 0, events < 1, K < 1, delta not in (0, 1).
    """
    a = _bernstein_a(sum_s, events, delta, k)
    _require(draws >= 0.0, f"the number of draws must not be negative, not {draws}")
    if a == 0.0 or draws == 0:
        return 0.0 if a == 0.0 else math.inf
    r = a / draws
    return r + math.sqrt(r) * math.sqrt(r + 6.0)


def delta_of_search(delta: float, draws: int, splits: int) -> float:
    """The delta of one number of draws m where a search picked m, and one of `splits` hybrids, by looking at the draws.

    A budget is met by trying prefixes of a stream, so that m depends on what was drawn, and the theorem has to hold for all
    m and hybrids at once: delta/(splits m (m + 1)) sums up to delta over all of them (union bound).
    OptionError: delta not in (0, 1), draws or splits below 1.
    """
    _require(0.0 < delta < 1.0, f"delta must lie strictly between 0 and 1, not be {delta}")
    _require(draws >= 1 and splits >= 1, f"draws and splits must be at least 1, not {draws} and {splits}")
    return delta / (splits * draws * (draws + 1.0))


def draws(eps: float, sum_s: float, events: int, delta: float, k: float = K_DEFAULT) -> int:
    """Smallest number of draws with the theorem's guarantee (PFP, arXiv 1911.07412): all events within eps z.

    m = ceil(K S (6 + 2 eps)/(3 eps^2) ln(2E/delta)), from Bernstein's inequality, Lemma 2 in the text of this module:
    Pr[|z^ - z| > eps z] <= 2 exp(-3 eps^2 m/(K S (6 + 2 eps))), and a union bound over the E events.
    epsilon(draws(eps)) <= eps holds after rounding too, unless m was cut to the cap 2**62. S == 0 gives 0.
    OptionError: eps <= 0 or not finite, S < 0, events < 1, K < 1, delta not in (0, 1).
    """
    a = _bernstein_a(sum_s, events, delta, k)
    _require(0.0 < eps < math.inf, f"eps must be positive and finite, not {eps}")
    if a == 0.0:
        return 0
    exact = a * (6.0 / eps + 2.0) / eps
    if not exact < DRAWS_CAP:
        return DRAWS_CAP
    m, step = max(1, math.ceil(exact)), max(1, int(math.ulp(exact)))
    if m > step and epsilon(m - step, sum_s, events, delta, k) <= eps:
        return m - step
    while m < DRAWS_CAP and epsilon(m, sum_s, events, delta, k) > eps:
        m, step = min(m + step, DRAWS_CAP), 2 * step
    return m


def probabilities(s: npt.ArrayLike) -> FloatArray:
    """Sampling distribution p_j = s_j/S of PFP (arXiv 1911.07412, its sampling lemma), [C] -> [C], float64.

    Entries below the float64 epsilon (2.2e-16) become 0 and the rest is normalised again. A dead layer (all s == 0)
    gives the uniform distribution. OptionError: not a vector, empty, negative or not finite.
    """
    s = _vector(s, "the sensitivities")
    top = float(s.max())
    if top == 0.0:
        return np.full(s.size, 1.0 / s.size)
    p: FloatArray = s / top
    p /= p.sum()
    p[p < np.finfo(np.float64).eps] = 0.0
    p /= p.sum()
    return p


def _log_miss(p: npt.ArrayLike) -> FloatArray:
    """ln(1 - p_j) of the channels with p_j > 0 (-inf for p_j = 1)."""
    p = _distribution(p)
    with np.errstate(divide="ignore"):
        return np.log1p(-np.minimum(p[p > 0.0], 1.0))


def _distinct(log_miss: FloatArray, m: float) -> float:
    return min(float(-np.expm1(float(m) * log_miss).sum()), log_miss.size, max(m, 1.0)) if m > 0 else 0.0


def expected_distinct(p: npt.ArrayLike, m: float) -> float:
    """Expected number of distinct channels in m i.i.d. draws, U(m) = sum_j 1 - (1 - p_j)^m, p of shape [C].

    It is the mean size of a PFP sample (arXiv 1911.07412), of which m is a bound. Computed as -expm1(m log1p(-p)),
    hence accurate for tiny p and huge m. Increasing in m, at most the number of p_j > 0 and, for m >= 1, at most m;
    both limits are enforced against rounding, so that ceil(U(1)) is 1.
    OptionError: p is no distribution, m < 0.
    """
    _require(m >= 0.0, f"the number of draws must not be negative, not {m}")
    return _distinct(_log_miss(p), m)


def draws_for_distinct(p: npt.ArrayLike, n: int) -> int:
    """Smallest m with ceil(U(m)) >= n: the calibration of PFP's sample size (arXiv 1911.07412) to n distinct channels.

    U is `expected_distinct`; since it increases in m, bisection on the integers finds m. n == 0 gives 0.
    OptionError: p (shape [C]) is no distribution, n < 0, n above the number of p_j > 0, or m above 2**62.
    """
    log_miss = _log_miss(p)
    _require(0 <= n <= log_miss.size, f"cannot expect {n} distinct channels of {log_miss.size} that have p_j > 0")
    low, high = n - 1, n  # U(m) <= m, so n - 1 draws never suffice
    while _distinct(log_miss, high) <= n - 1:
        low, high = high, 2 * high
        _require(high <= DRAWS_CAP, f"{n} distinct channels need more than 2**62 draws", "ask for fewer channels")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _distinct(log_miss, middle) > n - 1 else (middle, high)
    return high


def hybrid_split(s: npt.ArrayLike, n: int) -> tuple[IntArray, int]:
    """Partially derandomised PFP (arXiv 1911.07412): which channels to keep for certain, and how often to draw.

    With U(m~) = n the top k channels, those with p_j >= 1/m~ (at most n), are kept with weight 1. The rest R is
    sampled m' times from q_j = s_j/S_R, S_R = sum_R s_j, weights n_j/(m' q_j), m' such that the expected number of
    distinct channels is n - k. In R, X_t <= K S_R z/m' and V <= K S_R z^2/m', so Bernstein's inequality (Lemma 2 in
    the text of this module) holds with S_R in place of S, and eps is still relative to the whole z.
    Returns (indices [k] in the order of a stable argsort of -s, m'). m' is 0 if n == k. Where n reaches the number of
    channels with p_j > 0 (a dead layer included) a draw could only lose something: the top n are kept, m' = 0.
    OptionError: s (shape [C]) is negative or not finite, n not in 1..C.
    """
    s = _vector(s, "the sensitivities")
    _require(1 <= n <= s.size, f"the number of channels to keep must lie in 1..{s.size}, not be {n}")
    order = np.argsort(-s, kind="stable").astype(np.int64)
    p = probabilities(s)
    live = int(np.count_nonzero(p)) if s.any() else 0
    if n >= live:
        return order[:n], 0
    k = min(n, int(np.count_nonzero(p * draws_for_distinct(p, n) >= 1.0)))
    return order[:k], draws_for_distinct(probabilities(s[order[k:]]), n - k)


def calibration_samples(events_total: int, events_layer_max: int, delta: float, k_prime: float = 3.0) -> int:
    """Number of samples to measure sensitivities on, |S| = ceil(K' ln(8 eta* eta/delta)), as PFP's authors use it.

    eta = `events_total` is the number of scalar outputs of all layers, eta* = `events_layer_max` that of the largest.
    Lemma 1 (arXiv 1911.07412, under assumption A(K, K')) needs K' ln(C/delta_S) only, so this is on the safe side.
    OptionError: eta or eta* below 1, delta not in (0, 1), K' not positive.
    """
    _require(0.0 < delta < 1.0, f"delta must lie strictly between 0 and 1, not be {delta}")
    _require(min(events_total, events_layer_max) >= 1, "the numbers of events must be at least 1")
    _require(0.0 < k_prime < math.inf, f"K' must be positive and finite, not {k_prime}")
    return math.ceil(k_prime * (math.log(8.0 * events_layer_max) + math.log(events_total) - math.log(delta)))


class DrawStream:
    """An endless i.i.d. stream of channel draws from p [C]; the first m draws are a prefix of the first m' > m.

    This is the sample of PFP's estimator (arXiv 1911.07412). `rng` gives the seed once, at construction; afterwards
    the stream has a generator of its own, so that its draws depend neither on the order in which several streams grow
    nor on the steps in which this one does. Draws come in blocks of a fixed size from the inverse of the cumulative
    distribution of the channels with p_j > 0.
    OptionError: p is no distribution; m < 0; m > STREAM_CAP (ten million). A jump to multinomial counts would save the
    memory but break the prefix property, on which a search for m relies. So long a stream means that the width asked
    for includes channels of next to no probability: draw less, or keep the others for certain (`hybrid_split`).
    """

    def __init__(self, p: npt.ArrayLike, rng: np.random.Generator) -> None:
        p = _distribution(p)
        self._channels = p.size
        self._live = np.flatnonzero(p).astype(np.int32)
        cumulative = np.cumsum(p[self._live])
        self._cumulative = cumulative / cumulative[-1]  # the last is exactly 1, above every uniform number
        self._rng = np.random.default_rng(rng.integers(0, 2**32, size=4, dtype=np.uint64))
        self._blocks: list[npt.NDArray[np.int32]] = []

    def first(self, m: int) -> npt.NDArray[np.int32]:
        """The first m draws, channel indices of shape [m], int32. OptionError: see the class."""
        _require(m >= 0, f"the number of draws must not be negative, not {m}")
        _require(m <= STREAM_CAP, f"{m} draws are more than the {STREAM_CAP} of a stream", "keep fewer channels")
        needed = -(-m // _BLOCK)
        while len(self._blocks) < needed:
            places = np.searchsorted(self._cumulative, self._rng.random(_BLOCK), side="right")
            self._blocks.append(self._live[places])
        return np.concatenate(self._blocks[:needed])[:m] if m else np.empty(0, dtype=np.int32)

    def counts(self, m: int) -> IntArray:
        """n_j, how often channel j is among the first m draws: int64 [C], of sum m. OptionError: see the class."""
        return np.bincount(self.first(m), minlength=self._channels).astype(np.int64)

    def distinct(self, m: int) -> int:
        """Number of distinct channels among the first m draws; its mean is `expected_distinct(p, m)`."""
        return int(np.count_nonzero(self.counts(m)))


def weights(counts: npt.ArrayLike, p: npt.ArrayLike) -> FloatArray:
    """Weights n_j/(m p_j) of PFP's unbiased estimator (arXiv 1911.07412), m = sum_j n_j; 0 where n_j == 0.

    E[n_j] = m p_j, hence E[weight] = 1 for each p_j > 0. Arguments and result have the shape [C]; m == 0 gives zeros.
    OptionError: unequal shapes, negative counts, a channel drawn though its p_j is 0, p no distribution.
    """
    p = _distribution(p)
    n = _vector(counts, "the counts")
    _require(n.shape == p.shape, f"{n.size} counts do not fit {p.size} probabilities")
    drawn = n > 0.0
    _require((p[drawn] > 0.0).all(), "a channel of probability 0 was drawn", "use the p that it was drawn with")
    out = np.zeros(p.size)
    out[drawn] = n[drawn] / (n.sum() * p[drawn])
    return out
