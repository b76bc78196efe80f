"""Models whose weights stay in files: the same results as in memory, to the byte, and no file of the source is touched."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import small
from onnx import TensorProto, helper, numpy_helper

import onnxprune
from onnxprune import cli, files, finish, large, runtime, weights, wire
from onnxprune.criteria import plain
from onnxprune.errors import ModelError, OutputError, ValidationError
from onnxprune.passes import validate
from onnxprune.passes.group import group
from onnxprune.passes.surgery import surgery
from onnxprune.plan import Kept, Plan

Array = np.ndarray[Any, Any]
LOCATION = "weights.bin"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; temporary files go into a folder in it."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "d.npz", x=small.images(12), y=np.arange(12) % 10)
    return tmp_path


@pytest.fixture
def by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is large, and every tensor that a shape is not made of."""
    monkeypatch.setattr(large, "LARGE", 0)
    monkeypatch.setattr(weights, "SMALL", 60)


def run(text: str) -> int:
    return cli.main(shlex.split(text))


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def answer(path: Path, x: Array) -> Array:
    return np.asarray(ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0])


# ------------------------------------------------------------------------------------------- ways to store weights


def inside(model: onnx.ModelProto, path: Path) -> None:
    small.write(model, path)


def one_file(model: onnx.ModelProto, path: Path) -> None:
    onnx.save(model, str(path), save_as_external_data=True, location=LOCATION, size_threshold=0)


def file_each(model: onnx.ModelProto, path: Path) -> None:
    onnx.save(model, str(path), save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0)


def odd_places(model: onnx.ModelProto, path: Path) -> None:
    """Offsets that are aligned to nothing, gaps, tensors in reverse order, and no lengths."""
    with path.with_name(LOCATION).open("wb") as data:
        for tensor in reversed(model.graph.initializer):
            data.write(b"gap")
            place(tensor, location=LOCATION, offset=data.tell())
            data.write(tensor.raw_data)
            tensor.ClearField("raw_data")
        data.write(b"and what else there is")
    small.write(model, path)


def constants(model: onnx.ModelProto, path: Path) -> None:
    """All weights as Constant nodes whose values are outside."""
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    nodes += list(model.graph.node)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    onnx.save(model, str(path), save_as_external_data=True, location=LOCATION, size_threshold=0, convert_attribute=True)


def place(tensor: TensorProto, **entries: Any) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))


WAYS: dict[str, Callable[[onnx.ModelProto, Path], None]] = {
    f.__name__: f for f in (inside, one_file, file_each, odd_places, constants)
}


def stored(way: str, folder: Path, model: onnx.ModelProto) -> Path:
    (folder / way).mkdir()
    WAYS[way](onnx.ModelProto.FromString(model.SerializeToString()), folder / way / "m.onnx")
    return folder / way / "m.onnx"


# ------------------------------------------------------------------------------------------------ the same as in memory


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["chain", "residual", "depthwise"])
def test_weights_in_files_prune_as_weights_in_memory(here: Path, monkeypatch: pytest.MonkeyPatch, way: str, name: str) -> None:
    path = stored(way, here, small.NETS[name]())
    command = f"prune {path} -q --macs 0.6 --method l2 --save-plan "
    assert run(command + "plan.json -o usual.onnx") == 0
    before = hashes(path.parent)
    monkeypatch.setattr(large, "LARGE", 0)
    monkeypatch.setattr(weights, "SMALL", 60)
    assert run(command + "plan2.json -o large.onnx") == 0
    assert (here / "plan.json").read_bytes() == (here / "plan2.json").read_bytes()
    usual, found = (json.loads((here / f"{n}.onnx.report.json").read_text()) for n in ("usual", "large"))
    for report in (usual, found):
        del report["seconds"], report["command"]  # which name the outputs
    assert "saw the whole graph" in found["validation"].pop("notes")[0] and not usual["validation"].pop("notes")
    assert all(r["validation"].pop("masked_max_relative_error") < 1e-6 for r in (usual, found))
    assert usual == found  # digests and bytes included
    assert wire.digest(files.load(here / "usual.onnx")) == wire.digest(files.load(here / "large.onnx"))
    assert np.array_equal(*(answer(here / f"{n}.onnx", small.images(5)) for n in ("usual", "large")))
    assert (here / "usual.onnx").read_bytes() == (here / "large.onnx").read_bytes().replace(b"large.onnx", b"usual.onnx")
    assert hashes(path.parent) == before
    assert not list((here / "scratch").rglob("*"))
    assert run(f"verify {path} large.onnx --data d.npz") == 0
    assert run(f"apply {path} plan.json -q -o again.onnx") == 0
    assert wire.digest(files.load(here / "again.onnx")) == found["digests"]["pruned"]


def test_values_of_constant_nodes_leave_a_file_that_they_would_make_too_large(
    here: Path, by_reference: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored("constants", here, small.chain())
    for name, most in (("inside", 1 << 30), ("outside", 0)):
        monkeypatch.setattr(large, "HELD", most)
        assert run(f"prune {path} -q --macs 0.5 --method l1 -o {name}.onnx") == 0
    assert not (here / "inside.onnx.data").exists()
    assert (here / "outside.onnx").stat().st_size < (here / "outside.onnx.data").stat().st_size
    assert len({wire.digest(files.load(here / f"{n}.onnx")) for n in ("inside", "outside")}) == 1
    assert np.array_equal(*(answer(here / f"{n}.onnx", small.images(3)) for n in ("inside", "outside")))


def test_half_precision(here: Path, by_reference: None) -> None:
    path = stored("one_file", here, small.chain(dtype=np.float16))
    assert run(f"prune {path} -q --macs 0.5 --method l1 -o out.onnx") == 0
    kinds = {t.data_type for t in onnx.load(here / "out.onnx").graph.initializer}
    assert kinds == {TensorProto.FLOAT16} and np.isfinite(answer(here / "out.onnx", small.images(2, dtype=np.float16))).all()


def branches() -> onnx.ModelProto:
    """Layers in both branches of an If, whose weights are in the branches; one weight is read from inside and outside."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(rng.standard_normal((*shape, 1, 1)).astype(np.float32), name)

    def body(tag: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("Conv", ["a", f"v{tag}"], [f"p{tag}"], f"first{tag}"),
            helper.make_node("Relu", [f"p{tag}"], [f"q{tag}"]),
            helper.make_node("Conv", [f"q{tag}", f"u{tag}"], [f"s{tag}"], f"second{tag}"),
            helper.make_node("Conv", [f"s{tag}", "shared"], [f"o{tag}"], f"third{tag}"),
        ]
        out = helper.make_tensor_value_info(f"o{tag}", 1, None)
        return helper.make_graph(nodes, tag, [], [out], [weight(f"v{tag}", 12, 8), weight(f"u{tag}", 8, 12)])

    nodes = [
        helper.make_node("Conv", ["x", "wa"], ["a0"], "stem"),
        helper.make_node("Conv", ["a0", "shared"], ["a"], "outside"),
        helper.make_node("If", ["c"], ["b"], "if", then_branch=body("t"), else_branch=body("e")),
        helper.make_node("Conv", ["b", "wl"], ["scores"], "last"),
    ]
    value = helper.make_tensor_value_info
    ends = [value("x", 1, [1, 3, 8, 8]), value("c", TensorProto.BOOL, [])], [value("scores", 1, [1, 4, 8, 8])]
    weights_outside = [weight("wa", 8, 3), weight("shared", 8, 8), weight("wl", 4, 8)]
    graph = helper.make_graph(nodes, "branches", *ends, weights_outside)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_weights_in_branches(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored("one_file", here, branches())
    usual = onnxprune.prune(path, budget={"macs": 0.6}, method="l2")
    monkeypatch.setattr(large, "LARGE", 0)
    monkeypatch.setattr(weights, "SMALL", 60)
    found = onnxprune.prune(path, budget={"macs": 0.6}, method="l2")
    assert len(weights.references(found.stored)) == 7
    assert {g["id"] for g in found.report["groups"] if g["removed"]} > {"firstt", "firste"}
    assert found.report["digests"] == usual.report["digests"]
    for name, result in (("usual", usual), ("large", found)):
        result.save(here / f"{name}.onnx")
        assert wire.digest(files.load(here / f"{name}.onnx")) == usual.report["digests"]["pruned"]
    for c in (True, False):
        x = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
        sessions = [ort.InferenceSession(here / f"{n}.onnx", providers=["CPUExecutionProvider"]) for n in ("usual", "large")]
        assert np.array_equal(*(s.run(None, {"x": x, "c": np.array(c)})[0] for s in sessions))


@pytest.mark.parametrize("budget", ["macs", "bytes"])
def test_calibrated_methods_and_byte_budgets(here: Path, monkeypatch: pytest.MonkeyPatch, budget: str) -> None:
    path = stored("one_file", here, small.residual())
    usual = onnxprune.prune(path, here / "d.npz", budget={budget: 0.6})
    monkeypatch.setattr(large, "LARGE", 0)
    monkeypatch.setattr(weights, "SMALL", 60)
    monkeypatch.setattr(validate, "HELD", 2000)  # bytes: the two models take turns several times
    found = onnxprune.prune(path, here / "d.npz", budget={budget: 0.6})
    assert found.plan.to_json() == usual.plan.to_json()
    assert found.report["digests"] == usual.report["digests"]
    assert {k: v for k, v in found.report["validation"].items() if k != "notes"} == {
        k: v for k, v in usual.report["validation"].items() if k != "notes"
    }
    assert found.report["certificate"] == usual.report["certificate"]
    assert len(list((here / "scratch").glob("*"))) == 1  # what the tries and the masked model needed is gone
    files_left = sum(1 for p in (here / "scratch").rglob("*") if p.is_file())
    assert files_left == sum(weights.place(t).path.parent.parent == here / "scratch" for t in weights.references(found.stored))


def test_the_same_bytes_again(here: Path, by_reference: None) -> None:
    path = stored("file_each", here, small.dense())
    for out in ("a", "b"):
        (here / out).mkdir()
        assert run(f"prune {path} -q --params 0.5 --method fpgm -o {out}/o.onnx") == 0
    first, second = hashes(here / "a"), hashes(here / "b")
    assert {k: v for k, v in first.items() if "report" not in k} == {k: v for k, v in second.items() if "report" not in k}
    assert set(first) == {"o.onnx", "o.onnx.data", "o.onnx.report.json"}


@pytest.mark.parametrize("name", small.NETS)
@pytest.mark.parametrize("way", ["one_file", "odd_places", "constants"])
def test_digest_and_size_do_not_tell_where_weights_are(here: Path, by_reference: None, name: str, way: str) -> None:
    model = small.NETS[name]()
    if way == "constants":
        (here / "apart").mkdir()
        constants(model, here / "apart" / "m.onnx")
        model = onnx.load(here / "apart" / "m.onnx")
        for tensor in weights.tensors(model):
            tensor.ClearField("data_location")
    path = stored(way, here, small.NETS[name]())
    found = files.load(path)
    blob = model.SerializeToString(deterministic=True)
    assert weights.references(found) and found.ByteSize() < len(blob) / 2
    assert b"".join(wire.chunks(found)) == blob
    assert wire.size(found) == len(blob) and wire.digest(found) == wire.digest(model) == hashlib.sha256(blob).hexdigest()


def test_every_kind_of_tensor_serialises_as_if_it_were_inside(here: Path, by_reference: None) -> None:
    """Tensors with texts around the values, in subgraphs, in lists, next to fields that this version does not know."""
    values = numpy_helper.from_array(np.arange(300, dtype=np.float32), "values")
    values.doc_string = "after the values"
    values.metadata_props.add(key="k", value="v")
    body = helper.make_graph([], "body", [], [helper.make_tensor_value_info("inner", 1, [300])], [values])
    body.initializer[0].name = "inner"
    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body),
        helper.make_node("Custom", ["y"], ["z"], domain="some.where", several=[values, values], other=[1, 2, 3]),
    ]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("c", 9, [])], [], [values], doc_string="graph")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("some.where", 1)])
    helper.set_model_props(model, {"b": "2", "a": "1"})
    scratch = weights.Scratch()
    lean = large.lean(model, scratch)
    assert len(weights.references(lean)) == 5 and not weights.references(model)
    assert b"".join(wire.chunks(lean)) == model.SerializeToString(deterministic=True)
    assert all(np.array_equal(weights.array(t), np.arange(300)) for t in weights.references(lean))
    unknown = bytes([0xFA, 0x3E, 3]) + b"xyz"  # field 1007, three bytes
    later = onnx.ModelProto.FromString(model.SerializeToString() + unknown)
    later.graph.MergeFromString(unknown)
    assert large.lean(later, scratch) is later
    for tensor, lean_one in zip(weights.tensors(later), weights.tensors(lean), strict=True):
        tensor.MergeFromString(unknown)
        inside = tensor.SerializeToString(deterministic=True)
        weights.refer(tensor, weights.place(lean_one))
        assert b"".join(p if isinstance(p, bytes) else b"".join(p.chunks()) for p in wire._pieces(tensor)) == inside
    filled = onnx.ModelProto.FromString(b"".join(wire.chunks(later)))
    assert b"".join(wire.chunks(later)) == filled.SerializeToString(deterministic=True)
    assert b"".join(wire.chunks(later)).count(unknown) == 7


def explicit(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every second tensor says in so many words that its values are inside (the dynamo exporter of PyTorch writes that)."""
    for tensor in model.graph.initializer[::2]:
        tensor.data_location = TensorProto.DEFAULT
    return model


def test_tensors_that_say_they_are_inside(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not cut stays to the byte; what is written to a data file has the digest that it will be read with."""
    model = explicit(small.residual())
    usual = onnxprune.prune(model, budget={"macs": 0.6}, method="l1", freeze=("Conv_0",))
    small.write(model, here / "part.onnx")
    odd = onnx.load(here / "part.onnx")
    place(odd.graph.initializer[-2], location=LOCATION)
    (here / LOCATION).write_bytes(odd.graph.initializer[-2].raw_data)
    odd.graph.initializer[-2].ClearField("raw_data")
    small.write(odd, here / "part.onnx")
    assert run("prune part.onnx -q --macs 0.6 --method l1 -o a.onnx") == 0
    assert run("verify part.onnx a.onnx") == 0
    monkeypatch.setattr(large, "LARGE", 0)
    monkeypatch.setattr(weights, "SMALL", 60)
    found = onnxprune.prune(model, budget={"macs": 0.6}, method="l1", freeze=("Conv_0",))
    assert found.report["digests"] == usual.report["digests"] and found.model == usual.model
    assert any(t.HasField("data_location") for t in found.model.graph.initializer)
    found.save(here / "b.onnx")
    assert onnx.load(here / "b.onnx") == usual.model
    assert run("prune part.onnx -q --macs 0.6 --method l1 -o c.onnx") == 0
    assert (here / "a.onnx.data").read_bytes() == (here / "c.onnx.data").read_bytes()
    assert run("verify part.onnx c.onnx") == 0
    monkeypatch.setattr(wire, "LIMIT", 100)
    found = onnxprune.prune(model, budget={"macs": 0.6}, method="l1")
    found.save(here / "d.onnx")
    small.write(model, here / "m.onnx")
    assert found.external_data and wire.digest(files.load(here / "d.onnx")) == found.report["digests"]["pruned"]
    assert model == explicit(small.residual())


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.INT8])
def test_types_that_numpy_does_not_have_and_values_that_share_bytes(here: Path, by_reference: None, kind: int) -> None:
    tensor = helper.make_tensor("w", kind, [30, 31], np.arange(930) % 7 - 3)
    raw = numpy_helper.from_array(numpy_helper.to_array(tensor), "w")
    scratch = weights.Scratch()
    model = helper.make_model(helper.make_graph([], "g", [], [], [raw]))
    found = large.lean(model, scratch).graph.initializer[0]
    assert weights.references(found) and weights.length(found) == weights.nbytes(raw) == len(raw.raw_data)
    assert np.array_equal(weights.array(found).astype(np.float32), numpy_helper.to_array(raw).astype(np.float32))
    again = weights.tensor_of(weights.array(found), kind, scratch)
    assert np.array_equal(weights.array(again).astype(np.float32), numpy_helper.to_array(raw).astype(np.float32))


@pytest.mark.parametrize("method", [plain.L1, plain.L2])
def test_filters_are_scored_alike_in_blocks(monkeypatch: pytest.MonkeyPatch, method: Callable[[], Any]) -> None:
    groups = group(runtime.probe(small.residual()))
    whole = method().inspect(groups)
    monkeypatch.setattr(plain, "BLOCK", 100)
    for a, b in zip(whole, method().inspect(groups), strict=True):
        assert a.group == b.group and np.array_equal(a.values, b.values) and a.values.any()


# ----------------------------------------------------------------------------------------------------- what is in memory


def test_nothing_is_read_that_is_not_needed(here: Path, by_reference: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored("one_file", here, small.chain())
    read: list[int] = []
    chunks = weights.Place.chunks

    def counted(self: weights.Place) -> Any:
        read.append(self.length)
        return chunks(self)

    monkeypatch.setattr(weights.Place, "chunks", counted)
    model = files.load(path)
    assert sum(read) == sum(n for t in small.chain().graph.initializer if (n := len(t.raw_data)) < weights.SMALL)
    read.clear()
    net = runtime.probe(model)
    weight = net.array("w3")
    assert weight is not None and not weight.flags.writeable and isinstance(weight.base, np.memmap)
    groups = group(net)
    cut = groups.prunable[0]
    pruned = surgery(groups, Plan({cut.id: Kept(cut.size, np.arange(cut.size // 2))}))
    assert not read
    touched = {s.dim.tensor for s in cut.slots}
    for old, new in zip(model.graph.initializer, pruned.graph.initializer, strict=True):
        assert (old.SerializeToString() == new.SerializeToString()) == (old.name not in touched)
    assert len(touched & {t.name for t in model.graph.initializer}) > 2


def test_a_model_given_in_memory_is_not_changed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.residual()
    before = model.SerializeToString(deterministic=True)
    usual = onnxprune.prune(model, budget={"macs": 0.5}, method="l1")
    monkeypatch.setattr(large, "LARGE", 0)
    monkeypatch.setattr(weights, "SMALL", 60)
    monkeypatch.setattr(wire, "LIMIT", len(before) - 1)  # as if it were more than protobuf can serialise
    found = onnxprune.prune(model, budget={"macs": 0.5}, method="l1")
    assert model.SerializeToString(deterministic=True) == before
    assert found.report["digests"] == usual.report["digests"] and found.external_data and not usual.external_data
    found.save(here / "out.onnx")
    assert wire.digest(files.load(here / "out.onnx")) == usual.report["digests"]["pruned"]
    assert (here / "out.onnx").stat().st_size < (here / "out.onnx.data").stat().st_size
    assert found.model == usual.model and found.model is found.model and not weights.references(found.model)
    monkeypatch.setattr(large, "HELD", 0)
    model = onnxprune.prune(small.residual(), budget={"macs": 0.5}, method="l1").stored
    assert large.whole(model) is model
    again = onnxprune.prune(found.stored, budget={"macs": 0.8}, method="l1")  # a result's model is one to prune, too
    assert again.report["digests"]["original"] == usual.report["digests"]["pruned"]
    with pytest.raises(OutputError, match="2 GB or more does not fit in one file"):
        monkeypatch.setattr(wire, "LIMIT", 1000)
        files.save(found.stored, here / "whole.onnx")
    assert not (here / "whole.onnx").exists()


def test_temporary_files_go_with_the_result(here: Path, by_reference: None) -> None:
    path = stored("one_file", here, small.chain())
    result = onnxprune.prune(path, budget={"macs": 0.5}, method="l1")
    model = result.stored
    assert list((here / "scratch").rglob("*"))
    del result
    gc.collect()
    assert not list((here / "scratch").rglob("*"))
    with pytest.raises(ModelError, match=r"are gone .keep the model's data file where it is, and the Result as long"):
        files.save(model, here / "out.onnx", external=True)
    assert not list(here.glob("out*")) and not list(here.glob(".onnxprune*"))


def test_a_model_that_fits_memory_is_held_there_where_temporary_files_have_no_space(
    here: Path, by_reference: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored("one_file", here, small.chain())
    assert weights.references(files.load(path))
    free = shutil.disk_usage(here)._replace(free=3 * (here / "one_file" / LOCATION).stat().st_size)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert not weights.references(files.load(path))
    monkeypatch.setattr(large, "HELD", 1000)
    assert weights.references(files.load(path))


def test_no_space_for_changed_weights(here: Path, by_reference: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = stored("one_file", here, small.chain())

    def full(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    assert run(f"prune {path} -q --macs 0.5 --method l1 -o out.onnx") == 2
    text = capsys.readouterr().err
    assert "cannot keep changed weights in" in text and "No space left" in text and "TMPDIR" in text and text.count("\n") == 1
    assert not list(here.glob("out*"))


def test_a_process_that_is_terminated_leaves_nothing(here: Path) -> None:
    """SIGTERM while the changed weights are in temporary files."""
    path = stored("one_file", here, small.chain())
    program = f"""
import glob, os, signal, sys
from onnxprune import cli, large, weights
large.LARGE, weights.SMALL = 0, 60
from onnxprune import job
def validate(*_, **__):
    print(len(glob.glob({str(here / "scratch" / "onnxprune-*")!r})), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
job.validate = validate
sys.exit(cli.main(["prune", {str(path)!r}, "-q", "--macs", "0.5", "--method", "l1", "-o", "out.onnx"]))
"""
    root = Path(onnxprune.__file__).resolve().parent.parent
    environment = os.environ | {"TMPDIR": str(here / "scratch"), "PYTHONPATH": str(root)}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (130, "1\n") and "interrupted; nothing was written" in found.stderr
    assert not list((here / "scratch").glob("onnxprune-*")) and not list(here.glob("out*"))


# --------------------------------------------------------------------------------------------------- files of the source


@pytest.mark.parametrize("threshold", [0, large.LARGE], ids=["large", "usual"])
def test_the_source_is_never_overwritten(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], threshold: int
) -> None:
    monkeypatch.setattr(large, "LARGE", threshold)
    monkeypatch.setattr(weights, "SMALL", 60)
    onnx.save(small.chain(), str(here / "m.onnx"), save_as_external_data=True, location="out.onnx.data", size_threshold=0)
    model = files.load(here / "m.onnx")
    before = hashes(here)
    for out in ("out.onnx", "m.onnx", "out.onnx.data"):
        assert run(f"prune m.onnx -q --macs 0.5 --method l1 --force -o {out}") == 2
        assert "onnxprune never overwrites its input" in capsys.readouterr().err
    result = onnxprune.prune("m.onnx", budget={"macs": 0.5}, method="l1")
    for out, report in (("out.onnx", None), ("m.onnx", None), ("a.onnx", "out.onnx.data")):
        with pytest.raises(OutputError, match="is an input"):
            result.save(out, report, force=True)
    if threshold == 0:
        with pytest.raises(OutputError, match="is an input"):
            files.save(model, here / "out.onnx", external=True)
    assert {k: v for k, v in hashes(here).items() if not k.startswith("scratch")} == before
    result.save("new.onnx")
    assert np.isfinite(answer(here / "new.onnx", small.images(2))).all()


def broken(how: str, path: Path) -> None:
    """Damages the model at `path`, whose weights are in one file."""
    data = path.with_name(LOCATION)
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "w3")
    entries = {e.key: e.value for e in tensor.external_data}
    if how == "missing":
        data.unlink()
    elif how == "short":
        data.write_bytes(data.read_bytes()[:-5])
    elif how == "empty":
        data.write_bytes(b"")
    elif how == "folder":
        data.unlink()
        data.mkdir()
    else:
        changes: dict[str, dict[str, Any]] = {
            "beyond": {"offset": 10**9},
            "negative": {"offset": -4},
            "length": {"length": int(entries["length"]) - 4},
            "nonsense": {"length": "many"},
            "absolute": {"location": data.resolve()},
            "outside": {"location": f"../{path.parent.name}/{LOCATION}"},
            "nowhere": {"location": ""},
        }
        place(tensor, **(entries | changes[how]))
        small.write(model, path)


@pytest.mark.parametrize("threshold", [0, large.LARGE], ids=["large", "usual"])
@pytest.mark.parametrize(
    ("how", "words"),
    {
        "missing": f"there is no file '{LOCATION}', which tensor",
        "short": "bytes, but tensor 'fc.b' is at",
        "empty": f"'{LOCATION}' has 0 bytes, but tensor",
        "folder": LOCATION,
        "beyond": "but tensor 'w3' is at 1000000000 to",
        "negative": "but tensor 'w3' is at -4 to",
        "length": "tensor 'w3' takes",
        "nonsense": "many",
        "absolute": "absolute path",
        "outside": "outside",
        "nowhere": "empty",
    }.items(),
)
def test_external_data_that_are_not_there_are_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str, words: str, threshold: int
) -> None:
    monkeypatch.setattr(large, "LARGE", threshold)
    monkeypatch.setattr(weights, "SMALL", 60)
    path = stored("one_file", here, small.chain())
    broken(how, path)
    assert run(f"inspect {path}") == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "the external data of" in text and words in text and "beside it" in text


def test_a_source_that_changes_meanwhile_is_noticed(here: Path, by_reference: None) -> None:
    path = stored("one_file", here, small.chain())
    imported = onnxprune.load(path)
    data = path.with_name(LOCATION)
    data.write_bytes(data.read_bytes() + b"more")
    for use in (
        lambda: imported.groups.net.array("w3"),
        lambda: wire.digest(imported.model),
        lambda: runtime.probe(imported.model),
    ):
        with pytest.raises(ModelError, match=f"{LOCATION} has changed since the model was read"):
            use()


def test_a_model_without_its_folder_is_refused(here: Path) -> None:
    path = stored("one_file", here, small.chain())
    with pytest.raises(ModelError, match=r"in a file beside the model .give the model's path"):
        onnxprune.prune(onnx.load(path, load_external_data=False), budget={"macs": 0.5}, method="l1")


# ------------------------------------------------------------------------------------------- nothing wrong gets written


def stale(model: onnx.ModelProto, scratch: weights.Scratch) -> None:
    """An intermediate shape that does not fit any more: the checker's shape inference refuses it."""
    model.graph.value_info[0].type.tensor_type.shape.dim[1].dim_value = 1000


def other_values(model: onnx.ModelProto, scratch: weights.Scratch) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "w3")
    weights.refer(tensor, scratch.add(weights.array(tensor) * np.float32(1.01)))


def other_shape(model: onnx.ModelProto, scratch: weights.Scratch) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "w3")
    weights.refer(tensor, scratch.add(weights.array(tensor)[:, 1:]))


@pytest.mark.parametrize("damage", [stale, other_values, other_shape])
def test_failed_validation_writes_nothing(
    here: Path, by_reference: None, monkeypatch: pytest.MonkeyPatch, damage: Callable[[onnx.ModelProto, weights.Scratch], None]
) -> None:
    path = stored("one_file", here, small.chain())
    real, scratch = finish.surgery, weights.Scratch()

    def wrong(*arguments: Any) -> onnx.ModelProto:
        model = real(*arguments)
        damage(model, scratch)
        return model

    monkeypatch.setattr(finish, "surgery", wrong)
    with pytest.raises(ValidationError):
        onnxprune.prune(path, budget={"macs": 0.5}, method="l1")
    assert run(f"prune {path} -q --macs 0.5 --method l1 -o out.onnx") == 3
    assert not list(here.glob("out*"))


def test_the_structure_is_checked_without_the_values(here: Path, by_reference: None) -> None:
    """What the checker sees is the whole model: the same message as for the model in memory."""
    path = stored("one_file", here, small.chain())
    messages = []
    for model in (small.chain(), files.load(path)):
        model.graph.node[2].op_type = "Nonsense"
        with pytest.raises(onnx.checker.ValidationError) as caught:
            validate._full_check(model)
        messages.append(str(caught.value).splitlines()[0])
    assert messages[0] == messages[1] and "Nonsense" in messages[0]
    assert not list((here / "scratch").rglob("*"))
