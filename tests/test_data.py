"""Every kind of sample data: the values that reach the model, and the one line that bad data earn."""

from __future__ import annotations

import io
import pickle
import sys
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxprune.data import ImageOptions, InputSpec, choose, open_data
from onnxprune.errors import DataError, OnnxPruneError, OptionError

F32 = np.dtype(np.float32)
ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)
PLAIN = ImageOptions(scale=1.0)


def spec(*shape: int | None, name: str = "in", dtype: object = np.float32) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


VECTOR = [spec(None, 3)]
RGB = [spec(None, 3, 4, 6)]


def refused(source: object, inputs: list[InputSpec], *words: str, options: ImageOptions | None = None) -> None:
    """The source raises a DataError of one line that holds all the words, on opening or on reading everything."""
    with pytest.raises(DataError) as caught:
        samples = open_data(source, inputs, options or ImageOptions())
        samples.batch(range(len(samples)))
    check_line(caught.value, words)


def check_line(error: OnnxPruneError, words: tuple[str, ...]) -> None:
    text = str(error)
    assert "\n" not in text and "Traceback" not in text
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"


def picture(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def flat(height: int, width: int, value: int = 0) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


# Arrays


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_gives_rows_labels_and_held_out(tmp_path: Path, save: object) -> None:
    path = tmp_path / "data.npz"
    save(path, x=ROWS, y=np.array([2, 0, 1, 1], np.uint8), x_test=-ROWS[:2], y_test=np.array([[1], [0]]))
    samples = open_data(path, VECTOR)
    assert len(samples) == 4 and samples.num_classes is None and samples.source == str(path)
    assert samples.labels is not None and samples.labels.dtype == np.int64
    assert samples.labels.tolist() == [2, 0, 1, 1]
    np.testing.assert_array_equal(samples.batch([3, 0])["in"], ROWS[[3, 0]])
    held = samples.held_out
    assert held is not None and len(held) == 2 and held.held_out is None
    np.testing.assert_array_equal(held.batch([1])["in"], -ROWS[1:2])
    assert held.labels is not None and held.labels.tolist() == [1, 0]


def test_npz_prefers_the_name_of_the_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **{"in": ROWS, "x": -ROWS, "in_test": ROWS + 1, "x_test": ROWS + 2})
    samples = open_data(str(tmp_path / "d.npz"), VECTOR)
    np.testing.assert_array_equal(samples.batch([0])["in"], ROWS[:1])
    assert samples.labels is None and samples.held_out is not None
    np.testing.assert_array_equal(samples.held_out.batch([0])["in"], ROWS[:1] + 1)


@pytest.mark.parametrize("order", ["C", "F"])
def test_stored_arrays_are_mapped_at_the_right_place(tmp_path: Path, order: str) -> None:
    array = np.asarray(np.random.default_rng(1).normal(size=(5, 3, 4)), np.float64, order=order)
    np.savez(tmp_path / "d.npz", other=np.arange(7), x=array)
    np.save(tmp_path / "d.npy", array)
    for name in ("d.npz", "d.npy"):
        fed = open_data(tmp_path / name, [spec(None, 3, None)]).batch([4, 2])["in"]
        np.testing.assert_array_equal(fed, array[[4, 2]].astype(np.float32))
        assert fed.dtype == F32 and fed.flags.c_contiguous and fed.flags.writeable


def test_npz_is_memory_light(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((400, 5000), np.float32), x_test=np.zeros((400, 5000), np.float32))
    tracemalloc.start()
    open_data(tmp_path / "d.npz", [spec(None, 5000)]).batch([1, 399])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_batch_does_not_share_memory_with_the_source() -> None:
    mine, scalar = ROWS.copy(), np.array(2.0, np.float32)
    samples = open_data({"in": mine, "t": scalar}, [*VECTOR, spec(name="t")])
    fed = samples.batch([0, 1, 2, 3])
    fed["in"][:] = 7
    fed["t"][...] = 7
    np.testing.assert_array_equal(mine, ROWS)
    assert scalar == 2


def test_a_single_array_and_an_empty_batch() -> None:
    samples = open_data(ROWS, VECTOR)
    np.testing.assert_array_equal(samples.batch(np.array([1]))["in"], ROWS[1:2])
    assert samples.batch([])["in"].shape == (0, 3)


def test_indices_outside_are_refused() -> None:
    samples = open_data(ROWS, VECTOR)
    for bad in ([4], [-1], [0.5], [[0]]):
        with pytest.raises(IndexError):
            samples.batch(bad)


def test_several_inputs_and_a_scalar_one() -> None:
    inputs = [spec(None, 3, name="a"), spec(None, name="b", dtype=np.int64), spec(name="t")]
    samples = open_data({"a": ROWS, "b": np.arange(4, dtype=np.int32), "t": np.float32(0.5), "y": [0, 1, 2, 3]}, inputs)
    fed = samples.batch([2, 1])
    assert list(fed) == ["a", "b", "t"] and fed["b"].tolist() == [2, 1] and fed["b"].dtype == np.int64
    assert fed["t"].shape == () and fed["t"] == 0.5
    assert samples.labels is not None and samples.labels.tolist() == [0, 1, 2, 3]


def test_held_out_samples_share_a_scalar_input() -> None:
    samples = open_data({"in": ROWS, "t": np.float32(3), "in_test": ROWS[:1]}, [*VECTOR, spec(name="t")])
    assert samples.held_out is not None and samples.held_out.batch([0])["t"] == 3


def test_an_input_called_y_is_not_labels() -> None:
    samples = open_data({"x": ROWS, "y": ROWS}, [spec(None, 3, name="x"), spec(None, 3, name="y")])
    assert samples.labels is None


def test_several_inputs_need_all_arrays_of_one_length() -> None:
    inputs = [spec(None, 3, name="a"), spec(None, 3, name="b")]
    refused({"a": ROWS, "x": ROWS}, inputs, "'b'", "'a', 'x'")
    refused({"a": ROWS, "b": ROWS[:3]}, inputs, "'a' has 4", "'b' has 3")
    refused(ROWS, inputs, "'a', 'b'")
    refused({"a": ROWS, "b": ROWS, "a_test": ROWS}, inputs, "'b_test'")


@pytest.mark.parametrize(
    ("have", "want", "fits"),
    [
        (np.uint8, np.float32, True),
        (np.int64, np.float16, True),
        (np.float64, np.float32, True),
        (np.int64, np.int32, True),
        (np.uint8, np.int64, True),
        (np.bool_, np.int64, True),
        (np.bool_, np.bool_, True),
        (np.float32, np.int64, False),
        (np.bool_, np.float32, False),
        (np.complex64, np.float32, False),
        (np.float32, np.complex64, False),
        (np.int64, np.object_, False),
        (np.int64, np.str_, False),
        (np.int64, np.bool_, False),
        ("U3", np.float32, False),
        ("M8[s]", np.int64, False),
    ],
)
def test_type_rule(have: object, want: object, fits: bool) -> None:
    array = np.array([[0], [1]]).astype(have)
    inputs = [spec(None, 1, dtype=want)]
    if not fits:
        return refused({"x": array}, inputs, "'x'", str(array.dtype), str(np.dtype(want)))
    fed = open_data({"x": array}, inputs).batch([0, 1])["in"]
    assert fed.dtype == want and fed.astype(int).tolist() == [[0], [1]]
    return None


def test_bfloat16_inputs() -> None:
    bfloat16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    samples = open_data({"x": ROWS}, [spec(None, 3, dtype=bfloat16)])
    assert samples.batch([1])["in"].dtype == bfloat16
    refused({"x": np.array([[np.nan]], np.float32)}, [spec(None, 1, dtype=bfloat16)], "sample 0")


def test_values_that_do_not_fit_the_type_are_refused() -> None:
    refused({"x": np.array([[1], [2**40]])}, [spec(None, 1, dtype=np.int32)], "sample 1", "'in'", "int32")
    refused({"x": np.array([[2**64 - 1]], np.uint64)}, [spec(None, 1, dtype=np.int64)], "sample 0", "int64")
    refused({"x": np.array([[1.0], [1e6]])}, [spec(None, 1, dtype=np.float16)], "sample 1", "float16")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_names_input_and_first_sample(bad: float) -> None:
    rows = ROWS.copy()
    rows[2:, 1] = bad
    refused({"x": rows}, VECTOR, "'in'", "sample 2", "infinite")
    samples = open_data({"x": rows}, VECTOR)
    np.testing.assert_array_equal(samples.batch([1])["in"], ROWS[1:2])
    with pytest.raises(DataError, match="sample 3"):
        samples.batch([0, 3, 2])
    refused({"x": ROWS, "t": np.float32(bad)}, [spec(None, 3, name="x"), spec(name="t")], "'t'")


def test_shape_rule() -> None:
    refused({"x": ROWS}, [spec(None, 5)], "'x'", "(4, 3)", "(N, 5)")
    refused({"x": ROWS[0]}, VECTOR, "(3,)", "array[None]")
    refused({"x": np.zeros((2, 4, 6, 3))}, RGB, "(2, 4, 6, 3)", "(N, 3, 4, 6)", "transpose(0, 3, 1, 2)")
    refused({"x": np.zeros((2, 3, 4, 6))}, [spec(None, 4, 6, 3)], "transpose(0, 2, 3, 1)")
    refused({"t": np.zeros(3)}, [spec(name="t")], "'t'", "(3,)", "scalar")
    refused({"x": ROWS[:0]}, VECTOR, "no samples")
    assert len(open_data({"x": ROWS}, [spec(1, 3)])) == 4
    assert open_data({"x": ROWS}, [spec(2, None)]).batch([0, 1])["in"].shape == (2, 3)


def test_labels_are_checked() -> None:
    refused({"x": ROWS, "y": np.arange(3)}, VECTOR, "'y'", "(3,)", "4")
    refused({"x": ROWS, "y": np.eye(4, dtype=int)}, VECTOR, "'y'", "(4, 4)")
    refused({"x": ROWS, "y": np.zeros(4)}, VECTOR, "'y'", "float64", "integers")
    refused({"x": ROWS, "y": np.array(list("abcd"))}, VECTOR, "'y'", "<U1")
    refused({"x": ROWS, "y": np.array([0, 1, -1, 2])}, VECTOR, "'y'", "negative", "sample 2")
    refused({"x": ROWS, "x_test": ROWS, "y_test": np.arange(5)}, VECTOR, "'y_test'")


def test_bad_npz_files(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(b"no zip at all")
    refused(path, VECTOR, "data.npz", "zip", "numpy.savez")
    np.savez(path, images=ROWS, z=ROWS)
    refused(path, VECTOR, "data.npz", "'images', 'z'", "'in' or 'x'")
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    refused(path, VECTOR, "data.npz", "'x'", "object", "pickled")
    np.savez(path, x=ROWS, y=np.array([{}] * 4, dtype=object))
    refused(path, VECTOR, "'y'", "object")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"\x00" * 200)
    refused(path, VECTOR, "data.npz", "'x'")


def test_damaged_compressed_npz(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32))
    raw = bytearray(path.read_bytes())
    raw[500:520] = bytes(20)
    path.write_bytes(bytes(raw))
    refused(path, VECTOR, "data.npz", "'x'", "cannot be read")


def test_bad_npy_files(tmp_path: Path) -> None:
    path = tmp_path / "data.npy"
    np.save(path, ROWS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    refused(path, VECTOR, "data.npy", "cut short")
    path.write_bytes(whole[:4])
    refused(path, VECTOR, "data.npy", "numpy.save")
    np.save(path, np.array([[1, 2, 3], None], dtype=object))
    refused(path, VECTOR, "object")
    refused(path, [*VECTOR, spec(None, name="b")], "data.npy", "'in', 'b'")


def test_pickles_are_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    np.save(tmp_path / "a.npy", np.array([Bomb()], dtype=object))
    np.savez(tmp_path / "b.npz", x=np.array([Bomb()], dtype=object))
    (tmp_path / "c.npy").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "d.pkl").write_bytes(pickle.dumps(Bomb()))
    for name in ("a.npy", "b.npz", "c.npy", "d.pkl"):
        refused(tmp_path / name, VECTOR)
    assert not (tmp_path / "ran").exists()


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    refused(tmp_path / "missing.npz", VECTOR, "missing.npz", "no file")
    refused("", VECTOR, "no file")
    (tmp_path / "data.csv").write_text("1,2,3")
    refused(tmp_path / "data.csv", VECTOR, "data.csv", ".npz")
    refused(picture(tmp_path / "one.png", flat(2, 2)), RGB, "one.png", "folder")
    refused(None, VECTOR, "object")
    refused({"x": [[1, 2, 3], [4]]}, VECTOR, "'x'", "not an array")


# Optional formats


def test_missing_readers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, suffix in (("safetensors", ".safetensors"), ("pyarrow", ".parquet")):
        monkeypatch.setitem(sys.modules, package, None)
        path = tmp_path / f"data{suffix}"
        path.write_bytes(b"")
        refused(path, VECTOR, f"data{suffix}", f"pip install {package}")


def test_safetensors(tmp_path: Path) -> None:
    numpy_io = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "d.safetensors"
    numpy_io.save_file({"x": ROWS, "y": np.array([3, 2, 1, 0]), "x_test": ROWS[:1]}, path)
    samples = open_data(path, VECTOR)
    np.testing.assert_array_equal(samples.batch([2])["in"], ROWS[2:3])
    assert samples.labels is not None and samples.labels.tolist() == [3, 2, 1, 0]
    assert samples.held_out is not None and len(samples.held_out) == 1
    path.write_bytes(b"junk")
    refused(path, VECTOR, "d.safetensors")


def test_parquet_lists_and_labels(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = pa.FixedSizeListArray.from_arrays(pa.array(ROWS.ravel()), 3)
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"x": rows, "label": [1, 0, 1, 2]}), path)
    samples = open_data(path, VECTOR)
    np.testing.assert_array_equal(samples.batch([3, 1])["in"], ROWS[[3, 1]])
    assert samples.labels is not None and samples.labels.tolist() == [1, 0, 1, 2]
    square = pa.FixedSizeListArray.from_arrays(rows, 2)
    pq.write_table(pa.table({"in": square}), path)
    np.testing.assert_array_equal(open_data(path, [spec(None, 2, 3)]).batch([1])["in"], ROWS[None, 2:])
    pq.write_table(pa.table({"x": pa.array([[1.0], [2.0, 3.0]])}), path)
    refused(path, VECTOR, "'x'", "fixed-size")
    hole = pa.FixedSizeListArray.from_arrays(pa.array([1.0, None]), 1)
    pq.write_table(pa.table({"x": hole}), path)
    refused(path, [spec(None, 1)], "'x'", "empty cells")
    pq.write_table(pa.table({"x": rows, "y": pa.array([1, None, 0, 0])}), path)
    refused(path, VECTOR, "'y'", "empty cells")
    path.write_bytes(b"junk")
    refused(path, VECTOR, "d.parquet")


def test_parquet_images(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    raw = pixels(4, 6)
    encoded = picture(tmp_path / "a.png", raw).read_bytes()
    path = tmp_path / "d.parquet"
    cells = [{"bytes": encoded, "path": "a.png"}, {"bytes": b"junk", "path": "b.png"}]
    for column in (cells, [cell["bytes"] for cell in cells]):
        pq.write_table(pa.table({"image": pa.array(column), "label": [4, 7]}), path)
        samples = open_data(path, RGB, PLAIN)
        np.testing.assert_array_equal(samples.batch([0])["in"][0], raw.transpose(2, 0, 1))
        assert samples.labels is not None and samples.labels.tolist() == [4, 7]
        refused(path, RGB, "row 1 of column image")


# Scripts and callables

SCRIPT = """
from __future__ import annotations
import neighbour
from dataclasses import dataclass
import numpy as np

@dataclass
class Box:
    rows: object

def batches():
    buffer = np.empty((2, 3), np.float32)
    for step in range(2):
        buffer[:] = step + neighbour.VALUE
        yield {"in": Box(buffer).rows, "y": [step, step]}

def broken():
    yield {"in": np.zeros((1, 3))}
    raise RuntimeError("first line\\nsecond line")

def leaves():
    raise SystemExit(3)

number = 3
"""


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "neighbour.py").write_text("VALUE = 10")
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    yield path
    sys.modules.pop("neighbour", None)


def test_script_function(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    before = list(sys.path), set(sys.modules)
    samples = open_data(f"{script}:batches", VECTOR)
    assert len(samples) == 4 and samples.source == f"{script}:batches"
    assert samples.batch([0, 1, 2, 3])["in"][:, 0].tolist() == [10, 10, 11, 11]
    assert samples.labels is not None and samples.labels.tolist() == [0, 0, 1, 1]
    assert sys.path == before[0] and set(sys.modules) - before[1] == {"neighbour"}
    assert not (script.parent / "__pycache__").exists() and not sys.dont_write_bytecode


def test_bad_scripts(script: Path) -> None:
    before = list(sys.path)
    refused(f"{script.parent / 'none.py'}:f", VECTOR, "none.py", "no file")
    refused(f"{script}:nothing", VECTOR, "script.py", "'nothing'")
    refused(f"{script}:number", VECTOR, "'number'")
    refused(script, VECTOR, "script.py", ":function")
    refused(f"{script}:broken", VECTOR, "script.py:broken", "RuntimeError", "first line second line")
    refused(f"{script}:leaves", VECTOR, "SystemExit")
    script.write_text("def f(:")
    refused(f"{script}:f", VECTOR, "script.py", "SyntaxError")
    script.write_text("import nowhere_to_be_found")
    refused(f"{script}:f", VECTOR, "ModuleNotFoundError", "nowhere_to_be_found")
    assert sys.path == before


def test_callables() -> None:
    def batches() -> list[dict[str, np.ndarray]]:
        return [{"in": ROWS[:3], "t": np.float32(1)}, {"in": ROWS[3:], "t": np.float32(1)}]

    samples = open_data(batches, [*VECTOR, spec(name="t")])
    np.testing.assert_array_equal(samples.batch([3, 0])["in"], ROWS[[3, 0]])
    assert samples.batch([0])["t"] == 1 and "batches" in samples.source


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], ("no batches",)),
        ({"in": ROWS}, ("dict", "yield")),
        (5, ("int",)),
        ([ROWS], ("batch 0", "ndarray")),
        ([{"in": ROWS}, {"x": ROWS}], ("batch 1", "'x'")),
        ([{"in": ROWS}, {"in": ROWS[:, :2]}], ("'in'", "(2,)", "(3,)")),
        ([{"in": ROWS, "t": 1.0}, {"in": ROWS, "t": 2.0}], ("'t'", "differs")),
        ([{"in": [[1], [2, 3]]}], ("'in'", "batch 0", "not an array")),
        ([{"other": ROWS}], ("'other'", "'in' or 'x'")),
        ([{"in": ROWS, "y": [0, 1]}], ("'y'", "(2,)")),
    ],
)
def test_bad_callables(batches: object, words: tuple[str, ...]) -> None:
    refused(lambda: batches, VECTOR, *words)


# Images


def test_flat_folder_in_the_order_of_names(tmp_path: Path) -> None:
    for number, name in enumerate(["b.PNG", "a.bmp", "c.ppm"]):
        picture(tmp_path / name, flat(4, 6, 10 * number))
    for junk in ("notes.txt", ".hidden.png", "a.png.part"):
        (tmp_path / junk).write_text("no image")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.png").write_text("no image")
    samples = open_data(tmp_path, RGB, PLAIN)
    assert samples.labels is None and samples.num_classes is None and samples.held_out is None
    fed = samples.batch([0, 1, 2])["in"]
    assert fed.shape == (3, 3, 4, 6) and fed.dtype == F32 and fed.flags.c_contiguous
    assert fed[:, 0, 0, 0].tolist() == [10, 0, 20]


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "gif", "ppm"])
def test_every_format(tmp_path: Path, suffix: str) -> None:
    picture(tmp_path / f"a.{suffix}", flat(4, 6, 128))
    fed = open_data(tmp_path, RGB).batch([0])["in"]
    np.testing.assert_allclose(fed, 128 / 255, atol=3 / 255)


def write_zip(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


def class_tree(folder: Path) -> Path:
    for name, value in {"dog/1": 10, "cat/2": 20, "cat/1": 30, "ant/deep/1": 40}.items():
        picture(folder / f"{name}.png", flat(4, 6, value))
    (folder / "bee").mkdir()
    return folder


@pytest.mark.parametrize("kind", ["folder", "wrapped", "zip", "wrapped zip"])
def test_classes_are_sorted_folders(tmp_path: Path, kind: str) -> None:
    root = class_tree(tmp_path / "root")
    source = {
        "folder": lambda: root,
        "wrapped": lambda: tmp_path,
        "zip": lambda: write_zip(root, tmp_path / "a.zip"),
        "wrapped zip": lambda: write_zip(root, tmp_path / "a.zip", "top/"),
    }[kind]()
    if "zip" in kind:
        with zipfile.ZipFile(source, "a") as archive:
            archive.writestr("__MACOSX/cat/1.png", b"")
    samples = open_data(source, RGB, PLAIN)
    assert samples.num_classes == 4, "ant/deep, bee (empty), cat, dog"
    assert samples.labels is not None and samples.labels.dtype == np.int64
    assert samples.labels.tolist() == [0, 2, 2, 3]
    assert samples.batch([0, 1, 2, 3])["in"][:, 0, 0, 0].tolist() == [40, 30, 20, 10]


def test_class_folders_may_be_links(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "root")
    (root / "bee").rmdir()
    other = picture(tmp_path / "elsewhere" / "1.png", flat(4, 6)).parent
    try:
        (root / "bee").symlink_to(other)
        (root / "cat" / "loop").symlink_to(root)
    except OSError:
        pytest.skip("links are not allowed here")
    samples = open_data(root, RGB)
    assert samples.labels is not None and samples.labels.tolist() == [0, 1, 2, 2, 3]


def test_guessing_classes_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "cat" / "1.png", flat(4, 6))
    picture(tmp_path / "a" / "2.png", flat(4, 6))
    refused(tmp_path / "a", RGB, "top folder", "'cat'")
    for name in ("train/cat", "train/dog", "val/cat"):
        picture(tmp_path / "b" / name / "1.png", flat(4, 6))
    refused(tmp_path / "b", RGB, "'train/cat'", "'val/cat'")


def test_one_folder_of_images_has_no_classes(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "1.png", flat(4, 6))
    (tmp_path / "cat" / "empty").mkdir()
    samples = open_data(tmp_path, RGB)
    assert samples.labels is None and samples.num_classes is None


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", RGB, "empty", "no images", "jpg")
    (tmp_path / "empty" / "notes.txt").write_text("text")
    refused(tmp_path / "empty", RGB, "no images")
    refused(write_zip(tmp_path / "empty", tmp_path / "a.zip"), RGB, "a.zip", "no images")
    (tmp_path / "b.zip").write_text("no zip")
    refused(tmp_path / "b.zip", RGB, "b.zip", "not a zip")


def test_damaged_images_are_named(tmp_path: Path) -> None:
    good = picture(tmp_path / "cat" / "a.jpg", pixels(40, 60)).read_bytes()
    (tmp_path / "cat" / "b.jpg").write_bytes(b"no image")
    (tmp_path / "cat" / "c.jpg").write_bytes(good[: len(good) // 2])
    (tmp_path / "cat" / "d.jpg").write_bytes(b"")
    for source in (tmp_path, write_zip(tmp_path, tmp_path / "a.zip")):
        samples = open_data(source, RGB)
        assert samples.batch([0])["in"].shape == (1, 3, 4, 6)
        for index, name in enumerate("bcd", 1):
            with pytest.raises(DataError) as caught:
                samples.batch([0, index])
            check_line(caught.value, (str(source), f"cat/{name}.jpg"))


def test_scale_mean_and_std(tmp_path: Path) -> None:
    raw = pixels(4, 6)
    picture(tmp_path / "a.png", raw)
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    fed = open_data(tmp_path, RGB, ImageOptions(mean=mean, std=std)).batch([0])["in"][0]
    expected = (raw / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(fed, expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-5)
    fed = open_data(tmp_path, RGB, ImageOptions(mean=(100.0,), scale=2)).batch([0])["in"][0]
    np.testing.assert_array_equal(fed, raw.transpose(2, 0, 1) * 2.0 - 100)


def test_bgr_with_the_mean_in_the_order_fed(tmp_path: Path) -> None:
    raw = pixels(4, 6)
    picture(tmp_path / "a.png", raw)
    fed = open_data(tmp_path, RGB, ImageOptions(scale=1, color="bgr", mean=(1, 2, 3))).batch([0])["in"][0]
    np.testing.assert_array_equal(fed, raw[..., ::-1].transpose(2, 0, 1) - np.array([1.0, 2, 3])[:, None, None])


@pytest.mark.parametrize(
    ("shape", "layout", "channels_last", "channels"),
    [
        ((None, 3, 4, 6), None, False, 3),
        ((None, 4, 6, 3), None, True, 3),
        ((1, 1, 4, 6), None, False, 1),
        ((None, 4, 6, 1), None, True, 1),
        ((None, 3, 3, 3), None, False, 3),
        ((None, 3, 3, 3), "nhwc", True, 3),
        ((None, None, 4, 6), "nchw", False, 3),
        ((None, None, None, None), "nhwc", True, 3),
    ],
)
def test_layouts_and_grey(
    tmp_path: Path, shape: tuple[int | None, ...], layout: str | None, channels_last: bool, channels: int
) -> None:
    size = (3, 3) if shape[2] == 3 and shape[1] == 3 else (4, 6)
    raw = pixels(*size)
    picture(tmp_path / "a.png", raw)
    options = ImageOptions(scale=1, layout=layout, size=size if shape[2] is None else None)
    fed = open_data(tmp_path, [spec(*shape)], options).batch([0])["in"][0]
    if channels == 1:
        raw = np.asarray(Image.fromarray(raw).convert("L"))[..., None]
    np.testing.assert_array_equal(fed, raw if channels_last else raw.transpose(2, 0, 1))


def test_grey_pictures_fill_three_channels(tmp_path: Path) -> None:
    raw = pixels(4, 6, 1)
    picture(tmp_path / "a.png", raw)
    fed = open_data(tmp_path, RGB, PLAIN).batch([0])["in"][0]
    np.testing.assert_array_equal(fed, np.stack([raw] * 3))


def test_sixteen_bit_alpha_and_palette(tmp_path: Path) -> None:
    wide = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2000
    picture(tmp_path / "a.png", wide)
    alpha = np.dstack([pixels(4, 6), np.full((4, 6), 7, np.uint8)])
    picture(tmp_path / "b.png", alpha)
    Image.fromarray(flat(4, 6, 90)).quantize(4).save(tmp_path / "c.png")
    fed = open_data(tmp_path, RGB, PLAIN).batch([0, 1, 2])["in"]
    np.testing.assert_array_equal(fed[0, 0], wide // 256)
    np.testing.assert_array_equal(fed[1], alpha[..., :3].transpose(2, 0, 1))
    assert (fed[2] == 90).all()
    picture(tmp_path / "d.tif", np.ones((4, 6), np.float32))
    refused(tmp_path, RGB, "d.tif")


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    raw = pixels(6, 4)
    image = Image.fromarray(raw)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    fed = open_data(tmp_path, RGB, PLAIN).batch([0])["in"][0]
    np.testing.assert_array_equal(fed, np.rot90(raw, -1).transpose(2, 0, 1))


def test_without_resize_the_picture_covers_the_crop(tmp_path: Path) -> None:
    raw = pixels(8, 20)
    picture(tmp_path / "a.png", raw)
    fed = open_data(tmp_path, RGB, PLAIN).batch([0])["in"][0]
    small = np.asarray(Image.fromarray(raw).resize((10, 4), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(fed, small[:, 2:8].transpose(2, 0, 1))


def test_small_pictures_are_enlarged(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", pixels(3, 2))
    expected = Image.fromarray(pixels(3, 2)).resize((6, 9), Image.Resampling.BILINEAR).crop((0, 2, 6, 6))
    fed = open_data(tmp_path, RGB, PLAIN).batch([0])["in"][0]
    np.testing.assert_array_equal(fed, np.asarray(expected).transpose(2, 0, 1))


def test_resize_the_short_side_then_crop(tmp_path: Path) -> None:
    raw = pixels(20, 33)
    picture(tmp_path / "a.png", raw)
    options = ImageOptions(scale=1, resize=8, size=(4, 6))
    fed = open_data(tmp_path, [spec(None, 3, None, None)], options).batch([0])["in"][0]
    small = np.asarray(Image.fromarray(raw).resize((13, 8), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(fed, small[2:6, 4:10].transpose(2, 0, 1))


def test_integer_inputs_get_pixels(tmp_path: Path) -> None:
    raw = pixels(4, 6)
    picture(tmp_path / "a.png", raw)
    for dtype in (np.uint8, np.int32):
        inputs = [spec(None, 3, 4, 6, dtype=dtype)]
        fed = open_data(tmp_path, inputs).batch([0])["in"]
        assert fed.dtype == dtype
        np.testing.assert_array_equal(fed[0], raw.transpose(2, 0, 1))
        with pytest.raises(OptionError, match="mean"):
            open_data(tmp_path, inputs, ImageOptions(mean=(0.5,)))
    refused(tmp_path, [spec(None, 3, 4, 6, dtype=np.int8)], "int8")


def test_half_precision_images(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", flat(4, 6, 255))
    fed = open_data(tmp_path, [spec(None, 3, 4, 6, dtype=np.float16)]).batch([0])["in"]
    assert fed.dtype == np.float16 and (fed == 1).all()


def test_models_that_take_no_images(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", flat(4, 6))
    refused(tmp_path, VECTOR, "'in'", "(N, 3)", ".npz")
    refused(tmp_path, [spec(None, 7, 4, 6)], "(N, 7, 4, 6)")
    refused(tmp_path, [spec(None, 3, 4, 6, dtype=np.bool_)], "bool")
    refused(tmp_path, [spec(None, None, 4, 6)], "--layout")
    refused(tmp_path, RGB, "'in'", options=ImageOptions(layout="nhwc"))
    refused(tmp_path, [spec(None, 3, None, None)], "'in'", "--size H W")
    refused(tmp_path, [*RGB, spec(None, 3, name="b")], "2", ".npz")


@pytest.mark.parametrize(
    "options",
    [
        {"size": (0, 4)},
        {"resize": 0},
        {"std": (0.0, 1.0, 1.0)},
        {"std": ()},
        {"mean": (float("nan"),)},
        {"scale": float("inf")},
        {"layout": "chw"},
        {"color": "grey"},
        {"mean": (1.0, 2.0)},
        {"mean": ()},
        {"size": (5, 6)},
        {"resize": 5},
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, object]) -> None:
    picture(tmp_path / "a.png", flat(4, 6))
    with pytest.raises(OptionError) as caught:
        open_data(tmp_path, RGB, ImageOptions(**options))
    check_line(caught.value, (next(iter(options)),))


def test_images_are_read_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        picture(tmp_path / f"{number}.png", flat(4, 6, number))
    read: list[str] = []
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: (read.append(self.name), original(self))[1])
    samples = open_data(tmp_path, RGB, PLAIN)
    assert read == []
    samples.batch([4, 1])
    assert read == ["4.png", "1.png"]


# Digests and choices


def test_digest_is_of_the_samples_as_fed_and_in_order(tmp_path: Path) -> None:
    rows = np.arange(120, dtype=np.float32).reshape(40, 3)
    samples = open_data({"x": rows}, VECTOR)
    first = samples.digest(range(40))
    assert len(first) == 64 and int(first, 16) >= 0
    np.savez(tmp_path / "d.npz", x=rows.astype(np.float64), y=np.arange(40))
    assert open_data(tmp_path / "d.npz", VECTOR).digest(np.arange(40)) == first
    others = [
        *(open_data({"x": rows + (rows == value)}, VECTOR).digest(range(40)) for value in range(120)),
        samples.digest(range(39)),
        samples.digest([1, 0, *range(2, 40)]),
        open_data({"x": rows}, [spec(None, 3, name="other")]).digest(range(40)),
        open_data({"x": rows}, [spec(None, 3, dtype=np.float64)]).digest(range(40)),
        open_data({"x": rows.reshape(40, 3, 1)}, [spec(None, 3, 1)]).digest(range(40)),
    ]
    assert len({first, *others}) == 126


def test_digest_covers_every_input() -> None:
    inputs = [spec(None, 3, name="a"), spec(name="t")]
    digests = {
        open_data({"a": rows, "t": np.float32(scalar)}, inputs).digest([0, 1]) for rows in (ROWS, ROWS + 1) for scalar in (0, 1)
    }
    assert len(digests) == 4


def test_image_digest_depends_on_the_options(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", pixels(4, 6))
    archive = write_zip(tmp_path, tmp_path / "a.zip")
    assert open_data(tmp_path, RGB).digest([0]) == open_data(archive, RGB).digest([0])
    assert open_data(tmp_path, RGB).digest([0]) != open_data(tmp_path, RGB, ImageOptions(color="bgr")).digest([0])


def test_choose() -> None:
    chosen = choose(1000, 50, seed=3)
    assert chosen.dtype == np.int64 and chosen.shape == (50,) and len(set(chosen.tolist())) == 50
    assert set(chosen.tolist()) <= set(range(1000)) and chosen.tolist() != sorted(chosen.tolist())
    np.testing.assert_array_equal(chosen, choose(1000, 50, seed=3))
    np.testing.assert_array_equal(chosen[:20], choose(1000, 20, seed=3))
    assert chosen.tolist() != choose(1000, 50, seed=4).tolist()
    for count in (None, 20, 99):
        assert sorted(choose(20, count, seed=0).tolist()) == list(range(20))
    with pytest.raises(OptionError, match="0 samples"):
        choose(10, 0, seed=0)


def test_encrypted_zip_entries_are_named(tmp_path: Path) -> None:
    encoded = io.BytesIO()
    Image.fromarray(flat(4, 6)).save(encoded, "png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", encoded.getvalue())
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(magic) + offset] |= 1
    (tmp_path / "a.zip").write_bytes(bytes(raw))
    refused(tmp_path / "a.zip", RGB, "a.zip", "a.png", "password")
