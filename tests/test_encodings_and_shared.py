"""Real files: one network in eleven spellings must prune to one function; trained models must pass the oracle."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import oracle
import pytest

from onnxprune import runtime
from onnxprune.files import load
from onnxprune.groups import Accounting, Groups
from onnxprune.passes.group import group

SHARED = Path(__file__).resolve().parents[2] / "shared"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared development models are not beside this checkout")

ENCODINGS = sorted((SHARED / "zoo/encodings").glob("*.onnx"))
MODELS = [*sorted((SHARED / "models").glob("*.onnx")), *sorted((SHARED / "zoo/trained").glob("*.onnx"))]


@cache
def analysed(path: Path) -> Groups:
    return group(runtime.probe(load(path)))


def feeds(groups: Groups, batch: int, seed: int) -> dict[str, np.ndarray]:
    """Random inputs; `batch` of them where the model leaves that open."""
    rng = np.random.default_rng(seed)
    shapes = {v.name: (runtime.input_shape(v), groups.net.shapes[v.name]) for v in groups.net.inputs}
    return {
        name: rng.standard_normal((batch if declared[0] is None else probed[0], *probed[1:])).astype(np.float32)
        for name, (declared, probed) in shapes.items()
    }


def outputs(model: onnx.ModelProto, x: dict[str, np.ndarray]) -> list[np.ndarray]:
    return runtime.run(runtime.session(model, threads=1), x)


def reference(path: Path) -> Groups:
    """The spelling to compare with: the two that share zero running means, or do not, are a network of their own."""
    return analysed(path.with_name("enc_unshared_zero_mean.onnx" if "zero_mean" in path.stem else "enc_base.onnx"))


def test_there_are_eleven_encodings() -> None:
    assert len(ENCODINGS) == 11


@pytest.mark.parametrize("path", ENCODINGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("fraction", [0.7, 0.3, 0.0])
def test_every_spelling_prunes_to_the_same_function_and_size(path: Path, fraction: float) -> None:
    groups, base = analysed(path), reference(path)
    assert [g.size for g in groups.prunable] == [g.size for g in base.prunable]
    x = feeds(base, 3, seed=1)
    assert oracle.difference(*(outputs(g.net.model, x)[0] for g in (base, groups, base))) <= oracle.TOLERANCE
    # Groups correspond by their order, so one seed gives every spelling the same plan.
    plans = [oracle.keep(g, fraction, np.random.default_rng(7)) for g in (base, groups)]
    want, got = (oracle.check(g.net.model, x, plan, g).pruned for g, plan in zip((base, groups), plans, strict=True))
    for a, b in zip(outputs(want, x), outputs(got, x), strict=True):
        assert oracle.difference(a, b, a) <= oracle.TOLERANCE
    assert oracle.used(got) == oracle.used(want)
    sizes = []
    for g, plan in zip((base, groups), plans, strict=True):
        accounting = Accounting(g, 0)
        sizes.append(accounting.size(accounting.widths({k: v.indices for k, v in plan.groups.items()})).macs)
    assert sizes[0] == sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_trained_models_pass_the_oracle(path: Path) -> None:
    groups = analysed(path)
    assert sum(g.size for g in groups.prunable) >= 200
    small = all(np.prod(groups.net.shapes[v.name]) < 50_000 for v in groups.net.inputs)
    x = feeds(groups, 2 if small else 1, seed=2)
    rng = np.random.default_rng(3)
    oracle.check(groups.net.model, x, oracle.keep(groups, 0.7, rng), groups)
    oracle.check(groups.net.model, x, oracle.keep(groups, 0.0, rng, scaled=True), groups)  # one channel everywhere
