"""The certificate: its four parts on small networks, the recursion operator by operator, and every number tampered with."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import oracle
import pytest
import small
from onnx import numpy_helper

import onnxprune
from onnxprune import certify, cli, confidence, imported, wire
from onnxprune.certificate import network
from onnxprune.certificate.population import GRID, Observed, population
from onnxprune.certificate.recursion import Recursion
from onnxprune.certificate.rules import RULES
from onnxprune.certificate.words import PROPERTY
from onnxprune.checker import Sources, check, numbers
from onnxprune.data import open_data
from onnxprune.errors import BudgetError, DataError, OptionError, ValidationError
from onnxprune.groups import Groups
from onnxprune.passes.surgery import mask, surgery
from onnxprune.plan import Plan

Array = np.ndarray[Any, Any]
ROOT = Path(__file__).resolve().parent.parent
PARTS = ("sampling", "calibration", "network", "population")


@functools.cache
def data(count: int = 240) -> dict[str, Array]:
    """Images with the answers of the chain as labels, a tenth of them wrong."""
    x = small.images(count, seed=5)
    net = oracle._run(small.chain(), {"x": x}, True)[0].argmax(axis=1)
    return {"x": x, "y": np.where(np.arange(count) % 10 == 0, (net + 1) % 10, net)}


@functools.cache
def result(method: str = "pfp-random", name: str = "chain", macs: float = 0.6, align: int = 1) -> onnxprune.Result:
    return prune(small.NETS[name](), data(), budget={"macs": macs}, method=method, samples=20, align=align, delta=0.05)


def prune(*arguments: Any, **options: Any) -> onnxprune.Result:
    """Without recovery, of which three of the parts know nothing; by PFP unless told otherwise."""
    return onnxprune.prune(*arguments, **{"recover": "none", "method": "pfp", **options})


def told(found: onnxprune.Result) -> dict[str, Any]:
    assert found.certificate is not None
    return copy.deepcopy(found.certificate)


def run(*arguments: str) -> int:
    return cli.main([part for text in arguments for part in text.split()])


# --------------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("method", ["pfp", "pfp-random", "pfp-deterministic", "l1"])
def test_four_parts_each_with_what_it_bounds_for_whom_and_its_assumptions(method: str) -> None:
    certificate = told(result(method))
    assert json.loads(json.dumps(certificate, allow_nan=False)) == certificate
    for part in PARTS:
        found = certificate[part]
        assert all(len(found[key]) > 20 for key in ("bounds", "for", "assumes")), part
        assert isinstance(found["vacuous"], bool) and found["applies"] == (found["reason"] is None)
        assert found["applies"] or found["vacuous"]
    drawn = method in ("pfp", "pfp-random")
    assert certificate["sampling"]["applies"] == drawn and certificate["calibration"]["applies"] == (method != "l1")
    assert certificate["network"]["applies"] and certificate["population"]["applies"]
    why = {"pfp-deterministic": "selected deterministically", "l1": "chosen by 'l1'"}
    assert drawn or why[method] in certificate["sampling"]["reason"]


def test_the_parts_say_nothing_where_nothing_is_known() -> None:
    x = small.images(20)
    few = told_of(prune(small.chain(), x, budget={"macs": 0.6}))
    assert "every sample was needed" in few["population"]["reason"] and few["network"]["source"] == "calibration"
    assert prune(small.chain(), budget={"macs": 0.6}, method="l1").certificate is None
    coarse = told_of(prune(small.chain(), x, budget={"macs": 0.6}, reduce="max"))
    assert all("--reduce max" in coarse[part]["reason"] for part in ("sampling", "calibration"))
    elsewhere = onnxprune.calibrate(small.chain(), x)
    kept = told_of(prune(small.chain(), data(), calibration=elsewhere, budget={"macs": 0.6}, samples=20))
    assert "made elsewhere" in kept["population"]["reason"] and kept["calibration"]["source"] == "file"
    here = onnxprune.calibrate(small.chain(), data(), samples=20)
    again = told_of(prune(small.chain(), data(), calibration=here, budget={"macs": 0.6}, samples=20))
    assert again["population"]["applies"]


def told_of(found: onnxprune.Result) -> dict[str, Any]:
    assert found.certificate is not None
    return found.certificate


def test_samples_for_certification_are_used_for_nothing_else() -> None:
    found = told_of(prune(small.chain(), data(), certify=small.images(70, seed=9), budget={"macs": 0.6}, samples=20))
    assert (found["population"]["source"], found["population"]["samples"]) == ("certify", 70)
    assert all(s["kind"] != "top1_drop" for s in found["population"]["statements"])  # no labels among these
    split = told(result())
    people = split["population"]
    assert people["source"] == "data" and people["start"] >= 20 + 64 and people["samples"] == 240 - people["start"]


def test_aligned_widths_pay_for_the_channels_that_fill_them_up() -> None:
    certificate = told(result("pfp-random", align=8, macs=0.5))
    added = {k: g for k, g in certificate["sampling"]["groups"].items() if g["added_sum"] > 0}
    assert added and all(g["epsilon"] > 3 * g["added_sum"] for g in added.values())


def test_an_error_budget_is_kept_with_aligned_widths_too() -> None:
    for align in (1, 8):
        for method in ("pfp", "pfp-random"):
            found = prune(small.chain(), data(), budget={"eps": 9.0}, method=method, samples=20, align=align, delta=0.2)
            groups = told_of(found)["sampling"].get("groups", {})
            assert all(g["epsilon"] <= 9.0 and not g["searched"] for g in groups.values())


def test_the_whole_network_is_said_to_be_the_smallest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.write(small.chain(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", **data())
    options = "--samples 20 --eps 1e-9 --recover none --method pfp"
    assert run(f"prune {tmp_path}/m.onnx --data {tmp_path}/d.npz {options} -o {tmp_path}/o.onnx") == 0
    out = capsys.readouterr().out
    assert "the smallest network with an error of at most 1e-09 is the whole network" in out
    assert (tmp_path / "o.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()


# ------------------------------------------------------------------------------------------------------ the recursion


def bounded(model: onnx.ModelProto, feeds: Mapping[str, Array], plan: Plan, groups: Groups) -> dict[str, dict[str, Any]]:
    return network.outputs(groups.net, mask(groups, plan), surgery(groups, plan), [feeds])


def holds(model: onnx.ModelProto, keep: float = 0.7, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Cuts every group at random, with reweighting, and asserts that each output stays within its bound."""
    groups = nets.grouped(model)
    plan = oracle.keep(groups, keep, np.random.default_rng(seed), scaled=True)
    assert not plan.empty
    found = bounded(model, groups.net.feeds, plan, groups)
    for name, entry in found.items():
        assert "absent" not in entry, (name, entry)
        assert entry["max_abs_bound"] is not None and 0 < entry["max_abs_measured"] <= entry["max_abs_bound"], (name, entry)
        assert entry["relative_l2_measured"] <= entry["relative_l2_bound"]
    return found


@pytest.mark.parametrize("name", small.NETS)
@pytest.mark.parametrize("keep", [0.95, 0.5])
def test_no_output_of_a_small_network_leaves_its_bound(name: str, keep: float) -> None:
    holds(small.NETS[name](), keep)


W = np.random.default_rng(3).standard_normal((6, 4, 3, 3))
BETWEEN: dict[str, list[nets.Node]] = {
    "LeakyRelu": [("LeakyRelu", "a", "b", {"alpha": 0.3})],
    "PRelu": [("PRelu", "a slope", "b")],
    "PRelu, steep": [("PRelu", "a steep", "b")],
    "Sigmoid": [("Sigmoid", "a", "b")],
    "Tanh": [("Tanh", "a", "b")],
    "Clip": [("Clip", "a low high", "b")],
    "HardSwish": [("HardSwish", "a", "b")],
    "Abs": [("Abs", "a", "b")],
    "Neg": [("Neg", "a", "b")],
    "Softplus": [("Softplus", "a", "b")],
    "Elu": [("Elu", "a", "b")],
    "Mish": [("Mish", "a", "b")],
    "square": [("Pow", "a two", "b")],
    "product with itself": [("Mul", "a a", "b")],
    "gate": [("Sigmoid", "a", "g"), ("Mul", "a g", "b")],
    "quotient": [("Sigmoid", "a", "s"), ("Add", "s two", "g"), ("Div", "a g", "b")],
    "difference": [("Relu", "a", "r"), ("Sub", "a r", "b")],
    "root": [("Abs", "a", "p"), ("Sqrt", "p", "b")],
    "BatchNormalization": [("BatchNormalization", "a scale shift mean var", "b")],
    "MaxPool": [("MaxPool", "a", "b", {"kernel_shape": [2, 2]})],
    "AveragePool": [("AveragePool", "a", "b", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]})],
    "Pad": [("Pad", "a pads one", "b")],
    "Concat": [("Relu", "a", "r"), ("Concat", "a r", "c", {"axis": 1}), ("Conv", "c wide", "b")],
    "Split": [("Split", "a", "s t", {"axis": 1, "num_outputs": 2}), ("Max", "s t", "m"), ("Concat", "m m", "b", {"axis": 1})],
    "Resize": [("Resize", "a - scales", "b", {"mode": "linear"})],
    "ConvTranspose": [("ConvTranspose", "a turned", "b")],
    "Transpose": [("Transpose", "a", "t", {"perm": [0, 1, 3, 2]}), ("Relu", "t", "b")],
    "Where": [("Where", "yes a a", "b")],
    "Softmax": [("Softmax", "a", "b", {"axis": 2})],
    "LogSoftmax": [("LogSoftmax", "a", "b", {"axis": 3})],
    "Min": [("Min", "a two", "b")],
}


def between(nodes: list[nets.Node]) -> onnx.ModelProto:
    """Two convolutions, of which the first can be cut, then what is in between, a third and the mean."""
    rng = np.random.default_rng(1)
    weights = {
        "w0": rng.standard_normal((5, 3, 3, 3)) / 3,
        "w1": rng.standard_normal((4, 5, 1, 1)),
        "b1": rng.standard_normal(4),
        "w2": W,
        "slope": rng.uniform(0.0, 0.5, (4, 1, 1)),
        "steep": rng.uniform(-2.0, 1.0, (4, 1, 1)),
        "low": np.array(-0.3),
        "high": np.array(0.4),
        "two": np.array(2.0),
        "one": np.array(1.0),
        "scale": rng.uniform(-2.0, 2.0, 4),
        "shift": rng.standard_normal(4),
        "mean": rng.standard_normal(4),
        "var": rng.uniform(0.1, 2.0, 4),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "wide": rng.standard_normal((4, 8, 1, 1)),
        "scales": np.array([1.0, 1.0, 2.0, 2.0]),
        "turned": rng.standard_normal((4, 4, 2, 2)),
        "yes": np.array([True, False, True, True, False, True]),
    }
    around = [("Conv", "x w0", "h"), ("Relu", "h", "k"), ("Conv", "k w1 b1", "a")]
    after = [("Conv", "b w2", "z"), ("GlobalAveragePool", "z", "out")]
    used = {name for node in [*around, *nodes, *after] for name in node[1].split()}
    model = nets.model([*around, *nodes, *after], {"x": ["N", 3, 8, 8]}, "out", {k: v for k, v in weights.items() if k in used})
    model.opset_import[0].version = 18
    return model


@pytest.mark.parametrize("kind", BETWEEN)
def test_every_operator_keeps_within_its_rule(kind: str) -> None:
    for keep, seed in ((0.8, 0), (0.3, 1)):
        holds(between(BETWEEN[kind]), keep, seed)


def test_the_rule_of_an_operator_that_forgets_an_error_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The power of the comparison: rules that are too small are noticed, and then no number is given."""
    model = between(BETWEEN["gate"])
    groups = nets.grouped(model)
    plan = oracle.keep(groups, 0.3, np.random.default_rng(1)).only([groups.prunable[0].id])
    for op, factor in (("Mul", 1e-4), ("Conv", 1e-3)):
        rule = RULES[op]

        def shrunk(r: Recursion, i: int, rule: Any = rule, factor: float = factor) -> list[str | None]:
            return [None if e is None else r.emit("Mul", [e, r.scalar(factor, "x")]) for e in rule(r, i)]

        with monkeypatch.context() as patch:
            patch.setitem(RULES, op, shrunk)
            entry = bounded(model, groups.net.feeds, plan, groups)["out"]
        assert "a bug" in entry["absent"] and "max_abs_bound" not in entry


def test_an_unknown_operator_ends_the_recursion_by_name() -> None:
    model = between([("Round", "a", "r"), ("InstanceNormalization", "r scale shift", "b")])
    groups = nets.grouped(model)
    plan = oracle.keep(groups, 0.5, np.random.default_rng(0))
    assert not plan.empty
    entry = bounded(model, groups.net.feeds, plan, groups)["out"]
    assert entry == {"absent": "unknown operator InstanceNormalization ('b')"}
    before = prune(model, small.images(80), budget={"macs": 0.7}, samples=8)
    assert told_of(before)["network"]["reason"] == "unknown operator InstanceNormalization ('b')"


def test_a_cut_of_the_last_layer_alone_is_bounded_exactly() -> None:
    """One linear layer: the bound is what is measured, up to the allowance for rounding."""
    groups = nets.grouped(small.chain())
    last = [g.id for g in groups.prunable][-1]
    plan = oracle.keep(groups, 0.5, np.random.default_rng(0), scaled=True).only([last])
    entry = bounded(small.chain(), groups.net.feeds, plan, groups)["scores"]
    assert not entry["vacuous"] and entry["max_abs_bound"] <= 1.001 * entry["max_abs_measured"] + 1e-4
    nothing = bounded(small.chain(), groups.net.feeds, Plan(), groups)["scores"]
    assert nothing["max_abs_measured"] == 0 and nothing["relative_l2_bound"] < 1e-3


def shipped(name: str) -> Path:
    return ROOT / "models" / f"{name}.onnx"


@pytest.mark.parametrize("name", ["vgg8", "resnet20", "mobilenet"])
@pytest.mark.parametrize("keep", [0.95, 0.6])
def test_no_output_of_a_shipped_network_leaves_its_bound(name: str, keep: float) -> None:
    found = imported.load(shipped(name))
    with np.load(ROOT / "models" / "fashion-mnist.npz") as archive:
        feeds = {"image": archive["x_test"][:4].astype(np.float32).reshape(4, 1, 28, 28)}
    plan = oracle.keep(found.groups, keep, np.random.default_rng(2), scaled=True)
    entry = bounded(found.model, feeds, plan, found.groups)["logits"]
    assert "absent" not in entry and entry["max_abs_measured"] <= entry["max_abs_bound"]


# -------------------------------------------------------------------------------------------------------- tampering


@functools.cache
def pair(method: str) -> tuple[imported.Imported, onnx.ModelProto, Sources]:
    model = imported.load(small.chain())
    samples = open_data(data(), model.specs)
    return model, certify.without(result(method).model), Sources({"data": samples})


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all numbers and truth values."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    elif isinstance(value, bool | int | float):
        yield path


def changed(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    return [value + 1, value - 1] if isinstance(value, int) else [value * 1.02 + 1e-4, value * 0.98 - 1e-4]


def put(certificate: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    made = copy.deepcopy(certificate)
    inner: Any = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return made


@pytest.mark.parametrize("method", ["pfp", "pfp-random", "pfp-deterministic"])
def test_a_true_certificate_passes_whole(method: str) -> None:
    lines = check(told(result(method)), *pair(method))
    assert len(lines) == 5 and not any(line.startswith("not ") for line in lines)
    assert "bounds of 1 outputs are those computed anew" in lines[3] and "equal to those measured anew" in lines[2]


@pytest.mark.parametrize("method", ["pfp-random", "pfp", "pfp-deterministic"])
def test_every_number_of_the_certificate_is_checked(method: str) -> None:
    """One number at a time, in the certificate alone: found from the files and the data, not from another copy."""
    certificate = told(result(method))
    passed, count = [], 0
    plan = [p for p in leaves(certificate) if p[0] == "plan"]
    for path in [*(p for p in leaves(certificate) if p[0] != "plan"), *plan[:: max(1, len(plan) // 8)]]:
        value = functools.reduce(lambda inner, key: inner[key], path, certificate)
        for wrong in changed(value):
            if path == ("options", "approximate") or (path[-1] == "applies" and wrong is False):
                continue  # says less, not more
            count += 1
            try:
                check(put(certificate, path, wrong), *pair(method))
                passed.append((path, value, wrong))
            except ValidationError:
                pass
    assert passed == [] and count > 40


@pytest.mark.parametrize("what", ["a weight", "a bias", "the plan"])
def test_weights_and_plan_are_checked_against_each_other(what: str) -> None:
    """Even when the digest in the certificate is made to fit."""
    found, pruned, sources = pair("pfp")
    certificate = told(result("pfp"))
    model = onnx.ModelProto()
    model.CopyFrom(pruned)
    if what == "the plan":
        name = next(iter(certificate["plan"]))
        entry = certificate["plan"][name]
        gone = next(j for j in range(entry["size"]) if j not in entry["kept"])
        at = next(k for k, j in enumerate([*entry["kept"], 10**9]) if j > gone)
        entry["kept"][min(at, len(entry["kept"]) - 1)] = gone
        entry["kept"].sort()
    else:
        tensor = next(t for t in model.graph.initializer if len(t.dims) == (4 if what == "a weight" else 1))
        value = numpy_helper.to_array(tensor).copy()
        value.reshape(-1)[0] += 0.01
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        certificate["digests"]["pruned"] = wire.digest(model)
    with pytest.raises(ValidationError, match=r"weights|plan"):
        check(certificate, found, model, sources)


def test_certificates_that_are_not_whole_are_refused() -> None:
    for damage in ({}, {"population": {}}, {"plan": 3}, {"sampling": None}, {"digests": []}):
        with pytest.raises(ValidationError):
            check({**told(result()), **damage} if damage else {}, *pair("pfp-random"))


# ------------------------------------------------------------------------------------------------------- --max-drop


@functools.cache
def dropped(value: float = 0.3, labels: bool = True) -> onnxprune.Result:
    source = data() if labels else {"x": data()["x"]}
    return prune(small.chain(), source, budget={"max-drop": value}, samples=20, method="pfp-deterministic", confidence=0.9)


@pytest.mark.parametrize("labels", [True, False])
def test_max_drop_takes_the_last_network_before_the_first_failure(labels: bool) -> None:
    found = told_of(dropped(0.3, labels))["population"]
    drop = found["max_drop"]
    assert found["candidates"] == len(GRID) and 0 < drop["limit"] <= 0.3 and drop["delta"] == pytest.approx(0.1)
    assert GRID[-1] < drop["macs"] < 1 and dropped(0.3, labels).report["budget"] == {"kind": "max-drop", "value": 0.3}
    source = data() if labels else {"x": data()["x"]}
    for fraction in GRID[: GRID.index(drop["macs"]) + 2]:
        single = prune(small.chain(), source, budget={"macs": fraction}, samples=20, method="pfp-deterministic")
        kinds = {s["kind"]: s for s in told_of(single)["population"]["statements"]}
        n, most = told_of(single)["population"]["samples"], kinds["top1_changes"]["changed"]
        limit = confidence.upper(most, n, 0.1)
        if labels:
            limit = confidence.drop(kinds["top1_drop"]["lost"], kinds["top1_drop"]["gained"], n, 0.1)
        assert (limit <= 0.3) == (fraction >= drop["macs"]), fraction
        if fraction == drop["macs"]:
            assert limit == pytest.approx(drop["limit"], rel=2e-5)  # six digits, rounded up
            assert single.plan.to_json() == dropped(0.3, labels).plan.to_json()


def test_max_drop_keeps_the_whole_network_where_nothing_smaller_is_certified() -> None:
    model, x = small.residual(), small.images(500, seed=8)
    found = prune(model, x, budget={"max-drop": 0.012}, samples=20, method="random", confidence=0.9)
    assert found.plan.empty and found.model == model
    assert told_of(found)["population"]["max_drop"] | {"statement": ""} == {
        "statement": "",
        "value": 0.012,
        "delta": pytest.approx(0.1),
        "limit": 0.0,
        "macs": 1.0,
    }


def test_max_drop_needs_samples_and_says_how_many() -> None:
    needed = confidence.enough(0.05, 0.05)
    with pytest.raises(DataError, match=f"takes {needed} held-out samples at least, and there are 50"):
        prune(small.chain(), small.images(70), budget={"max-drop": 0.05}, samples=20)
    with pytest.raises(DataError, match="needs held-out samples: every sample was needed"):
        prune(small.chain(), small.images(20), budget={"max-drop": 0.05})
    for wrong in (0.0, 1.0, -1.0):
        with pytest.raises(BudgetError, match="max-drop must be a fraction"):
            prune(small.chain(), small.images(20), budget={"max-drop": wrong})
    with pytest.raises(OptionError, match="--confidence"):
        prune(small.chain(), small.images(20), budget={"max-drop": 0.1}, confidence=1.0)


def test_numbers_of_max_drop_are_checked() -> None:
    model = imported.load(small.chain())
    sources = Sources({"data": open_data(data(), model.specs)})
    certificate, pruned = told(dropped()), certify.without(dropped().model)
    assert len(check(certificate, model, pruned, sources)) == 5
    for key, value in certificate["population"]["max_drop"].items():
        for wrong in [] if isinstance(value, str) else [value * 1.02 + 1e-3, value * 0.5]:
            with pytest.raises(ValidationError):
                check(put(certificate, ("population", "max_drop", key), wrong), model, pruned, sources)


# --------------------------------------------------------------------------------------------------------- verify


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """m.onnx, d.npz and a pruned p.onnx with its report and its certificate."""
    small.write(small.chain(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", **data())
    result().save(tmp_path / "p.onnx")
    return tmp_path


def test_three_copies_say_the_same(files: Path) -> None:
    inside = {p.key: p.value for p in onnx.load(files / "p.onnx").metadata_props}[PROPERTY]
    beside = json.loads((files / "p.onnx.certificate.json").read_text())
    assert json.loads(inside) == beside == json.loads((files / "p.onnx.report.json").read_text())["certificate"]
    assert len([p for p in onnx.load(files / "p.onnx").metadata_props if p.key == PROPERTY]) == 1
    again = prune(files / "p.onnx", data(), budget={"macs": 0.8}, samples=20)  # replaces the older one
    assert [json.loads(p.value) for p in again.model.metadata_props if p.key == PROPERTY] == [again.certificate]


def metadata(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    model = onnx.load(path)
    entry = next(p for p in model.metadata_props if p.key == PROPERTY)
    certificate = json.loads(entry.value)
    change(certificate)
    entry.value = json.dumps(certificate)
    path.write_bytes(model.SerializeToString())


def shift_weight(path: Path) -> None:
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    value = numpy_helper.to_array(tensor).copy()
    value.reshape(-1)[0] += 0.01
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    path.write_bytes(model.SerializeToString())


def beside(path: Path) -> None:
    text = json.loads(path.with_name(path.name + ".certificate.json").read_text())
    text["population"]["samples"] += 1
    path.with_name(path.name + ".certificate.json").write_text(json.dumps(text))


TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (lambda path: None, ""),
    "a number": (lambda path: metadata(path, lambda c: c["population"]["statements"][0].update(alpha=0.01)), "top1_changes"),
    "the plan": (lambda path: metadata(path, lambda c: c["plan"]["Conv_0"]["kept"].pop()), "Conv_0"),
    "a weight": (shift_weight, "digest of the pruned"),
    "a copy": (beside, "copies of the certificate differ"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_verify_exits_3_on_tampering(files: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    change, words = TAMPERED[what]
    if what != "a copy":
        for name in ("report", "certificate"):
            (files / f"p.onnx.{name}.json").unlink()
    change(files / "p.onnx")
    code = run(f"verify {files}/m.onnx {files}/p.onnx --data {files}/d.npz")
    printed = capsys.readouterr()
    assert code == (3 if words else 0), printed.err
    assert words in printed.err and (words or "re-checked, sensitivities" in printed.out)


def test_verify_says_what_it_could_not_check(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"verify {files}/m.onnx {files}/p.onnx") == 0
    out = capsys.readouterr().out
    for words in ("not re-checked: the sensitivities", "not re-checked: the network part", "not re-checked: the population"):
        assert words in out
    np.savez(files / "other.npz", x=small.images(240, seed=77))
    assert run(f"verify {files}/m.onnx {files}/p.onnx --data {files}/other.npz") == 0
    assert "--data are other samples" in capsys.readouterr().out
    x = data()["x"].copy()
    x[100] += 1  # the same data, but for one sample
    np.savez(files / "altered.npz", x=x, y=data()["y"])
    assert run(f"verify {files}/m.onnx {files}/p.onnx --data {files}/altered.npz") == 3
    assert "the samples are not those" in capsys.readouterr().err


def test_verify_takes_the_samples_that_prune_took(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("c", 21), ("v", 22)):
        np.savez(files / f"{name}.npz", x=small.images(60, seed=seed))
    common = f"{files}/m.onnx --data {files}/d.npz --samples 20 --macs 0.7 --recover none --method pfp"
    common += f" --validation {files}/v.npz --certify {files}/c.npz"
    assert run(f"prune {common} -o {files}/q.onnx") == 0
    capsys.readouterr()
    command = f"verify {files}/m.onnx {files}/q.onnx"
    assert run(f"{command} --data {files}/d.npz") == 0
    out = capsys.readouterr().out
    assert "samples are of --certify" in out and "samples are of --validation" in out and "re-checked, sensitivities" in out
    assert run(f"{command} --validation {files}/v.npz --certify {files}/c.npz") == 0
    out = capsys.readouterr().out
    assert "re-checked, population" in out and "re-checked, network" in out and "not re-checked: the sensitivities" in out
    assert run(f"{command} --validation {files}/c.npz --certify {files}/v.npz") == 3
    assert run(f"prune {common} -o {files}/c.npz --force") == 2  # an output that is an input


def test_the_checker_shares_nothing_with_the_makers() -> None:
    sources = [p.read_text() for p in (ROOT / "onnxprune" / "checker").glob("*.py")]
    makers = ("certificate", "certify", "theory", "confidence", "selection", "criteria", "decide", "passes.calibrate", "plan ")
    assert sources and not [m for m in makers for s in sources if f"from onnxprune.{m}" in s or f"onnxprune import {m}" in s]


@pytest.mark.parametrize(("changed", "lost"), [(380, 380), (379, 379), (376, 370)])
def test_a_bound_that_rounds_up_to_one_is_vacuous_for_maker_and_checker(changed: int, lost: int) -> None:
    told = population(Observed(380, changed, lost, 0, None, "digest"), 0.01)
    numbers.population(told)
    assert all(s["vacuous"] == (s.get("drop", s.get("alpha")) >= 1) for s in told["statements"])
