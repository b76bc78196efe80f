"""Pictures in folders and zip archives: which files count, and which classes the folders make."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path, PurePosixPath

import numpy as np

from onnxprune.data.images import ImageOptions, ImageSamples
from onnxprune.data.samples import Array, InputSpec
from onnxprune.errors import DataError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
_Parts = tuple[str, ...]


def image_folder(path: Path, inputs: Sequence[InputSpec], options: ImageOptions) -> ImageSamples:
    """The pictures below a folder; see `class_labels` for its sub-folders. Raises DataError."""
    source = str(path)
    files, empty = _walk(path)
    images = _images(files, source, "folder")
    labels, count = class_labels([image[:-1] for image in images], empty, source)
    names = ["/".join(image) for image in images]
    return ImageSamples(source, inputs, options, names, lambda i: (path / names[i]).read_bytes(), labels, count)


def image_zip(path: Path, inputs: Sequence[InputSpec], options: ImageOptions) -> ImageSamples:
    """The pictures of a zip archive, which stays open; folders in it are as in `image_folder`. Raises DataError."""
    source = str(path)
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{source} is not a zip archive that can be read", hint="make the archive anew") from error
    entries = {PurePosixPath(entry.filename).parts: entry for entry in archive.infolist()}
    images = _images((parts for parts, entry in entries.items() if not entry.is_dir()), source, "zip archive")
    shown = [parts for parts in entries if _visible(parts)]
    holding = {parts[:depth] for parts in shown for depth in range(len(parts))}
    empty = [parts for parts in shown if entries[parts].is_dir() and parts not in holding]
    labels, count = class_labels([image[:-1] for image in images], empty, source)
    names = ["/".join(image) for image in images]
    return ImageSamples(source, inputs, options, names, lambda i: archive.read(entries[images[i]]), labels, count)


def class_labels(folders: Sequence[_Parts], empty: Sequence[_Parts], source: str) -> tuple[Array | None, int | None]:
    """Labels of pictures from the folders that they lie in: (int64 [n], number of classes), or (None, None) if flat.

    Folders around all others are looked through. Every folder with pictures is a class, so is an empty one next to
    them; the label is the place in sorted order. Raises DataError where that would be a guess: pictures next to a
    folder of pictures, and one class name under two parents (train/cat and val/cat).
    """
    depth = _shared_depth([*folders, *empty])
    found = [folder[depth:] for folder in folders]
    if set(found) == {()}:
        return None, None
    holding = set(found)
    hollow = {folder[depth:] for folder in empty if not any(folder[depth:][:k] in holding for k in range(len(folder)))}
    classes = sorted(holding | hollow)
    for outer, inner in zip(sorted(holding), sorted(holding)[1:], strict=False):
        if inner[: len(outer)] == outer:
            raise DataError(
                f"{source}: images lie both in {'/'.join(outer) or 'the top folder'!r} and below it in {'/'.join(inner)!r}",
                hint="put images in class folders only, or all in one folder",
            )
    seen: dict[str, _Parts] = {}
    for name in classes:
        if seen.setdefault(name[-1], name) != name:
            raise DataError(
                f"{source}: two folders for one class: {'/'.join(seen[name[-1]])!r} and {'/'.join(name)!r}",
                hint="point at the folder whose sub-folders are the classes",
            )
    place = {name: index for index, name in enumerate(classes)}
    return np.array([place[name] for name in found], np.int64), len(classes)


def _shared_depth(folders: Sequence[_Parts]) -> int:
    first, last = min(folders), max(folders)
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return sum(1 for _ in shared)


def _visible(parts: _Parts) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _images(files: Iterable[_Parts], source: str, kind: str) -> list[_Parts]:
    images = sorted(parts for parts in files if _visible(parts) and PurePosixPath(parts[-1]).suffix.lower() in EXTENSIONS)
    if not images:
        known = " ".join(sorted(extension[1:] for extension in EXTENSIONS))
        raise DataError(f"{source}: there are no images in this {kind}", hint=f"images are files ending in {known}")
    return images


def _walk(root: Path) -> tuple[list[_Parts], list[_Parts]]:
    """All files below a folder and all its empty folders, without hidden ones, as path parts."""

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}", hint="check its permissions")

    files: list[_Parts] = []
    empty: list[_Parts] = []
    for folder, below, names in os.walk(root, onerror=refuse, followlinks=True):
        here = Path(folder)
        parts = here.relative_to(root).parts
        below[:] = [name for name in below if _visible((name,)) and not _loops(here, name)]
        shown = [name for name in names if _visible((name,))]
        files += [(*parts, name) for name in shown]
        if parts and not below and not shown:
            empty.append(parts)
    return files, empty


def _loops(here: Path, name: str) -> bool:
    return (here / name).is_symlink() and here.resolve().is_relative_to((here / name).resolve())
