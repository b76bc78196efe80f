#!/usr/bin/env python3
"""Show by simulation that a certificate's statements fail no more often than they say, and that broken ones do.

    python tools/simulate_certificates.py sampling   [--trials 4000]
    python tools/simulate_certificates.py population [--trials 4000]
    python tools/simulate_certificates.py models MODEL... [--data DATA] [--samples 32] [--macs 0.9 0.7 0.5] [--mean ...]

`sampling` draws calibration samples, channels and a fresh input of synthetic layers; a failure is an output that moves by more
than epsilon. `population` draws held-out samples of sources whose truth is known. Both end with controls that must fail: wrong
constants, no reweighting, samples used twice. `models` compares, on every calibration sample of real networks, each layer's
deviation with the calibration part's bound, and each output's with the network part's. Without --data samples are noise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from onnx import helper
from scipy.stats import norm

import onnxprune
from onnxprune import confidence, runtime, theory
from onnxprune.certificate.population import LEVELS, Observed, population
from onnxprune.contraction import consumers, normal_form, weight_values
from onnxprune.criteria.kernels import build_session, parts
from onnxprune.data import ImageOptions, choose, open_data
from onnxprune.imported import load
from onnxprune.plan import Plan

Array = np.ndarray[Any, Any]


class Rate(NamedTuple):
    """How often a statement failed in `trials` trials; `limit` is what it promises, or what a control must exceed."""

    name: str
    failures: int
    trials: int
    limit: float
    control: bool = False

    @property
    def good(self) -> bool:
        rate = self.failures / self.trials
        return rate > self.limit if self.control else rate <= self.limit

    def __str__(self) -> str:
        promise = f"must exceed {self.limit:g}" if self.control else f"at most {self.limit:g}"
        mark = "ok" if self.good else "WRONG"
        return f"{mark:5} {self.name}: {self.failures} of {self.trials} failed = {self.failures / self.trials:.4f} ({promise})"


# --------------------------------------------------------------------------------------------------------- sampling


class Source(NamedTuple):
    """A synthetic layer: weights [O, C], and how its inputs are drawn: (generator, count) -> [count, C]."""

    weights: Array
    inputs: Callable[[np.random.Generator, int], Array]


def flat(rng: np.random.Generator, channels: int = 2000) -> Source:
    """All channels alike: the case in which the theorem says something."""
    return Source(rng.uniform(0.5, 1.5, (4, channels)), lambda r, n: r.uniform(0.5, 1.5, (n, channels)))


def skewed(rng: np.random.Generator, channels: int = 1000) -> Source:
    """Twenty channels matter two hundred times as much."""
    scale = np.where(np.arange(channels) < 20, 200.0, 1.0)
    return Source(rng.uniform(0.5, 1.5, (4, channels)), lambda r, n: r.uniform(0.5, 1.5, (n, channels)) * scale)


def signed(rng: np.random.Generator, channels: int = 1500) -> Source:
    """Weights of both signs, inputs behind a ReLU of which a quarter is zero."""
    return Source(rng.standard_normal((3, channels)), lambda r, n: np.maximum(r.uniform(-0.5, 1.5, (n, channels)), 0.0))


def sparse(rng: np.random.Generator, channels: int = 1000) -> Source:
    """Every channel fires in 40 of 100 inputs: the draws say least of a fresh one."""
    return Source(
        rng.uniform(0.5, 1.5, (4, channels)), lambda r, n: r.uniform(0.5, 1.5, (n, channels)) * (r.random((n, channels)) < 0.4)
    )


def events(w: Array, a: Array) -> Iterator[tuple[Array, Array]]:
    """(terms [O, C], their sums [O]) of every sign part of the weights for one input that is not negative."""
    for sign in (1.0, -1.0):
        terms = np.maximum(sign * w, 0.0) * a
        sums = terms.sum(axis=1)
        if (sums > 0).any():
            yield terms[sums > 0], sums[sums > 0]


def sensitivities(w: Array, samples: Array) -> tuple[Array, int]:
    """(the largest share of every channel on the samples [C], how many events one input has)."""
    best, count = np.zeros(w.shape[1]), 0
    for a in samples:
        found = list(events(w, a))
        count = max(count, sum(len(z) for _, z in found))
        for terms, z in found:
            np.maximum(best, (terms / z[:, None]).max(axis=0), out=best)
    return best, count


def sampling_rate(
    name: str,
    make: Callable[[np.random.Generator], Source],
    trials: int,
    *,
    eps: float = 0.5,
    delta: float = 0.1,
    fewer: float = 1.0,
    uniform: bool = False,
    reweight: bool = True,
    certain: int = 0,
    control: bool = False,
    seed: int = 0,
) -> Rate:
    """Failures of the theorem. fewer: by which the draws are divided; uniform, not reweight: broken estimators.

    certain: how many of the largest channels are kept without a draw (the hybrid).
    """
    rng = np.random.default_rng(seed)
    source = make(rng)
    w, failures = source.weights, 0
    for _ in range(trials):
        s, count = sensitivities(w, source.inputs(rng, 12))
        top = np.argsort(-s)[:certain]
        rest = s.copy()
        rest[top] = 0.0
        m = max(1, round(theory.draws(eps, float(rest.sum()), count, delta) / fewer))
        p = theory.probabilities(np.where(np.arange(s.size) < s.size, 1.0, 0.0) if uniform else rest)
        counts = rng.multinomial(m, p)
        weight = theory.weights(counts, p) if reweight else (counts > 0).astype(np.float64)
        weight[top] = 1.0
        a = source.inputs(rng, 1)[0]
        failures += any((np.abs(terms @ weight - z) > eps * z).any() for terms, z in events(w, a))
    return Rate(name, failures, trials, delta, control)


def sampling(trials: int) -> list[Rate]:
    """The theorem on three layers and as a hybrid, then what breaks it."""
    return [
        sampling_rate("sampling, channels alike", flat, trials),
        sampling_rate("sampling, few large channels", skewed, trials),
        sampling_rate("sampling, both signs", signed, trials),
        sampling_rate("sampling, channels that fire rarely", sparse, trials),
        sampling_rate("sampling, hybrid with 20 certain channels", skewed, trials, certain=20),
        sampling_rate("control: uniform probabilities", skewed, trials, uniform=True, control=True),
        sampling_rate("control: no reweighting", flat, trials, reweight=False, control=True),
        sampling_rate("control: a constant 32 times too small", sparse, trials, fewer=32.0, control=True),
    ]


# ------------------------------------------------------------------------------------------------------- population


class Truth(NamedTuple):
    """A source: probabilities of a lost, a gained and another changed answer, and the spread of the log-normal distances."""

    lost: float
    gained: float
    other: float
    spread: float = 1.0

    @property
    def same(self) -> float:
        return 1 - self.lost - self.gained - self.other

    def observe(self, rng: np.random.Generator, n: int) -> Observed:
        """n independent samples."""
        lost, gained, other, _ = rng.multinomial(n, [self.lost, self.gained, self.other, self.same])
        moved = np.exp(self.spread * rng.standard_normal(n))
        return Observed(n, int(lost + gained + other), int(lost), int(gained), tuple(moved.tolist()))

    def broken(self, statement: dict[str, Any]) -> bool:
        """Whether a statement of the part `population` is false."""
        if statement["kind"] == "top1_changes":
            return self.lost + self.gained + self.other > statement["alpha"]
        if statement["kind"] == "top1_drop":
            return self.lost - self.gained > statement["drop"]
        return statement["x"] is not None and self.beyond(statement["x"]) > statement["alpha"]

    def beyond(self, x: float) -> float:
        """Probability of a distance above x."""

        return float(norm.sf(np.log(x) / self.spread)) if x > 0 else 1.0


def statement_rate(name: str, truth: Truth, n: int, trials: int, delta: float = 0.1, seed: int = 1) -> Rate:
    """Trials in which any of the joint statements is false."""
    rng = np.random.default_rng(seed)
    told = (population(truth.observe(rng, n), delta)["statements"] for _ in range(trials))
    return Rate(name, sum(any(truth.broken(s) for s in statements) for statements in told), trials, delta)


def single_rate(name: str, claim: Callable[[int, int], float], p: float, n: int, trials: int, **kind: Any) -> Rate:
    """Trials in which claim(events, n) lies below the probability p of the event."""
    seen = np.random.default_rng(2).binomial(n, p, trials)
    claims = {k: claim(int(k), n) for k in np.unique(seen)}
    return Rate(name, sum(claims[k] < p for k in seen), trials, **kind)


def order_rate(name: str, n: int, alpha: float, delta: float, trials: int, *, lower: int = 0, control: bool = False) -> Rate:
    """Trials in which more than alpha of all values exceed the order statistic; lower: by how many ranks it is too low."""
    rng = np.random.default_rng(3)
    r = confidence.rank(n, alpha, delta)
    assert r is not None
    values = np.sort(rng.random((trials, n)), axis=1)[:, r - 1 - lower]
    return Rate(name, int((1 - values > alpha).sum()), trials, delta, control)


def chosen_rate(
    name: str, trials: int, *, candidates: int, paid: int, p: float = 0.1, n: int = 400, control: bool = False
) -> Rate:
    """The best of several networks, all with the same p, chosen on the samples that certify it. paid: the division of delta."""
    rng = np.random.default_rng(4)
    best = rng.binomial(n, p, (trials, candidates)).min(axis=1)
    limits = {k: confidence.upper(int(k), n, confidence.shared(0.1, paid)) for k in np.unique(best)}
    return Rate(name, sum(limits[k] < p for k in best), trials, 0.1, control)


def sequence_rate(name: str, trials: int, *, sequential: bool, control: bool = False) -> Rate:
    """--max-drop 0.1: nets with p = 0.02 ... 0.08, then ten just above 0.1; a failure is one of these being certified."""
    rng, n, delta = np.random.default_rng(5), 400, 0.1
    truth = np.array([0.02, 0.04, 0.06, 0.08, *[0.101] * 10])
    failures = 0
    limits = np.array([confidence.upper(k, n, delta) for k in range(n + 1)])
    for _ in range(trials):
        passes = list(limits[rng.binomial(n, truth)] <= 0.1)
        if sequential:
            last, _ = confidence.fixed_sequence(range(len(truth)), passes.__getitem__)
        else:
            last = max((i for i, good in enumerate(passes) if good), default=None)
        failures += last is not None and truth[last] > 0.1
    return Rate(name, failures, trials, delta, control)


def people(trials: int) -> list[Rate]:
    """The statements of the part `population` singly, jointly and after a choice, then what breaks them."""
    exact = [
        single_rate(f"Clopper-Pearson, n={n} p={p}", lambda k, n: confidence.upper(k, n, 0.05), p, n, trials, limit=0.05)
        for n, p in ((50, 0.02), (200, 0.1), (200, 0.5), (2000, 0.01))
    ]
    orders = [order_rate(f"order statistic, n={n} alpha={a}", n, a, 0.05, trials) for n in (600, 2000) for a in LEVELS]
    joint = [
        statement_rate(f"all statements jointly, n={n}", truth, n, trials)
        for n, truth in ((100, Truth(0.05, 0.01, 0.02)), (500, Truth(0.2, 0.1, 0.1, 2.0)), (2000, Truth(0.01, 0.0, 0.0)))
    ]
    return [
        *exact,
        *orders,
        *joint,
        chosen_rate("best of 20, delta shared out", trials, candidates=20, paid=20),
        sequence_rate("fixed sequence", trials, sequential=True),
        single_rate("control: the observed fraction", lambda k, n: k / n, 0.1, 200, trials, limit=0.05, control=True),
        order_rate("control: six ranks lower", 600, 0.1, 0.05, trials, lower=6, control=True),
        chosen_rate("control: best of 20, unpaid", trials, candidates=20, paid=1, control=True),
        sequence_rate("control: all tested, smallest taken", trials, sequential=False, control=True),
    ]


# ------------------------------------------------------------------------------------------------- on real networks


class Deviation(NamedTuple):
    """The largest deviation of a layer over its bound, in all events of all calibration samples."""

    layer: str
    ratio: float
    events: int


def deviations(model: Any, data: Any, result: onnxprune.Result, images: ImageOptions, samples: int) -> Iterator[Deviation]:
    """Every layer of the calibration part: |sum_j (w_j - 1) c_j| over bound * z, with the sums that ONNX Runtime computes."""
    imported = load(model)
    groups, told = imported.groups, (result.certificate or {})["calibration"]
    source = open_data(data, imported.specs, images)
    chosen = choose(len(source), samples, result.report["seed"])
    layers = [x for x in consumers(groups) if x.name in told["layers"]]
    weights = weight_values(groups.net, layers)
    fixed = next((s.shape[0] for s in imported.specs if s.shape and s.shape[0]), 8)
    session = runtime.session(runtime.with_outputs(groups.net.source, [x.x.tensor for x in layers]))
    worst = {x.name: [0.0, 0] for x in layers}
    for start in range(0, len(chosen), fixed):
        feeds = source.batch(np.resize(chosen[start : start + fixed], fixed))
        names = list(dict.fromkeys(x.x.tensor for x in layers))
        seen = dict(zip(names, runtime.run(session, feeds, names), strict=True))
        for layer in layers:
            factor = _factors(groups, layer, result.plan)
            for c in normal_form(groups, layer, seen[layer.x.tensor], weights[layer]):
                for part in parts(c):
                    z = _conv(c, part.x, part.w)
                    change = (factor[c.positions] - 1.0).reshape(1, -1, *[1] * (part.w.ndim - 2))
                    moved = _conv(c, part.x, part.w * change)
                    axes = tuple(range(1, z.ndim))
                    live = z > 1e-6 * z.max(axis=axes, keepdims=True)
                    most, size = z[live] * told["layers"][layer.name]["bound"], np.abs(moved[live])
                    ratio = np.divide(size, most, out=np.where(size > 0, np.inf, 0.0), where=most > 0)
                    worst[layer.name][0] = max(worst[layer.name][0], float(ratio.max(initial=0.0)))
                    worst[layer.name][1] += int(live.sum())
    for name, (ratio, count) in worst.items():
        yield Deviation(name, ratio, int(count))


def _factors(groups: Any, layer: Any, plan: Plan) -> Array:
    """The weight of every position of the channel axis that a layer reads: 1, 0, or what the plan rescales it by."""
    factor = np.ones(groups.full(layer.x), np.float32)
    for group, slot in groups.at.get(layer.x, []):
        if group.id in plan.groups:
            kept = plan.groups[group.id]
            weight = np.zeros(kept.size, np.float32)
            weight[kept.indices] = 1.0 if kept.scale is None else kept.scale
            factor[slot.positions] = weight[slot.channels]
    return factor


def _conv(c: Any, x: Array, w: Any) -> Array:
    """One convolution of the contraction's shape; w [O, I, *taps] is scaled along I by the caller."""
    node = helper.make_node("Conv", ["x", "w"], ["z"], **c.attributes)
    session = build_session([node], ["x", "w"], ["z"], {}, None)
    return np.asarray(runtime.run(session, {"x": x, "w": np.ascontiguousarray(w, np.float32)})[0], np.float64)


def noise(model: Path, count: int) -> Array | dict[str, Array]:
    """Random samples for a model that comes without data."""
    specs = load(model).specs
    rng = np.random.default_rng(0)
    return {s.name: rng.standard_normal((count, *(d or 32 for d in s.shape[1:]))).astype(s.dtype) for s in specs}


def on_models(args: argparse.Namespace) -> int:
    """Prints, for every model and size, how close deviations come to the bounds; returns the number of violations."""
    images = ImageOptions(mean=tuple(args.mean) if args.mean else None, std=tuple(args.std) if args.std else None)
    violations = 0
    for path in args.models:
        data = args.data or noise(path, args.samples + 8)
        for macs in args.macs:
            for method in ("pfp-deterministic", "pfp", "pfp-random"):
                options = {"method": method, "recover": "none", "samples": args.samples, "images": images}
                result = onnxprune.prune(path, data, budget={"macs": macs}, **options)
                found = list(deviations(path, data, result, images, args.samples))
                told = (result.certificate or {})["network"]
                over = sum(d.ratio > 1 for d in found)
                violations += over
                worst, total = max((d.ratio for d in found), default=0.0), sum(d.events for d in found)
                print(
                    f"{path.stem} macs {macs:g} {method}: {over} violations in {total} events of {len(found)} layers, "
                    f"largest deviation {worst:.3f} of its bound",
                    flush=True,
                )
                for name, x in told.get("outputs", {}).items():
                    violations += "a bug" in x.get("absent", "")
                    print(f"    network '{name}': {x}")
    return violations


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="part", required=True)
    for name in ("sampling", "population"):
        kinds.add_parser(name).add_argument("--trials", type=int, default=4000)
    models = kinds.add_parser("models")
    models.add_argument("models", type=Path, nargs="+")
    models.add_argument("--data")
    models.add_argument("--samples", type=int, default=32)
    models.add_argument("--macs", type=float, nargs="+", default=[0.9, 0.7, 0.5])
    for name in ("--mean", "--std"):
        models.add_argument(name, type=float, nargs="+")
    args = parser.parse_args()
    if args.part == "models":
        return int(on_models(args) > 0)
    rates = sampling(args.trials) if args.part == "sampling" else people(args.trials)
    for rate in rates:
        print(rate)
    return int(not all(r.good for r in rates))


if __name__ == "__main__":
    sys.exit(main())
