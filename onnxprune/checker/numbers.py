"""The arithmetic of a certificate, done again from its own numbers: every bound put back into what defines it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.special import bdtr, bdtrc

from onnxprune.errors import ValidationError

CLOSE = 2e-5  # relative: numbers are written with six digits, bounds rounded up
K = 3.0
CHANGED = "was the file, the report or the certificate changed?"
LEVELS = (0.1, 0.01)
GRID = (*(f / 100 for f in range(98, 90, -2)), *(f / 100 for f in range(90, 0, -5)))


def demand(holds: bool, what: str) -> None:
    """Raises ValidationError unless it holds."""
    if not holds:
        raise ValidationError(f"the certificate does not hold: {what}", hint=CHANGED)


def same(told: Any, found: float, what: str, close: float = CLOSE, slack: float = 1e-30) -> None:
    """Raises ValidationError unless a number is what was found; null stands for what is not finite.

    close: the relative difference that is let pass, beside an absolute one of `slack`.
    """
    if told is None or not math.isfinite(found):
        demand(told is None and not math.isfinite(found), f"{what} is {told}, but should be {found:.6g}")
        return
    good = isinstance(told, int | float) and abs(told - found) <= close * max(abs(found), abs(float(told))) + slack
    demand(good, f"{what} is {told}, but should be {found:.6g}")


def equal(told: Any, found: Any, what: str) -> None:
    demand(type(told) is type(found) and told == found, f"{what} is {told}, but should be {found}")


def sampling(part: Mapping[str, Any], sizes: Mapping[str, int], readers: Mapping[str, Sequence[str]], prunable: int) -> None:
    """sizes: channels by group. readers: the groups that every layer reads. prunable: how many groups there are to cut."""
    equal(part["K"], K, "sampling: K")
    channels = sum(sizes[name] for name in part["groups"])
    missed = min(1.0, channels * math.exp(-part["samples"] / 3.0))
    same(part["delta_calibration"], missed, "sampling: delta_calibration")
    for name, g in part["groups"].items():
        where = f"sampling of group '{name}'"
        same(g["delta"], part["delta"] / prunable, f"{where}: delta")
        equal(g["vacuous"], g["epsilon"] >= 1, f"{where}: vacuous")
        demand(1 <= g["draws"] < 2**63 and g["events"] >= 1 and g["added_sum"] >= 0, f"{where}: impossible counts")
        demand(g["sampled_sum"] + g["added_sum"] <= 2 * g["sensitivity_sum"] * (1 + CLOSE), f"{where}: its sums do not fit")
        bernstein = part["delta"] / prunable
        if g["searched"]:
            bernstein /= sizes[name] * g["draws"] * (g["draws"] + 1.0)
        eps = g["epsilon"] - K * g["added_sum"]
        exponent = 3 * eps**2 * g["draws"] / (K * g["sampled_sum"] * (6 + 2 * eps))
        same(exponent, math.log(2 * g["events"] / bernstein), f"{where}: epsilon (in Bernstein's exponent)", 1e-4)
    equal(sorted(part["layers"]), sorted(n for n, r in readers.items() if set(r) & set(part["groups"])), "sampling: layers")
    for name, x in part["layers"].items():
        read = [g for g in readers[name] if g in part["groups"]]
        equal(x["groups"], read, f"sampling of layer '{name}': groups")
        found = [part["groups"][g] for g in read]
        equal(x["draws"], sum(g["draws"] for g in found), f"sampling of layer '{name}': draws")
        for key in ("sensitivity_sum", "epsilon", "delta"):
            same(x[key], sum(g[key] for g in found), f"sampling of layer '{name}': {key}")
        equal(x["vacuous"], x["epsilon"] >= 1 or missed >= 1, f"sampling of layer '{name}': vacuous")
    equal(part["vacuous"], any(x["vacuous"] for x in part["layers"].values()), "sampling: vacuous")


def calibration(part: Mapping[str, Any]) -> None:
    equal(part["K"], 1, "calibration: K")
    for name, x in part["layers"].items():
        demand(0 <= x["dropped_sensitivity"] <= x["bound"] * (1 + CLOSE), f"calibration of layer '{name}': its sums do not fit")
        equal(x["vacuous"], x["bound"] >= 1, f"calibration of layer '{name}': vacuous")
    equal(part["vacuous"], all(x["vacuous"] for x in part["layers"].values()), "calibration: vacuous")


def network(part: Mapping[str, Any]) -> None:
    known = {k: x for k, x in part["outputs"].items() if "absent" not in x}
    for name, x in known.items():
        where = f"network, output '{name}'"
        vacuous = x["relative_l2_bound"] is None or x["relative_l2_bound"] >= 1
        equal(x["vacuous"], vacuous, f"{where}: vacuous")
        for key in ("max_abs", "relative_l2"):
            bound, measured = x[f"{key}_bound"], x[f"{key}_measured"]
            demand(bound is None or (measured is not None and measured <= bound), f"{where}: {key} moved beyond its bound")
    equal(part["vacuous"], all(x["vacuous"] for x in known.values()), "network: vacuous")


def population(part: Mapping[str, Any]) -> None:
    """Clopper-Pearson limits and ranks, by the binomial tails that define them."""
    n, statements = part["samples"], part["statements"]
    demand(part["candidates"] in range(1, 10**6) and 0 < part["delta"] < 1, "population: impossible counts")
    levels = [s["alpha"] for s in statements if s["kind"] == "relative_l2"]
    demand(tuple(levels) in ((), LEVELS), "population: levels other than those fixed beforehand")
    _budget(part, {s["kind"]: s for s in statements})
    for s in statements:
        where = f"population, {s['kind']}"
        same(s["delta"], part["delta"] / len(statements) / part["candidates"], f"{where}: delta", 1e-9)
        delta = s["delta"]
        if s["kind"] == "top1_changes":
            _at_most(s["alpha"], s["changed"], n, delta, where)
            equal(s["vacuous"], s["alpha"] >= 1, f"{where}: vacuous")
        elif s["kind"] == "top1_drop":
            _fall(s, n, where)
        else:
            demand(s["kind"] == "relative_l2", f"{where} is not known")
            _order_statistic(s, n, where)
    equal(part["vacuous"], all(s["vacuous"] for s in statements), "population: vacuous")


def _budget(part: Mapping[str, Any], kinds: Mapping[str, Mapping[str, Any]]) -> None:
    """What --max-drop certified: the limit of the same counts at its own delta; the rest pays for the choice."""
    drop = part.get("max_drop")
    if drop is None:
        return
    equal(part["candidates"], len(GRID), "population: candidates")
    n, delta = part["samples"], drop["delta"]
    if "top1_drop" in kinds:
        s = kinds["top1_drop"]
        found = _limit(s["lost"], n, delta / 2) - _least(s["gained"], n, delta / 2)
        changed = s["lost"] or s["gained"]
    else:
        changed = kinds["top1_changes"]["changed"]
        found = _limit(changed, n, delta)
    if drop["macs"] == 1.0 and not changed:  # the whole network, which needs no test
        equal(drop["limit"], 0.0, "population: the limit of max_drop")
    else:
        same(drop["limit"], found, "population: the limit of max_drop", 1e-4)
    demand(0 < drop["value"] < 1 and drop["limit"] <= drop["value"], "population: max_drop is not met")
    demand(f"at most {drop['value']:.9g}:" in drop["statement"], "population: max_drop states another value than it has")


def _limit(seen: int, n: int, delta: float) -> float:
    return 1.0 if seen == n else _solved(lambda p: bdtr(seen, n, p) - delta)


def _least(seen: int, n: int, delta: float) -> float:
    return _solved(lambda p: delta - bdtrc(seen - 1, n, p)) if seen else 0.0


def _at_most(alpha: float, seen: int, n: int, delta: float, where: str) -> None:
    demand(0 <= seen <= n, f"{where}: impossible counts")
    if seen == n:
        equal(float(alpha), 1.0, f"{where}: alpha")
    else:
        same(alpha, _limit(seen, n, delta), f"{where}: alpha")


def _fall(s: Mapping[str, Any], n: int, where: str) -> None:
    """Pr[lost] <= u and Pr[gained] >= l, each with confidence 1 - delta/2, give accuracy before - after <= u - l."""
    lost, gained, half = s["lost"], s["gained"], s["delta"] / 2
    demand(0 <= lost <= n and 0 <= gained <= n - lost, f"{where}: impossible counts")
    same(s["drop"], _limit(lost, n, half) - _least(gained, n, half), f"{where}: drop", 1e-4)
    equal(s["vacuous"], s["drop"] >= 1, f"{where}: vacuous")


def _order_statistic(s: Mapping[str, Any], n: int, where: str) -> None:
    q, delta, r = 1 - s["alpha"], s["delta"], s["rank"]
    needed = s["samples_needed"]
    demand(
        isinstance(needed, int) and q**needed <= delta * (1 + 1e-9) and q ** (needed - 1) > delta, f"{where}: samples_needed"
    )
    equal(s["vacuous"], s["x"] is None, f"{where}: vacuous")
    if r is None:
        demand(q**n > delta and s["x"] is None, f"{where}: there are enough samples, but no rank")
        return
    good = isinstance(r, int) and 1 <= r <= n and bdtrc(r - 1, n, q) <= delta and (r == 1 or bdtrc(r - 2, n, q) > delta)
    demand(good, f"{where}: rank {r}")


def _solved(falling: Any) -> float:
    """The zero of a function that falls on [0, 1], by bisection."""
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2
