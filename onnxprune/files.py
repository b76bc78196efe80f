"""Model files: read with what belongs to them, and written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from onnxprune import inline, large, weights, wire
from onnxprune.errors import ModelError, OutputError

EXTERNAL_THRESHOLD = 1024  # bytes; smaller tensors stay in the model file


def load(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Reads an ONNX file as `read` does, and simplifies it (see `inline`)."""
    return inline.simplified(read(path), os.fspath(path))


def read(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Reads an ONNX file with its external data, as it stands.

    The external data of a large model stay in their files, see `large`.

    Raises ModelError when the file is missing, is not an ONNX model, is truncated, or lacks its external data.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError(f"no such model file: {path}", hint="give the path of an .onnx file")
    if path.is_dir():
        raise ModelError(f"{path} is a folder, not a model file", hint="give the path of an .onnx file")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise ModelError(f"{path} is not a readable ONNX model", hint="it is truncated or of another format") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    if not model.graph.node or not model.opset_import:
        raise ModelError(f"{path} is not an ONNX model", hint="it holds no graph with operators")
    try:
        large.attach(model, path.parent)
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        text = str(error).splitlines()[0]
        raise ModelError(f"the external data of {path} cannot be read: {text}", hint="keep the data file beside it") from None
    return model


def external_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files beside the model at `path` in which it keeps weights; none where it is not a model."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(Path(path).read_bytes())
    except (OSError, DecodeError):
        return []
    entries = [e for t in weights.references(model) for e in t.external_data]
    return [Path(path).parent / name for name in dict.fromkeys(e.value for e in entries if e.key == "location")]


def data_file(path: str | os.PathLike[str]) -> Path:
    """Where `save` puts the weights of a model with external data."""
    return Path(path).with_name(Path(path).name + ".data")


def writable(*paths: Path, force: bool) -> None:
    """Raises OutputError unless files can be written at all of `paths`; asked before long work, not after it."""
    for i, path in enumerate(paths):
        if any(path.absolute() == other.absolute() for other in paths[:i]):
            raise OutputError(f"two outputs would be written to {path}", hint="give each a name of its own")
        _writable(path, force=force)


def _writable(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise OutputError(f"{path} is a folder", hint="name a file to write")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is not a regular file", hint="name a file to write")
    if path.exists() and not force:
        raise OutputError(f"{path} exists already", hint="add --force to replace it, or choose another name")
    if path.parent.exists() and not path.parent.is_dir():
        raise OutputError(f"{path.parent} is not a folder, so nothing can be written in it", hint="choose another folder")
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist", hint="create it first")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".onnxprune-"):
            pass
    except OSError as error:
        raise OutputError(f"cannot write in {path.parent}: {error.strerror}", hint="choose another folder") from None


@contextlib.contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place if, and only if, the block ends well. Raises OutputError.

    mode: the permissions of the file, less what the umask takes away.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".onnxprune-", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(mode & ~umask)  # mkstemp makes files that only their owner may read
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="is there space, and may you write there?") from None


def save(model: onnx.ModelProto, path: str | os.PathLike[str], *, external: bool = False) -> None:
    """Writes the model whole or not at all; with `external`, big tensors go into PATH.data beside it, one after another.

    These are initializers, and the values of Constant nodes only where the file would be large with them.
    Raises OutputError when that fails, or would replace a file that the model's own weights are in.
    """
    path = Path(path)
    data = data_file(path)
    sources = {weights.place(t).path for t in weights.references(model)}
    apart([path, data] if external else [path], sources)
    copy = onnx.ModelProto()
    if external:
        copy.CopyFrom(model)
    if not (moving := _movable(copy)):
        with whole_file(path) as temporary:
            wire.write(model, temporary)
        return
    with whole_file(path) as temporary, whole_file(data) as blob:  # the data are in place before the model that needs them
        _move(moving, blob, data.name)
        large.settle(copy)
        temporary.write_bytes(copy.SerializeToString(deterministic=True))


def apart(targets: Iterable[Path], sources: Iterable[Path], model: Path | None = None) -> None:
    """Raises OutputError when a target is one of the sources; `model` is the one of them that is the input model."""
    sources = list(sources)
    for target in targets:
        for source in sources:
            if target.exists() and source.exists() and target.samefile(source):
                what = "the input model" if source == model else "an input"
                raise OutputError(f"{target} is {what}", hint="onnxprune never overwrites its input: choose another name")


def _movable(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    others = [t for node in model.graph.node for t in weights.tensors(node)]
    heavy = sum(weights.length(t) for t in others) > large.HELD
    return [t for t in [*model.graph.initializer, *(others if heavy else [])] if weights.length(t) >= EXTERNAL_THRESHOLD]


def _move(tensors: Iterable[onnx.TensorProto], blob: Path, location: str) -> None:
    offset = 0
    with blob.open("wb") as out:
        for tensor in tensors:
            pad = -offset % 4096  # aligned, so that a runtime can map the file
            length = weights.length(tensor)
            out.write(b"\0" * pad)
            out.writelines(weights.values(tensor))
            weights.point(tensor, location, offset + pad, length)
            offset += pad + length
