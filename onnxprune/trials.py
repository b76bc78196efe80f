"""`--latency`: networks are tried until one takes the time that was asked for, measured beside the original."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import onnx

from onnxprune import runtime
from onnxprune.errors import BudgetError
from onnxprune.imported import Imported
from onnxprune.options import Options
from onnxprune.passes.surgery import surgery
from onnxprune.plan import Kept, Plan
from onnxprune.targets import widths as allowed
from onnxprune.timing.costs import Costs, Priced, widths_of
from onnxprune.timing.layers import Spec, spec
from onnxprune.timing.meter import Meter
from onnxprune.timing.models import Feeds, Setting, batched
from onnxprune.timing.rounds import Rounds, Spread
from onnxprune.timing.store import Store
from onnxprune.timing.tables import Table, agreed, measured

Tell = Callable[[str, int, int], None]
Extra = TypeVar("Extra")

TRIALS = 8  # networks for one method
AIM = 0.98  # of the budget: a little under it, so that measuring again does not find it exceeded
TOLERANCE = 0.05  # how far below the budget a network may be, relative to it
STEP = 0.002  # targets are multiples of it: the noise of a measurement is no reason for another network
TRIAL_SECONDS, CONFIRM_SECONDS = 5.0, 12.0


@dataclass(frozen=True, eq=False)
class Machine:
    """What networks are timed on and with: a meter, what it has measured before, and inputs."""

    meter: Meter
    store: Store
    feeds: Feeds

    @staticmethod
    def of(imported: Imported, settings: Options) -> Machine:
        meter = Meter(Setting.of(settings.threads, settings.providers))
        feeds = batched(imported.model, imported.groups.net.feeds, settings.latency_batch)
        return Machine(meter, Store(meter.key), feeds)


def costs(imported: Imported, machine: Machine, tell: Tell) -> Costs:
    """The tables of all layers, measured unless they are in the store; the rest is not fitted yet."""
    groups, net = imported.groups, imported.groups.net
    same = all(net.feeds[name].shape == array.shape for name, array in machine.feeds.items())
    shapes = net.shapes if same else runtime.probe(imported.model, machine.feeds).shapes
    found = {i: spec(net, layer, shapes) for i, layer in enumerate(groups.layers)}
    wanted = list(dict.fromkeys(s for s in found.values() if s is not None))
    tables: dict[Spec, Table] = {}
    for done, one in enumerate(wanted):
        tables[one] = _table(one, machine)
        tell("costs", done + 1, len(wanted))
    machine.store.save()
    tables = agreed(tables)
    priced = [
        Priced(layer.x, layer.out, tables[known], net.inside.repeats.get(layer.out.tensor, 1))
        for i, layer in enumerate(groups.layers)
        if (known := found[i]) is not None
    ]
    return Costs(groups, priced, [i for i, one in found.items() if one is None])


def _table(one: Spec, machine: Machine) -> Table:
    try:
        return Table.from_json(machine.store.get("tables", one.key))
    except (ValueError, KeyError, TypeError, IndexError):
        table = measured(one, lambda i, o, limit: machine.meter.layer(one, i, o, limit))
        machine.store.put("tables", one.key, table.to_json())
        return table


@dataclass(frozen=True)
class Trial:
    """One network: its latency as predicted, and as measured beside the original, relative to it."""

    predicted: float
    measured: Spread
    rounds: int

    def to_json(self) -> dict[str, Any]:
        return {"predicted": self.predicted, "measured": self.measured.to_json(), "rounds": self.rounds}


class Latency:
    """The search for one budget: what is predicted, what was measured, and so what to aim at next."""

    def __init__(self, imported: Imported, settings: Options, value: float, machine: Machine, tell: Tell) -> None:
        """Measures the layers and the smallest network. Raises BudgetError when even that takes longer than `value`."""
        self.imported, self.value, self.machine, self.tell = imported, value, machine, tell
        self._network = [imported.groups.net.digest, self._sizes]
        self._question = [*self._network, repr(replace(settings, providers=())), value]
        tables = costs(imported, machine, tell)
        ladders = {g.id: ladder for g in imported.groups.prunable if (ladder := tables.ladder(g))}
        self.widths = replace(allowed(settings, imported.groups.net), ladders=ladders)
        least = {g.id: self.widths.smallest(g) for g in imported.groups.prunable}
        self._trials: dict[tuple[int, ...], Trial] = {}
        seconds, smallest = self._ends(least)
        self.costs = tables.fitted(seconds, smallest * seconds, widths_of(tables, least))
        self.smallest = smallest
        if smallest > value:
            raise BudgetError(
                f"--latency {value:g} is out of reach: the smallest network takes {smallest:.3f} of the original's time",
                hint=f"ask for {np.ceil(smallest * 100) / 100:.2f} or more; `onnxprune bench --profile` shows what takes it",
            )
        self._least = self.costs.ratio(widths_of(self.costs, least))
        self._points = [(1.0, 1.0), (self._least, smallest)]
        self.confirmed: Rounds | None = None

    @property
    def _sizes(self) -> dict[str, list[int]]:
        return {name: list(array.shape) for name, array in self.machine.feeds.items()}

    def _ends(self, least: Mapping[str, int]) -> tuple[float, float]:
        """Seconds of the original when it is not interrupted, and the ratio of the smallest network.

        Kept, so that the same predictions come back.
        """
        key = _key(*self._network, sorted(least.items()))
        try:
            seconds, ratio = (float(v) for v in self.machine.store.get("networks", key))
        except (TypeError, ValueError):
            by_id = self.imported.groups.by_id
            plan = Plan({name: Kept(by_id[name].size, np.arange(n, dtype=np.int64)) for name, n in least.items()})
            rounds = self._time(plan)
            seconds, ratio = float(rounds.seconds[:, 0].min()), rounds.ratio(1).median  # tables hold the fastest runs, too
            self.machine.store.put("networks", key, [seconds, ratio])
            self.machine.store.save()
        return seconds, ratio

    def _time(self, plan: Plan) -> Rounds:
        cut = surgery(self.imported.groups, plan)
        rounds = self.machine.meter.networks([self.imported.model, cut], self.machine.feeds, TRIAL_SECONDS)
        self.imported.groups.net.scratch.drop(cut)
        return rounds

    def search(self, method: str, make: Callable[[float], tuple[Plan, Extra]]) -> tuple[Plan, Extra]:
        """The plan that `make` has for the internal target (predicted) at which the measured ratio is what was asked for.

        The largest network within the budget of those tried, at most five per cent under it where the steps allow; or, where
        none is within, one that is at most five per cent over. Where one was found before for the same question, it is tried
        first. Raises BudgetError when there is none.
        """
        key = _key(*self._question, method)
        kept = self.machine.store.get("targets", key)
        target = float(kept) if isinstance(kept, (int, float)) and self._least <= kept < 1 else self._target([])
        found: list[tuple[float, float, Plan, Extra]] = []
        while target not in [t for _, t, _, _ in found] and len(found) < TRIALS:
            plan, extra = make(target)
            ratio = self._tried(plan).measured.median
            found.append((ratio, target, plan, extra))
            self.tell("trials", len(found), TRIALS)
            if (1 - TOLERANCE) * self.value <= ratio <= self.value:
                break
            target = self._target([r > self.value for r, _, _, _ in found])
        self.tell("trials", TRIALS, TRIALS)
        ratio, target, plan, extra = max(found, key=lambda f: f[0] if f[0] <= self.value else -f[0])
        if ratio > (1 + TOLERANCE) * self.value:
            raise BudgetError(
                f"--latency {self.value:g} was not met in {len(found)} trials: the nearest took {self._nearest():.3f}",
                hint=f"the smallest takes {self.smallest:.3f}; is the machine busy? ask for a little more, or try again",
            )
        self.machine.store.put("targets", key, target)
        self.machine.store.save()
        return plan, extra

    def _target(self, over: Sequence[bool]) -> float:
        """Where the predictions tried so far say that the measured ratio is a little under what was asked for.

        over: for every trial whether it was above the budget. By interpolation between the nearest ones on either side, and
        halfway between them where the last two trials were on the same side, so that a bend in the curve ends no search.
        """
        aim = AIM * self.value
        below = max((p, r) for p, r in self._points if r <= aim or p == self._least)
        above = min(((p, r) for p, r in self._points if r > aim and p > below[0]), default=(1.0, 1.0))
        part = 0.5 if len(over) > 1 and over[-1] == over[-2] else (aim - below[1]) / max(above[1] - below[1], 1e-9)
        between = below[0] + min(1.0, max(0.0, part)) * (above[0] - below[0])
        return min(1 - STEP, max(round(STEP * round(between / STEP), 6), self._least * (1 + 1e-6)))

    def _nearest(self) -> float:
        return min((r for _, r in self._points), key=lambda r: abs(r - self.value))

    def _tried(self, plan: Plan) -> Trial:
        """Measures a plan, unless one with the same widths was."""
        widths = widths_of(self.costs, {name: len(k.indices) for name, k in plan.groups.items()})
        key = tuple(widths.tolist())
        if key not in self._trials:
            rounds = self._time(plan)
            self._note(key, Trial(self.costs.ratio(widths), rounds.ratio(1), len(rounds)))
        return self._trials[key]

    def _note(self, key: tuple[int, ...], trial: Trial) -> None:
        old = self._trials.get(key)
        if old is not None:
            self._points.remove((old.predicted, old.measured.median))
        self._trials[key] = trial
        self._points.append((trial.predicted, trial.measured.median))

    def confirm(self, plan: Plan, pruned: onnx.ModelProto) -> bool:
        """Measures what is to be written, for longer; whether it is as near to the budget as was asked for."""
        widths = widths_of(self.costs, {name: len(k.indices) for name, k in plan.groups.items()})
        self.confirmed = self.machine.meter.networks([self.imported.model, pruned], self.machine.feeds, CONFIRM_SECONDS)
        trial = Trial(self.costs.ratio(widths), self.confirmed.ratio(1), len(self.confirmed))
        self._note(tuple(widths.tolist()), trial)
        return self.met

    @property
    def met(self) -> bool:
        """Whether the last confirmation lies within five per cent of what was asked for."""
        return self.confirmed is not None and abs(self.confirmed.ratio(1).median / self.value - 1) <= TOLERANCE

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """What was asked, predicted and measured, for the report."""
        assert self.confirmed is not None
        widths = widths_of(self.costs, {name: len(k.indices) for name, k in plan.groups.items()})
        original, pruned = self.confirmed.spreads
        return {
            "asked": self.value,
            "predicted": self.costs.ratio(widths),
            "measured": self.confirmed.ratio(1).to_json(),
            "met": self.met,
            "seconds": {"original": original.to_json(), "pruned": pruned.to_json()},
            "rounds": len(self.confirmed),
            "smallest": self.smallest,
            "inputs": self._sizes,
            "machine": self.machine.meter.key,
            "trials": [t.to_json() for t in self._trials.values()],
        }


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
