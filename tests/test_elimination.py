"""Block elimination against least squares over what is left, and the scores and plans that come of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from single import build, seeded, w

from onnxprune.budget import Budget
from onnxprune.elimination import Problem
from onnxprune.elimination import eliminate as by_elimination
from onnxprune.errors import DataError
from onnxprune.groups import Accounting, Groups
from onnxprune.passes import eliminate as module
from onnxprune.passes.allocate import allocate
from onnxprune.passes.eliminate import eliminate
from onnxprune.selection import Selector, Widths

__all__ = ["seeded"]  # every test draws the same weights

Array = np.ndarray[Any, Any]


def problem(seed: int, units: int = 5, block: int = 2, outs: int = 3, rows: int = 60) -> tuple[Array, Problem]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, units * block)) @ rng.standard_normal((units * block, units * block))
    x -= x.mean(0)
    matrix = rng.standard_normal((units * block, outs))
    columns = rng.permutation(units * block).reshape(units, block)
    return x, Problem(x.T @ x, matrix, np.arange(units), columns)


def left_over(x: Array, p: Problem, gone: list[int]) -> float:
    """The relative squared error of the best fit without these units."""
    z = x @ p.matrix
    kept = np.delete(np.arange(x.shape[1]), p.rows[gone].ravel())
    fit = x[:, kept] @ np.linalg.lstsq(x[:, kept], z, rcond=None)[0]
    return float(((z - fit) ** 2).sum() / (z**2).sum())


def test_every_step_is_the_best_and_costs_what_least_squares_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.elimination.DAMPING", 1e-12)
    for seed in range(4):
        x, p = problem(seed)
        scores = by_elimination([[p]], 5)
        gone: list[int] = []
        before, so_far = 0.0, 0.0
        for unit in np.argsort(scores, kind="stable"):
            errors = {u: left_over(x, p, [*gone, u]) for u in range(5) if u not in gone}
            best = min(errors, key=lambda u: errors[u])
            assert int(unit) == best
            so_far = max(so_far, errors[best] - before)
            assert scores[unit] == pytest.approx(so_far, rel=1e-6)
            before = errors[best]
            gone.append(best)


def test_a_copy_of_a_channel_goes_first_and_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.elimination.DAMPING", 1e-9)
    x, p = problem(0, block=1)
    x[:, p.rows[3, 0]] = 2 * x[:, p.rows[1, 0]]
    scores = by_elimination([[Problem(x.T @ x, p.matrix, p.units, p.rows)]], 5)
    first, second = np.argsort(scores)[:2]
    assert first in (1, 3)
    assert scores[first] < 1e-2 * scores[second]


def test_amplitudes_of_several_consumers_add_and_absent_units_cost_nothing() -> None:
    a, b = problem(1, block=1)[1], problem(2, block=1)[1]
    alone = [by_elimination([[p]], 5) for p in (a, b)]
    both = by_elimination([[a], [b]], 5)
    first = int(np.argmin(both))
    single = [np.zeros(5) for _ in range(2)]
    for found, p in zip(single, (a, b), strict=True):
        damping = 1e-2 * np.trace(p.gram) / 5
        inverse = np.linalg.inv(p.gram + damping * np.eye(5))
        found[p.units] = [(p.matrix[r[0]] ** 2).sum() * (1 / inverse[r[0], r[0]] - damping) / p.energy for r in p.rows]
    together = (np.sqrt(single[0]) + np.sqrt(single[1])) ** 2
    assert first == int(np.argmin(together))
    assert both[first] == pytest.approx(together[first])
    assert min(alone[0]) == pytest.approx(single[0].min())
    part = Problem(a.gram, a.matrix, a.units[:3], a.rows[:3])
    assert (by_elimination([[part]], 5)[3:] < 1e-6).all()


def test_units_that_do_not_adapt_cost_what_they_add() -> None:
    costs = np.array([4.0, 1.0, 2.0])[:, None, None]
    scores = by_elimination([[Problem(costs, np.ones_like(costs), np.arange(3), np.zeros((3, 1), np.int64))]], 3)
    np.testing.assert_allclose(scores, [4 / 7, 1 / 7, 2 / 7])


def one_by_one(p: Problem, damping: float) -> list[float]:
    """The costs in turn by the formulas of the books: the whole inverse and all weights brought up to date at every step."""
    inverse, matrix = np.linalg.inv(p.gram + damping * np.eye(len(p.gram))), p.matrix.copy()
    left, costs = list(range(len(p.units))), []
    while left:
        found = []
        for unit in left:
            r = p.rows[unit]
            held_back = damping * (matrix[r] ** 2).sum()
            found.append(np.trace(matrix[r].T @ np.linalg.solve(inverse[np.ix_(r, r)], matrix[r])) - held_back)
        costs.append(min(found))
        r = p.rows[left.pop(int(np.argmin(found)))]
        step = inverse[:, r] @ np.linalg.inv(inverse[np.ix_(r, r)])
        matrix = matrix - step @ matrix[r]
        inverse = inverse - step @ inverse[r]
        matrix[r], inverse[r], inverse[:, r] = 0, 0, 0
    return list(np.maximum.accumulate(costs) / p.energy)


@pytest.mark.parametrize("waiting", [1, 20, 10_000])
@pytest.mark.parametrize(("units", "block", "outs", "beside"), [(40, 4, 7, 0), (120, 1, 5, 30), (30, 3, 200, 11)])
def test_waiting_with_what_was_dropped_changes_nothing(
    units: int, block: int, outs: int, beside: int, waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the matrices are left as they were, with columns of no channel and with more outputs than columns."""
    monkeypatch.setattr("onnxprune.elimination.WAITING", waiting)
    rng = np.random.default_rng(units)
    size = units * block + beside
    x = rng.standard_normal((500, size // 2)) @ rng.standard_normal((size // 2, size)) + 0.3 * rng.standard_normal((500, size))
    columns = rng.permutation(size)[: units * block].reshape(units, block)
    p = Problem(x.T @ x, rng.standard_normal((size, outs)), np.arange(units), columns)
    scores = np.sort(by_elimination([[p]], units))
    np.testing.assert_allclose(scores, one_by_one(p, 1e-2 * np.trace(p.gram) / size), rtol=1e-7)


@pytest.mark.parametrize(("units", "block", "outs", "beside"), [(40, 4, 7, 0), (120, 1, 5, 30), (50, 3, 200, 11)])
def test_few_rows_do_as_well_as_their_gram_matrix(
    units: int, block: int, outs: int, beside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(units)
    size = units * block + beside
    x = rng.standard_normal((12, size))
    x -= x.mean(0)
    columns = rng.permutation(size)[: units * block].reshape(units, block)
    rest = (rng.standard_normal((size, outs)), np.arange(units), columns, len(x))
    of_gram = by_elimination([[Problem(x.T @ x, *rest)]], units)
    np.testing.assert_allclose(by_elimination([[Problem(x, *rest, few=True)]], units), of_gram, rtol=1e-8)
    monkeypatch.setattr("onnxprune.elimination.FEWEST", 1)  # brought up to date all the time
    np.testing.assert_allclose(by_elimination([[Problem(x, *rest, few=True)]], units), of_gram, rtol=1e-8)


# ------------------------------------------------------------------------------------------------------- the pass


def test_few_samples_are_kept_instead_of_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = build([("Conv", "a wb", "y")], {"wb": w(4, 8, 3, 3)}, x=X)
    products = scored(groups, 2)["a"]
    monkeypatch.setattr("onnxprune.recovery.leastsq.FEW", 1)
    seen: list[bool] = []
    solve = Problem.energy.fget
    assert solve is not None
    monkeypatch.setattr(Problem, "energy", property(lambda p: (seen.append(p.few), solve(p))[1]))
    np.testing.assert_allclose(scored(groups, 2)["a"], products, rtol=1e-5)
    assert seen == [True]


def scored(groups: Groups, n: int = 24, **options: Any) -> dict[str, Array]:
    shape = groups.net.shapes["x"]
    data = [{"x": np.random.default_rng(i).standard_normal(shape).astype(np.float32)} for i in range(n)]
    saliency = eliminate(groups, lambda: data, n, **options)
    return {s.group: s.values for s in saliency.layers}


X = (1, 12, 6, 6)  # channels enough for eight filters to be independent
REDUNDANT = w(8, 12, 1, 1)
REDUNDANT[6] = REDUNDANT[1] * 2  # the channel of ours that another one replaces, sign and all


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ([("Conv", "a wb", "y", {"pads": [1, 1, 1, 1]})], {"wb": (4, 8, 3, 3)}),
        ([("ConvTranspose", "a wb", "y", {"strides": [2, 2]})], {"wb": (8, 4, 2, 2)}),
        ([("Relu", "a", "r"), ("GlobalAveragePool", "r", "p"), ("Flatten", "p", "f"), ("Gemm", "f wb", "y")], {"wb": (8, 4)}),
        ([("Conv", "a wb", "y"), ("Conv", "a wc", "z")], {"wb": (4, 8, 1, 1), "wc": (2, 8, 3, 3)}),
    ],
    ids=["conv", "transposed", "gemm", "two consumers"],
)
def test_redundant_channels_cost_least(
    nodes: list[Any], weights: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxprune.elimination.DAMPING", 1e-6)
    monkeypatch.setattr("onnxprune.elimination.SHRINKING", 0.0)
    arrays = {k: w(*s) for k, s in weights.items()}
    outputs = "y z" if any(n[2] == "z" for n in nodes) else "y"
    groups = build(nodes, arrays | {"wa": REDUNDANT}, outputs, x=X)
    scores = scored(groups, 64)["a"]
    assert int(np.argmin(scores)) in (1, 6)
    assert scores.min() < 1e-2 * np.sort(scores)[1]


def test_in_a_grouped_convolution_each_half_counts() -> None:
    """Channels of the two halves are cut in pairs, so a pair costs what both halves lose."""
    wb = w(4, 4, 3, 3)
    wb[:, 2] *= 1e-3
    groups = build([("Conv", "a wb", "y", {"group": 2})], {"wb": wb}, x=X)
    (found,) = (v for v in scored(groups, 64).values())
    assert len(found) == groups.prunable[0].size
    lightest = groups.at[next(layer.x for layer in groups.layers if layer.out.tensor == "y")][0][1].positions[np.argmin(found)]
    assert lightest % 4 == 2


def test_wide_layers_are_scored_channel_by_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = build([("Conv", "a wb", "y")], {"wb": w(4, 8, 3, 3), "wa": REDUNDANT}, x=X)
    together = scored(groups)["a"]
    monkeypatch.setattr(module, "WIDEST", 8)
    alone = scored(groups)["a"]
    assert alone.min() > 2 * together.min()  # without its copy a redundant channel is worth something
    monkeypatch.setattr(module, "MEMORY", 1)  # a run of the data for every layer changes nothing
    np.testing.assert_array_equal(scored(groups)["a"], alone)


def test_products_of_activations_cost_their_energy() -> None:
    nodes = [
        ("Reshape", "a s", "t"), ("Transpose", "t", "rows", {"perm": [0, 2, 1]}),
        ("MatMul", "rows wq", "q"), ("MatMul", "rows wk", "k"),
        ("Transpose", "k", "kt", {"perm": [0, 2, 1]}), ("MatMul", "q kt", "y"),
    ]  # fmt: skip
    wq = w(8, 6)
    wq[:, 2] *= 1e-3
    groups = build(nodes, {"wq": wq, "wk": w(8, 6), "s": np.array([1, 8, 36])})
    found = next(v for k, v in scored(groups, 4).items() if k != "a")
    assert int(np.argmin(found)) == 2


def test_runs_alike_do_not_merge_and_name_the_data() -> None:
    groups = build([("Conv", "a wb", "y")], {"wb": w(4, 8, 3, 3)})
    data = [{"x": w(1, 3, 6, 6)}]
    one, two = (eliminate(groups, lambda: data, 1, ("d",)) for _ in range(2))
    np.testing.assert_array_equal(one.layers[0].values, two.layers[0].values)
    assert one.data == ("d",) and one.model_digest == groups.net.digest
    with pytest.raises(DataError, match="do not merge"):
        one.merged(two)


@pytest.mark.parametrize("align", [1, 2])
@pytest.mark.parametrize("keep", [0.8, 0.5, 0.2])
def test_allocation_meets_the_budget_and_keeps_the_best(keep: float, align: int) -> None:
    nodes = [("Relu", "a", "r"), ("Conv", "r wb", "b"), ("Relu", "b", "s"), ("Conv", "s wc", "y")]
    groups = build(nodes, {"wb": w(12, 8, 3, 3), "wc": w(4, 12, 3, 3)})
    shape = groups.net.shapes["x"]
    data = [{"x": np.random.default_rng(i).standard_normal(shape).astype(np.float32)} for i in range(16)]
    saliency = eliminate(groups, lambda: data, 16)
    selector = Selector(groups.prunable, saliency, "elimination", widths=Widths(1, align))
    accounting = Accounting(groups, len(groups.net.source.SerializeToString()))
    chosen = allocate(accounting, groups.prunable, selector, Budget("macs", keep)).choices
    kept = {name: c.indices for name, c in chosen.items()}
    full, macs = accounting.size(accounting.full_widths).macs, accounting.size(accounting.widths(kept)).macs
    assert macs <= keep * full
    for group in groups.prunable:
        width = len(kept[group.id])
        assert width % align == 0
        best = np.sort(np.argsort(-saliency.of(group), kind="stable")[:width])
        np.testing.assert_array_equal(kept[group.id], best)
        if (wider := width + align) <= group.size:  # nothing more fits
            more = kept | {group.id: np.arange(wider)}
            assert accounting.size(accounting.widths(more)).macs > keep * full


def test_the_model_is_left_alone() -> None:
    groups = build([("Conv", "a wb", "y")], {"wb": w(4, 8, 3, 3)})
    before = onnx.ModelProto.FromString(groups.net.source.SerializeToString())
    scored(groups, 2)
    assert groups.net.source == before


def test_few_rows_are_not_trusted_to_say_how_the_others_adapt() -> None:
    """With as many columns as rows anything can be fitted on these rows; what that is worth elsewhere is another matter."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((40, 60))
    x -= x.mean(0)
    other = rng.standard_normal((40_000, 60))
    matrix = rng.standard_normal((60, 4))
    trusting = Problem(x.T @ x, matrix, np.arange(60), np.arange(60)[:, None])
    careful = Problem(x.T @ x, matrix, np.arange(60), np.arange(60)[:, None], len(x))
    many = Problem(other.T @ other, matrix, np.arange(60), np.arange(60)[:, None], len(other))
    errors = [float(np.sort(by_elimination([[p]], 60))[:30].sum()) for p in (trusting, careful, many)]
    assert errors[0] < 0.2 * errors[2]
    assert errors[1] > 0.4 * errors[2]


def test_what_holds_the_others_back_is_no_cost_of_its_own() -> None:
    """Columns that have nothing to do with each other cost their own energy, however strong the damping."""
    x = np.eye(6).repeat(5, axis=0) * np.arange(1, 7)
    matrix = np.ones((6, 1))
    scores = by_elimination([[Problem(x.T @ x, matrix, np.arange(6), np.arange(6)[:, None], samples=2)]], 6)
    energy = 5.0 * np.arange(1, 7) ** 2
    np.testing.assert_allclose(scores, energy / energy.sum(), rtol=1e-9)
