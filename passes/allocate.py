"""Pass `allocate`: how much of every group to keep, so that the whole network meets the budget."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from onnxprune.budget import UNITS, Budget
from onnxprune.channels import ChannelGroup, Index
from onnxprune.errors import BudgetError
from onnxprune.groups import Accounting, Tally
from onnxprune.selection import Choice, Selector, Widths
from onnxprune.timing.costs import Costs

LOWEST, HIGHEST = -8.0, 30.0  # log10 of epsilon; far outside what any network asks for
ROUNDS = 70
SLACK = 0.01  # of a budget, that may be left without a try to use it

Urgency: TypeAlias = Callable[[ChannelGroup, int], float]
"""urgency(group, n): how much the n-th channel of a group matters."""


@dataclass(frozen=True, eq=False)
class Allocation:
    """What every prunable group keeps. epsilon: the common error target of all groups, None for plain criteria."""

    choices: Mapping[str, Choice]
    epsilon: float | None


def require_reachable(accounting: Accounting, groups: tuple[ChannelGroup, ...], widths: Widths, budget: Budget) -> None:
    """Raises BudgetError, naming the smallest reachable network, when a budget that can be counted is out of reach."""
    if budget.kind in ("macs", "params", "bytes"):
        _Ledger(accounting, groups, budget).check_reachable({g.id: widths.smallest(g) for g in groups})


def allocate(
    accounting: Accounting,
    groups: tuple[ChannelGroup, ...],
    selector: Selector,
    budget: Budget,
    spare: int = 0,
    costs: Costs | None = None,
) -> Allocation:
    """PFP's allocation: the smallest epsilon, the same for every group, at which the *whole* network fits the budget.

    Bisection on log epsilon over the size that the choices really have. What granularity leaves over is spent channel by
    channel, always on the group with the largest remaining error. Methods without a theory share out equal fractions.
    `spare` of the budget is left unused. costs: what a budget of latency goes by. Raises BudgetError like
    `require_reachable`.
    """
    if budget.kind == "eps":
        return Allocation({g.id: selector.within(g, budget.value) for g in groups}, budget.value)
    ledger = _Ledger(accounting, groups, budget, spare, costs)
    ledger.check_reachable({g.id: selector.widths.smallest(g) for g in groups})
    if selector.method == "elimination":
        return _by_error(ledger, groups, selector)
    if selector.method == "top":
        return _uniform(ledger, groups, selector)
    return _by_epsilon(ledger, groups, selector)


class _Ledger:
    """The budget's account of a set of widths."""

    def __init__(
        self,
        accounting: Accounting,
        groups: tuple[ChannelGroup, ...],
        budget: Budget,
        spare: int = 0,
        costs: Costs | None = None,
    ) -> None:
        self.accounting, self.budget, self.costs = accounting, budget, costs
        self.full = self._count(accounting.full_widths)
        self.limit = budget.value * self.full - spare
        self.column = {g.id: accounting.column[g.id] for g in groups}

    def _count(self, widths: Index) -> int:
        return self.budget.used(self.accounting.size(widths)) if self.costs is None else self.costs.used(widths)

    def filled(self, widths: Mapping[str, int]) -> Index:
        """The widths of all groups; those that are not named are whole."""
        full: Index = self.accounting.full_widths.copy()
        full[[self.column[name] for name in widths]] = list(widths.values())
        return full

    def used(self, widths: Mapping[str, int]) -> int:
        return self._count(self.filled(widths))

    def tally(self, widths: Mapping[str, int]) -> Tally:
        filled = self.filled(widths)
        return self.accounting.tally(self.budget.kind, filled) if self.costs is None else self.costs.tally(filled)

    def fits(self, widths: Mapping[str, int]) -> bool:
        return self.used(widths) <= self.limit

    def check_reachable(self, smallest: Mapping[str, int]) -> None:
        if not self.fits(smallest):
            least = self.used(smallest) / self.full
            asked, what = f"--{self.budget.kind} {self.budget.value:g}", UNITS[self.budget.kind]
            raise BudgetError(
                f"{asked} is out of reach: the smallest network keeps {least:.3f} of the {what}",
                hint=f"ask for {np.ceil(least * 1000) / 1000:.3f} or more; `onnxprune inspect` says what is frozen and why",
            )


def _by_epsilon(ledger: _Ledger, groups: tuple[ChannelGroup, ...], selector: Selector) -> Allocation:
    low, high = LOWEST, HIGHEST
    best: tuple[float, dict[str, Choice]] | None = None
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        choices = {g.id: selector.choose(g, 10.0**middle) for g in groups}
        if ledger.fits({name: len(c.indices) for name, c in choices.items()}):
            best, high = (middle, choices), middle
        else:
            low = middle
        if high - low < 1e-12:
            break
    if best is None:
        best = (HIGHEST, {g.id: selector.top(g, selector.widths.smallest(g)) for g in groups})
    log_eps, choices = best
    _spend(ledger, groups, selector, choices, selector.next_eps)
    return Allocation(choices, 10.0**log_eps)


def _spend(
    ledger: _Ledger, groups: tuple[ChannelGroup, ...], selector: Selector, choices: dict[str, Choice], urgency: Urgency
) -> None:
    """Widens groups, the most urgent first, as long as anything fits. Changes `choices`.

    Where more than a hundredth of the budget is left even so, because every step is larger than that, groups are exchanged: one
    is widened for others that are narrowed, the least urgent first.
    """
    widths = {name: len(c.indices) for name, c in choices.items()}
    _fill(ledger, groups, selector, widths, urgency)
    for _ in groups:
        used = ledger.used(widths)
        if used >= (1 - SLACK) * ledger.limit or not (better := _exchanged(ledger, groups, selector, widths, urgency)):
            break
        widths = better
    for group in groups:
        if widths[group.id] != len(choices[group.id].indices):
            choices[group.id] = selector.resized(group, choices[group.id], widths[group.id])


def _fill(
    ledger: _Ledger, groups: tuple[ChannelGroup, ...], selector: Selector, widths: dict[str, int], urgency: Urgency
) -> None:
    """Widens groups step by step, the most urgent first, as long as anything fits. Changes `widths`."""
    tally = ledger.tally(widths)
    queue: list[tuple[float, int]] = []

    def push(i: int) -> None:
        group = groups[i]
        if widths[group.id] < group.size:
            heapq.heappush(queue, (-urgency(group, selector.widths.fit(widths[group.id] + 1, group)), i))

    for i in range(len(groups)):
        push(i)
    while queue:
        _, i = heapq.heappop(queue)
        group = groups[i]
        wider = selector.widths.fit(widths[group.id] + 1, group)
        column = ledger.column[group.id]
        if tally.resize(column, wider) <= ledger.limit:
            widths[group.id] = wider
            push(i)
        else:
            tally.resize(column, widths[group.id])


def _exchanged(
    ledger: _Ledger, groups: tuple[ChannelGroup, ...], selector: Selector, widths: Mapping[str, int], urgency: Urgency
) -> dict[str, int] | None:
    """Widths that use more of the budget: one group wider, the least urgent others narrower; None where there are none."""
    used = ledger.used(widths)
    short = [g for g in groups if widths[g.id] < g.size]
    for group in sorted(short, key=lambda g: -urgency(g, selector.widths.fit(widths[g.id] + 1, g))):
        trial = dict(widths) | {group.id: selector.widths.fit(widths[group.id] + 1, group)}
        tally = ledger.tally(trial)
        others = [(urgency(g, trial[g.id]), i) for i, g in enumerate(groups) if g is not group]
        heapq.heapify(others)
        while others and tally.total > ledger.limit:
            _, i = heapq.heappop(others)
            less = selector.widths.narrower(trial[groups[i].id], groups[i])
            if less is not None:
                trial[groups[i].id] = less
                tally.resize(ledger.column[groups[i].id], less)
                heapq.heappush(others, (urgency(groups[i], less), i))
        if tally.total <= ledger.limit:
            _fill(ledger, groups, selector, trial, urgency)
            if ledger.used(trial) > used:
                return trial
    return None


def _by_error(ledger: _Ledger, groups: tuple[ChannelGroup, ...], selector: Selector) -> Allocation:
    """Narrows, in the whole network, the group that loses least per unit of the budget saved, until the budget is met.

    What a step saves depends on the other widths: it is looked up anew when its turn comes.
    """
    tally = ledger.tally({})
    widths = {g.id: g.size for g in groups}
    ordered = {g.id: np.sort(selector.scores[g.id]) for g in groups}  # channels go in this order
    total = tally.total

    def price(i: int) -> float | None:
        group = groups[i]
        width = widths[group.id]
        less = selector.widths.narrower(width, group)
        if less is None:
            return None
        error = float(ordered[group.id][group.size - width : group.size - less].sum())
        saved = total - tally.resize(ledger.column[group.id], less)
        tally.resize(ledger.column[group.id], width)
        return error / max(saved, 0.5)

    queue = [(p, i) for i in range(len(groups)) if (p := price(i)) is not None]
    heapq.heapify(queue)
    while total > ledger.limit and queue:
        _, i = heapq.heappop(queue)
        now = price(i)
        if now is not None and queue and (now, i) > queue[0]:
            heapq.heappush(queue, (now, i))
            continue
        group = groups[i]
        less = selector.widths.narrower(widths[group.id], group)
        assert less is not None
        widths[group.id] = less
        total = tally.resize(ledger.column[group.id], less)
        if (after := price(i)) is not None:
            heapq.heappush(queue, (after, i))
    choices = {g.id: selector.top(g, widths[g.id]) for g in groups}
    _spend(ledger, groups, selector, choices, lambda g, n: float(ordered[g.id][g.size - n]))
    return Allocation(choices, None)


def _uniform(ledger: _Ledger, groups: tuple[ChannelGroup, ...], selector: Selector) -> Allocation:
    """The same fraction of every group, the largest that fits; then single channels where most is missing."""

    def widths(fraction: float) -> dict[str, int]:
        return {g.id: selector.widths.fit(int(fraction * g.size), g) for g in groups}

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if ledger.fits(widths(middle)) else (low, middle)
    fitting = widths(low)
    choices = {g.id: selector.top(g, fitting[g.id]) for g in groups}
    _spend(ledger, groups, selector, choices, lambda g, n: 1 - (n - 1) / g.size)
    return Allocation(choices, None)
