"""What calibration hands on: files, shards that merge, refusals."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import nets
import numpy as np
import pytest
from layers import BOTH, score

from onnxprune import runtime
from onnxprune.contraction import consumers
from onnxprune.criteria import L1, Activation, Random, Sensitivity
from onnxprune.criteria.base import Reduce
from onnxprune.errors import DataError, ModelError
from onnxprune.passes.calibrate import calibrate
from onnxprune.saliency import LayerScore, Saliency
from onnxprune.wire import digest


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sessions as small as these spend most of their time on starting and stopping threads."""
    with mock.patch.object(runtime, "session", functools.partial(runtime.session, threads=1)):
        yield


# ---- what calibration hands on


def small(seed: int = 32, criterion: Any = None, rows: slice = slice(None), batch: int | None = None) -> Saliency:
    net = nets.convnet(np.random.default_rng(seed))
    x = np.random.default_rng(33).standard_normal((13, 3, 6, 6)).astype(np.float32)
    criterion = criterion or Sensitivity()
    return calibrate(nets.grouped(net), criterion, nets.samples(net, x), np.arange(13)[rows], batch=batch)


def same(a: Saliency, b: Saliency) -> None:
    for name in ("criterion", "combine", "samples", "options", "model_digest", "data"):
        assert getattr(a, name) == getattr(b, name), name
    for x, y in zip(a.layers, b.layers, strict=True):
        assert (x.layer, x.group, x.events) == (y.layer, y.group, y.events)
        assert x.values.dtype == y.values.dtype == np.float64
        np.testing.assert_array_equal(x.values, y.values)


@pytest.mark.parametrize("criterion", [Sensitivity(), Sensitivity("max"), Activation(), L1(), Random(7)])
def test_save_and_load(criterion: Any, tmp_path: Path) -> None:
    saliency = small(criterion=criterion)
    saliency.save(tmp_path / "calibration.npz")
    loaded = Saliency.load(tmp_path / "calibration.npz")
    same(loaded, saliency)
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.npz"]
    assert saliency.model_digest == digest(nets.convnet(np.random.default_rng(32)))
    if criterion.needs_data:
        merged = loaded.merged(saliency)
        assert merged.samples == 26 and merged.data == (*saliency.data, *saliency.data)


def made(seed: int = 35) -> Saliency:
    """A saliency as `calibrate` might have made it."""
    rng = np.random.default_rng(seed)
    layers = (LayerScore("conv", "a", rng.random(8), 77), LayerScore("gemm", "b#2", rng.random(33), 0))
    return Saliency("pfp", "max", 13, layers, {"reduce": "sum"}, "5e", ("17", "b3"))


def test_saving_twice_replaces_the_file(tmp_path: Path) -> None:
    made(36).save(tmp_path / "c.npz")
    made().save(tmp_path / "c.npz")
    same(Saliency.load(tmp_path / "c.npz"), made())


@BOTH
def test_merged_sensitivities_are_those_of_the_whole(reduce: Reduce) -> None:
    criterion = Sensitivity(reduce)
    whole = small(criterion=criterion, batch=4)
    first, second = (small(criterion=criterion, rows=r, batch=4) for r in (slice(0, 8), slice(8, 13)))
    assert first.data != second.data
    for merged in (first.merged(second), second.merged(first)):
        assert merged.samples == 13 and set(merged.data) == {*first.data, *second.data}
        for a, b, m, n in zip(merged.layers, whole.layers, first.layers, second.layers, strict=True):
            assert a.events == b.events == max(m.events, n.events)
            np.testing.assert_allclose(a.values, b.values, rtol=1e-5)
            np.testing.assert_array_equal(a.values, np.maximum(m.values, n.values))


def test_merged_activations_are_those_of_the_whole() -> None:
    whole = small(criterion=Activation())
    first, second = (small(criterion=Activation(), rows=r) for r in (slice(0, 9), slice(9, 13)))
    for merged in (first.merged(second), second.merged(first)):
        assert merged.samples == 13
        for a, b in zip(merged.layers, whole.layers, strict=True):
            np.testing.assert_allclose(a.values, b.values, rtol=1e-6)
    exact = [(9 * a.values + 4 * b.values) / 13 for a, b in zip(first.layers, second.layers, strict=True)]
    for a, want in zip(first.merged(second).layers, exact, strict=True):
        np.testing.assert_allclose(a.values, want, rtol=1e-12)


def test_merging_scores_without_data_changes_nothing() -> None:
    saliency = small(criterion=L1())
    same(saliency.merged(small(criterion=L1())), saliency)
    assert all((x.values > 0).all() for x in saliency.layers)


def test_merging_is_refused_for_what_does_not_belong_together() -> None:
    one = small()
    for other, word in [
        (small(34), "model"),
        (small(criterion=Sensitivity("max")), "options"),
        (small(criterion=Activation()), "criterion"),
        (dataclasses.replace(one, combine="mean"), "combine"),
        (dataclasses.replace(one, layers=one.layers[:1]), "layers"),
    ]:
        for a, b in ((one, other), (other, one)):
            with pytest.raises(DataError, match=word):
                a.merged(b)
    with pytest.raises(DataError, match="options"):
        small(criterion=Random(1)).merged(small(criterion=Random(2)))


def test_what_is_no_calibration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    made().save(path)
    good = path.read_bytes()
    bad = tmp_path / "bad.npz"
    texts = [b"", b"PK", b"no calibration", good[: len(good) // 2], good[:-30], bytes(len(good)), good[200:]]
    for text in texts:
        bad.write_bytes(text)
        with pytest.raises(DataError, match=r"bad\.npz is not a calibration"):
            Saliency.load(bad)
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for name in ("array.npy", "other.npz"):
        with pytest.raises(DataError, match="is not a calibration"):
            Saliency.load(tmp_path / name)
    with pytest.raises(DataError, match="no such calibration"):
        Saliency.load(tmp_path / "missing.npz")
    with pytest.raises(DataError):
        Saliency.load(tmp_path)


@pytest.mark.parametrize("key", ["criterion", "combine", "samples", "options", "model_digest", "data", "layers"])
def test_header_must_be_complete(key: str, tmp_path: Path) -> None:
    made().save(tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz") as archive:
        arrays = dict(archive)
    header = json.loads(str(arrays.pop("header")))
    del header[key]
    np.savez(tmp_path / "c.npz", header=np.array(json.dumps(header)), **arrays)
    with pytest.raises(DataError, match="is not a calibration"):
        Saliency.load(tmp_path / "c.npz")


def test_damaged_files_are_refused_or_unharmed(tmp_path: Path) -> None:
    saliency = made()
    saliency.save(tmp_path / "c.npz")
    good = (tmp_path / "c.npz").read_bytes()
    rng = np.random.default_rng(35)
    refused = 0
    for place in rng.integers(0, len(good), 150):
        damaged = bytearray(good)
        damaged[place] ^= int(rng.integers(1, 256))
        (tmp_path / "c.npz").write_bytes(damaged)
        try:
            same(Saliency.load(tmp_path / "c.npz"), saliency)
        except DataError:
            refused += 1
    assert refused > 75


def test_nothing_to_score() -> None:
    """A network without channels to prune has an empty calibration."""
    net = nets.model([("Relu", "in", "out")], {"in": ["N", 3]}, "out")
    assert score(net, np.ones((4, 3), np.float32)).layers == ()
    frozen = nets.model([("MatMul", "in w", "out")], {"in": ["N", 3]}, "out", {"w": np.eye(3)})
    assert score(frozen, np.ones((4, 3), np.float32)).layers == ()
    assert consumers(nets.grouped(frozen)) == []


def test_numbers_that_are_none_are_refused() -> None:
    """A half-precision model that overflows, say: its shares would be nonsense."""
    nodes = [("MatMul", "in w", "a"), ("MatMul", "a v", "out")]
    net = nets.model(nodes, {"in": ["N", 3]}, "out", {"w": np.full((3, 4), 300.0), "v": np.eye(4)}, np.float16)
    assert score(net, np.ones((2, 3), np.float16)).layers[0].values.max() == 1
    with pytest.raises(ModelError, match="tensor 'a' is NaN or infinite"):
        score(net, np.array([[1, 1, 1], [100, 100, 100]], np.float16))


def test_best_over_consumers_and_groups_without_any() -> None:
    net = nets.convnet(np.random.default_rng(36))
    first, second = nets.grouped(net).prunable
    layers = (LayerScore("p", first.id, np.arange(8.0), 5), LayerScore("q", first.id, np.arange(8.0)[::-1], 7))
    saliency = Saliency("pfp", "max", 1, layers)
    np.testing.assert_array_equal(saliency.of(first), [7, 6, 5, 4, 4, 5, 6, 7])
    np.testing.assert_array_equal(saliency.of(second), np.zeros(6))
    assert saliency.events(first) == 12 and saliency.events(second) == 1
