"""Samples that are pictures: decoded, resized, cropped and scaled batch by batch."""

from __future__ import annotations

import io
import math
import struct
import textwrap
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from onnxprune.data.samples import Array, InputSpec, Samples
from onnxprune.errors import DataError, OptionError

# What Pillow and the zip reader raise for damaged files.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class ImageOptions:
    """How pictures become the model's input.

    A picture is turned upright (EXIF), converted to RGB (or grey for one channel), resized (bilinear) so that its short
    side is `resize` pixels, or without `resize` so that it just covers `size`, and centre-cropped to `size` (H, W;
    default: the model's). Then (x * scale - mean) / std with x in 0 .. 255; `mean` and `std` have one value or one per
    channel, in the order in which the channels are fed (`color`). A model with an integer input gets the pixels
    0 .. 255 as they are. `layout` None: guessed from the input's shape.
    Raises OptionError for values that make no sense.
    """

    size: tuple[int, int] | None = None
    resize: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float = 1 / 255
    layout: Literal["nchw", "nhwc"] | None = None
    color: Literal["rgb", "bgr"] = "rgb"

    def __post_init__(self) -> None:
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise OptionError(f"image size {self.size} makes no sense", hint="give height and width in pixels")
        if self.resize is not None and self.resize < 1:
            raise OptionError(f"image resize {self.resize} makes no sense", hint="give the short side in pixels")
        if not all(math.isfinite(value) for value in (self.scale, *(self.mean or ()), *(self.std or ()))):
            raise OptionError("image scale, mean and std must be finite numbers")
        if self.std is not None and min(self.std, default=0) <= 0:
            raise OptionError(f"image std {self.std} makes no sense", hint="give numbers above 0")
        if self.layout not in (None, "nchw", "nhwc") or self.color not in ("rgb", "bgr"):
            raise OptionError(
                f"image layout {self.layout!r} or color {self.color!r} is unknown",
                hint="layout is nchw or nhwc, color is rgb or bgr",
            )


class _Frame(NamedTuple):
    layout: str
    channels: int
    height: int
    width: int


class ImageSamples(Samples):
    """Encoded pictures for a model with one image input; `read(i)` gives the bytes of picture `names[i]`."""

    def __init__(
        self,
        source: str,
        inputs: Sequence[InputSpec],
        options: ImageOptions,
        names: Sequence[str],
        read: Callable[[int], bytes],
        labels: Array | None,
        num_classes: int | None,
    ) -> None:
        super().__init__(source, inputs, labels, num_classes)
        self._frame = _frame(inputs, options, source)
        self._options = options
        self._names = names
        self._read = read

    def __len__(self) -> int:
        return len(self._names)

    def _rows(self, indices: Array) -> dict[str, Array]:
        _, channels, height, width = self._frame
        pixels = np.empty((len(indices), height, width, channels), np.uint8)
        for row, index in enumerate(indices):
            pixels[row] = self._pixels(int(index))
        return {self.inputs[0].name: pixels}

    def _ready(self, stored: Mapping[str, Array]) -> dict[str, Array]:
        spec = self.inputs[0]
        pixels = stored[spec.name]
        scaled = self._scaled(pixels[..., ::-1] if self._options.color == "bgr" else pixels, spec)
        return {spec.name: scaled.transpose(0, 3, 1, 2) if self._frame.layout == "nchw" else scaled}

    def picture_axes(self) -> tuple[int, int]:
        return 1, 2

    def _pixels(self, index: int) -> Array:
        try:
            with Image.open(io.BytesIO(self._read(index))) as image:
                upright = ImageOps.exif_transpose(image)
                plain = _eight_bit(upright).convert("L" if self._frame.channels == 1 else "RGB")
        except _UNREADABLE as error:
            raise DataError(
                f"{self.source}: cannot read the image {self._names[index]!r}: {_said(error)}",
                hint="replace it or take it away",
            ) from error
        height, width = self._frame.height, self._frame.width
        fitted = np.asarray(_fit(plain, height, width, self._options.resize))
        return fitted.reshape(height, width, self._frame.channels)

    def _scaled(self, pixels: Array, spec: InputSpec) -> Array:
        if spec.dtype.kind in "iu":
            return pixels
        scaled: Array = pixels.astype(np.float32)
        scaled *= np.float32(self._options.scale)
        if self._options.mean is not None:
            scaled -= np.asarray(self._options.mean, np.float32)
        if self._options.std is not None:
            scaled /= np.asarray(self._options.std, np.float32)
        return scaled


def _frame(inputs: Sequence[InputSpec], options: ImageOptions, source: str) -> _Frame:
    """The layout and size that the model's one input takes pictures in."""
    if len(inputs) != 1:
        raise DataError(
            f"{source}: images feed one input and the model has {len(inputs)}",
            hint="give an .npz with one array for each",
        )
    spec = inputs[0]
    wide = spec.dtype.kind in "iu" and np.iinfo(spec.dtype).max >= 255
    layout = _layout(spec, options)
    if layout is None or not (wide or spec.dtype.kind in "fV"):
        raise DataError(
            f"{source}: images do not fit input {spec.name!r}, which takes {spec.dtype} {spec.describe()}",
            hint="images need rank 4 with 1 or 3 channels: give an .npz, or --layout if the channels are dynamic",
        )
    _, *dims = spec.shape
    channels, height, width = dims if layout == "nchw" else (dims[2], *dims[:2])
    frame = _Frame(layout, channels or 3, *_size(spec, height, width, options, source))
    _check_options(options, frame, spec)
    return frame


def _layout(spec: InputSpec, options: ImageOptions) -> str | None:
    if len(spec.shape) != 4:
        return None
    if options.layout is not None:
        fits = spec.shape[1 if options.layout == "nchw" else 3] in (1, 3, None)
        return options.layout if fits else None
    return "nchw" if spec.shape[1] in (1, 3) else "nhwc" if spec.shape[3] in (1, 3) else None


def _size(spec: InputSpec, height: int | None, width: int | None, options: ImageOptions, source: str) -> tuple[int, int]:
    if options.size is None:
        if height is None or width is None:
            raise DataError(
                f"{source}: input {spec.name!r} takes images of any size, {spec.describe()}", hint="give --size H W"
            )
        return height, width
    if height not in (None, options.size[0]) or width not in (None, options.size[1]):
        raise OptionError(
            f"image size {options.size} does not fit input {spec.name!r}, which takes {spec.describe()}",
            hint="leave --size out",
        )
    return options.size


def _check_options(options: ImageOptions, frame: _Frame, spec: InputSpec) -> None:
    for name, values in (("mean", options.mean), ("std", options.std)):
        if values is not None and len(values) not in (1, frame.channels):
            raise OptionError(
                f"image {name} has {len(values)} values and input {spec.name!r} has {frame.channels} channels",
                hint="give one value, or one per channel",
            )
        if values is not None and spec.dtype.kind in "iu":
            raise OptionError(
                f"image {name} cannot apply to input {spec.name!r}, which takes {spec.dtype} pixels",
                hint="leave it out",
            )
    if options.resize is not None and options.resize < max(frame.height, frame.width):
        raise OptionError(
            f"image resize {options.resize} is less than the crop of {frame.height} x {frame.width}",
            hint="resize is the short side before the crop",
        )


def _said(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a known format"
    return textwrap.shorten(str(error), 200) or type(error).__name__


def _eight_bit(image: Image.Image) -> Image.Image:
    """Pillow's own conversion clips wide pixels at 255 instead of scaling them."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("pixels of more than 16 bits")
    return image


def _fit(image: Image.Image, height: int, width: int, resize: int | None) -> Image.Image:
    if resize is None:
        factor = max(height / image.height, width / image.width)
        wide, high = max(width, round(image.width * factor)), max(height, round(image.height * factor))
    else:
        # The long side is truncated, as in the usual training pipelines.
        short = min(image.size)
        wide, high = resize * image.width // short, resize * image.height // short
    if (wide, high) != image.size:
        image = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = round((wide - width) / 2), round((high - height) / 2)
    return image.crop((left, top, left + width, top + height))
