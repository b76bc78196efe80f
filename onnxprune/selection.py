"""Which channels of one group a given epsilon keeps: deterministic, sampled, hybrid, and the plain top-n."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from onnxprune import theory
from onnxprune.channels import ChannelGroup, Index
from onnxprune.saliency import Saliency, Scores

Method: TypeAlias = Literal["pfp", "pfp-random", "pfp-deterministic", "top", "elimination"]
MAX_DRAWS = 1_000_000  # more draws than this from a few thousand channels hit every one that matters


@dataclass(frozen=True, eq=False)
class Choice:
    """The channels of one group that stay, and what the theory says of it.

    indices: sorted. scale: reweighting of each, None for 1. draws: m; 0 where nothing was sampled. sampled_sum: the sum of
    sensitivities that the draws had to represent. dropped_sum: the sum over the channels that go. certain: those that were
    kept without a draw, beside others that were drawn. added_sum: the sum over channels that were added to the drawn ones, with
    weight 1, to fill up an aligned width.
    """

    indices: Index
    scale: Scores | None = None
    draws: int = 0
    sampled_sum: float = 0.0
    dropped_sum: float = 0.0
    certain: Index = field(default_factory=lambda: np.empty(0, np.int64))
    added_sum: float = 0.0


@dataclass(frozen=True)
class Widths:
    """Limits to how narrow a group may become. align: multiples, for groups at least that wide; others stay whole.

    ladders: by group id the widths to choose from, rising up to the full one, where not every width is worth its price.
    """

    minimum: int = 1
    align: int = 1
    ladders: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def smallest(self, group: ChannelGroup) -> int:
        return self.fit(1, group)

    def fit(self, n: int, group: ChannelGroup) -> int:
        """The smallest allowed width of at least n channels for a group; never more than its size."""
        if group.size < self.align:
            return group.size
        n = max(n, min(self.minimum, group.size))
        if group.id not in self.ladders:
            return self._aligned(n, group)
        return next((w for rung in self.ladders[group.id] if (w := self._aligned(rung, group)) >= n), group.size)

    def _aligned(self, n: int, group: ChannelGroup) -> int:
        return min(group.size, -(-n // self.align) * self.align)

    def narrower(self, n: int, group: ChannelGroup) -> int | None:
        """The next allowed width below n for a group; None where there is none."""
        less = (n - 1) // self.align * self.align
        if group.id in self.ladders:
            less = max((w for rung in self.ladders[group.id] if (w := self._aligned(rung, group)) < n), default=0)
        return less if less >= self.smallest(group) else None


@dataclass(frozen=True)
class Share:
    """The sampling theorem's numbers for one group. epsilon >= 1 says nothing: `vacuous`.

    delta: the group's share of the failure probability. searched: whether the number of draws was found by looking at them.
    The rest is as in `Choice`.
    """

    draws: int
    epsilon: float
    delta: float
    sensitivity_sum: float
    dropped_sum: float
    events: int
    sampled_sum: float = 0.0
    certain: tuple[int, ...] = ()
    added_sum: float = 0.0
    searched: bool = False

    @property
    def vacuous(self) -> bool:
        return self.epsilon >= 1


class Selector:
    """Turns an epsilon into channels, group by group; a pure function of the saliency, the method and the seed.

    The draws of a group are a fixed stream of which a smaller epsilon takes a longer prefix (common random numbers), so
    that the size of the network shrinks steadily with epsilon and a budget can be searched for.
    """

    def __init__(
        self,
        groups: tuple[ChannelGroup, ...],
        saliency: Saliency,
        method: Method,
        *,
        widths: Widths = Widths(),
        delta: float = 0.01,
        seed: int = 0,
        rescalable: Mapping[str, bool] | None = None,
    ) -> None:
        self.groups, self.method, self.widths = groups, method, widths
        self.scores = {g.id: saliency.of(g) for g in groups}
        self.events = {g.id: saliency.events(g) for g in groups}
        self.delta = delta / max(1, len(groups))  # a union bound over the groups
        self.seed = seed
        self.rescalable = rescalable or {}
        self._streams: dict[tuple[str, int], theory.DrawStream] = {}
        self._chosen: dict[tuple[str, int, int], Choice] = {}

    def samples(self, group: ChannelGroup) -> bool:
        """Whether this group's channels are drawn; the others are chosen deterministically."""
        return self.method in ("pfp", "pfp-random") and self.rescalable.get(group.id, True)

    def choose(self, group: ChannelGroup, eps: float) -> Choice:
        """The channels that epsilon keeps: as many distinct ones as its number of draws is expected to hit."""
        s = self.scores[group.id]
        p = theory.probabilities(s)
        m = theory.draws(eps, float(s.sum()), self.events[group.id], self.delta)
        live = int(np.count_nonzero(p)) if s.any() else 0
        n = int(np.ceil(theory.expected_distinct(p, min(m, 2**40)))) if live and m else 1
        n = self.widths.fit(n, group)
        key = (group.id, n, m if self.method == "pfp-random" else 0)  # a search comes by the same widths again and again
        if key not in self._chosen:
            self._chosen[key] = self._choice(group, n, m, live)
        return self._chosen[key]

    def _choice(self, group: ChannelGroup, n: int, m: int, live: int) -> Choice:
        """n channels, or as many as m draws hit; live: how many have a probability."""
        s = self.scores[group.id]
        if n >= group.size or not self.samples(group):
            return self.top(group, n)
        if self.method == "pfp-random":
            p = theory.probabilities(s)
            # Alignment moved n: the number of draws follows it, so that n distinct channels are expected.
            free = self.widths.align == 1 and n > self.widths.minimum and group.id not in self.widths.ladders
            m = m if free else theory.draws_for_distinct(p, min(n, live))
            return self._sampled(group, np.empty(0, np.int64), m)
        certain, m = theory.hybrid_split(s, n)
        return self._sampled(group, certain, m)

    def top(self, group: ChannelGroup, n: int) -> Choice:
        """The n channels of highest score, without reweighting; ties go to the lower number."""
        s = self.scores[group.id]
        kept = np.sort(np.argsort(-s, kind="stable")[:n])
        return Choice(kept, dropped_sum=float(s.sum() - s[kept].sum()))

    def _sampled(self, group: ChannelGroup, certain: Index, m: int) -> Choice:
        s = self.scores[group.id]
        rest = s.copy()
        rest[certain] = 0
        if m == 0 or m > MAX_DRAWS or not rest.any():
            return self.top(group, max(len(certain), self.widths.smallest(group)) if m == 0 else group.size)
        p = theory.probabilities(rest)
        key = (group.id, len(certain))
        if key not in self._streams:
            rng = np.random.default_rng([self.seed, zlib.crc32(group.id.encode()), len(certain)])
            self._streams[key] = theory.DrawStream(p, rng)
        weights = theory.weights(self._streams[key].counts(m), p)
        weights[certain] = 1.0
        kept = np.flatnonzero(weights)
        allowed = self.widths.fit(len(kept), group)
        added = 0.0
        if allowed != len(kept):  # an aligned width adds the best of the channels that were not drawn, with weight 1
            more = [j for j in np.argsort(-s, kind="stable") if weights[j] == 0][: allowed - len(kept)]
            weights[more] = 1.0
            added = float(s[more].sum())
            kept = np.flatnonzero(weights)
        dropped = float(s.sum() - s[kept].sum())
        return Choice(kept, weights[kept], m, float(rest.sum()), dropped, np.sort(certain), added)

    def resized(self, group: ChannelGroup, choice: Choice, n: int) -> Choice:
        """A choice of n channels instead: by more or fewer draws where it was drawn, else those of highest score."""
        if not choice.draws or n >= group.size or n <= len(choice.certain):
            return self.top(group, n)
        stream = self._streams[group.id, len(choice.certain)]
        missing, m = n - len(choice.certain), choice.draws
        while stream.distinct(m) < missing and m < MAX_DRAWS:
            m = min(2 * m, MAX_DRAWS)
        first = np.sort(np.unique(stream.first(m), return_index=True)[1])  # where each channel is drawn for the first time
        if len(first) < missing:
            return self.top(group, n)
        return self._sampled(group, choice.certain, int(first[missing - 1]) + 1)

    def within(self, group: ChannelGroup, eps: float) -> Choice:
        """The smallest choice whose error is provably at most eps, for `--eps`: the theorem's condition, not a share."""
        s, size = self.scores[group.id], group.size
        order = np.argsort(-s, kind="stable")
        tail = np.concatenate([np.cumsum(s[order][::-1])[::-1], [0.0]])  # tail[k]: sum over all but the top k
        if not self.samples(group):
            enough = theory.K_DEFAULT * tail <= eps
            return self.top(group, self.widths.fit(max(1, int(np.argmax(enough))), group))
        best = (size, size, 0)
        for k in range(size if self.method == "pfp" else 1):
            if tail[k] <= 0:
                best = min(best, (max(k, 1), k, 0))
                break
            m = theory.draws(eps, float(tail[k]), self.events[group.id], self.delta)
            rest = s.copy()
            rest[order[:k]] = 0
            best = min(best, (k + int(np.ceil(theory.expected_distinct(theory.probabilities(rest), m))), k, m))
        width, k, m = best
        if width >= size:
            return self.top(group, size)
        if not m:
            return self.top(group, self.widths.fit(width, group))
        choice = self._sampled(group, np.sort(order[:k]), m)
        return choice if self.epsilon(group, choice) <= eps else self.top(group, size)  # what fills up a width adds an error

    def next_eps(self, group: ChannelGroup, n: int) -> float:
        """The largest epsilon that asks for n channels of the group; 0 where only channels of score 0 are left."""
        s = self.scores[group.id]
        p = theory.probabilities(s)
        if not s.any() or n > np.count_nonzero(p):
            return 0.0
        return theory.epsilon(theory.draws_for_distinct(p, n), float(s.sum()), self.events[group.id], self.delta)

    def epsilon(self, group: ChannelGroup, choice: Choice, searched: bool = False) -> float:
        """The error that a choice guarantees (relative to the absolute sum): 0 if nothing goes, see `theory`.

        searched: whether the number of draws depends on what was drawn, as when a budget is searched for; then the theorem
        has to hold for all numbers at once, see `theory.delta_of_search`. A channel that was added with weight 1 moves the
        sum by K s_j z at most.
        """
        if len(choice.indices) == group.size:
            return 0.0
        if choice.draws:
            delta = theory.delta_of_search(self.delta, choice.draws, group.size) if searched else self.delta
            drawn = theory.epsilon(choice.draws, choice.sampled_sum, self.events[group.id], delta)
            return drawn + theory.K_DEFAULT * choice.added_sum
        return theory.K_DEFAULT * choice.dropped_sum
