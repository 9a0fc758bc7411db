"""From encoded images to items: decoding, orientation, resizing, cropping, mirroring, and buckets of aspect ratios."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from diffjax.data.errors import Unreadable, refuse_full_table, require
from diffjax.data.sources import Dataset, Pixels

PIXELS = Pixels(255)
CROPS = ("center", "random", "none")
# How much of an image file to read at once where its header alone is wanted.
HEADER = 1024
_ORIENTATION, _TURNED, _STORED = 0x0112, (5, 6, 7, 8), (0x0100, 0x0101)
_PNG = b"\x89PNG\r\n\x1a\n"


class Record(NamedTuple):
    """One item as it is stored.

    Attributes:
      image: the bytes of an image file, or pixels `[H, W]` or `[H, W, C] uint8`.
      label: an integer from 0.
    """

    image: bytes | np.ndarray
    label: int = 0


class Reader(Protocol):
    """Random access to records.

    It may also have `labels` (`[N]` integers known without reading), `captions`, and `open(index)`: the image of a
    record as a binary file, of which buckets read the header alone.
    """

    def __len__(self) -> int:
        """How many records there are."""

    def __getitem__(self, index: int) -> Record:
        """Record `index`; whatever it raises makes the item unreadable."""

    def name(self, index: int) -> str:
        """What to call record `index` in a message: its file, and where in it."""


@dataclass(frozen=True)
class View:
    """What training sees of an image.

    Attributes:
      shapes: `(height, width)` of each bucket; items without buckets use the first.
      crop: "center" or "random" place of the largest window of the wanted aspect ratio, or "none": the whole image,
        stretched.
      flip: mirror left to right with probability 1/2.
      zoom: the window is this many times smaller than the largest; above 1 it has room in both directions.
      channels: 1 for grey, 3 for RGB.
    """

    shapes: tuple[tuple[int, int], ...]
    crop: str = "center"
    flip: bool = False
    zoom: float = 1.0
    channels: int = 3

    @property
    def random(self) -> bool:
        """Whether two looks at an item may differ."""
        return self.flip or self.crop == "random"

    def plain(self, image: Any) -> np.ndarray:
        """`[H, W, C] float32` in `[-1, 1]` of a PIL image at the first shape, centred and not mirrored."""
        return self._window(image, self.shapes[0], (0.5, 0.5), 1.0)

    def drawn(self, image: Any, bucket: int, key: tuple[int, ...]) -> np.ndarray:
        """`[h, w, C] float32` in `[-1, 1]` at the shape of `bucket`; what is random is a function of `key`."""
        at, mirrored = (0.5, 0.5), False
        if self.random:
            draws = np.random.default_rng(key).random(3)
            at = tuple(draws[:2]) if self.crop == "random" else at
            mirrored = self.flip and draws[2] < 0.5
        pixels = self._window(image, self.shapes[bucket], at, self.zoom)
        return np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels

    def _window(self, image, shape, at, zoom) -> np.ndarray:
        from PIL import Image

        height, width = shape
        box = (0.0, 0.0, float(image.width), float(image.height))
        if self.crop != "none":
            scale = min(image.width / width, image.height / height) / zoom
            # Rounding must not make the window wider than the image: it would begin below 0, which Pillow refuses.
            across, down = min(width * scale, image.width), min(height * scale, image.height)
            left, top = at[0] * (image.width - across), at[1] * (image.height - down)
            box = (left, top, left + across, top + down)
        # Pillow's bicubic filter widens with the reduction, so that small images do not alias.
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))
        return PIXELS.inverse(pixels.reshape(height, width, self.channels))


class ImageSource:
    """Some of the records of a reader as a source of items `{"image": [H, W, C] float32, "label": int32}`.

    `source[i]` is item i at the first shape, centred; `source.draw(i, key)` is what training sees of it.

    Attributes:
      reader: where the records come from.
      positions: `[N]` which of them these are.
      view: what is seen of an image.
      buckets: `[N]` the bucket of each item, or None.
      num_classes: labels are below it, and others make their item unreadable; 0 makes every label 0.
      captions: one text per item, or None; batches do not hold them, `BatchIterator.batch_ids` says which belong.
    """

    def __init__(
        self, reader: Reader, positions: np.ndarray, view: View, buckets: np.ndarray | None = None, *, num_classes: int
    ):
        self.reader, self.positions, self.view, self.buckets = reader, positions, view, buckets
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        return self._item(int(index), self.view.plain)

    def draw(self, index: int, key: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Item `index` as training sees it at the place in the stream that `key` stands for."""
        bucket = 0 if self.buckets is None else int(self.buckets[index])
        return self._item(index, lambda image: self.view.drawn(image, bucket, key))

    @property
    def captions(self) -> Sequence[str] | None:
        every = getattr(self.reader, "captions", None)
        return None if every is None else Chosen(every, self.positions)

    def name(self, index: int) -> str:
        """What to call item `index` in a message."""
        return self.reader.name(int(self.positions[index]))

    def _item(self, index, see) -> dict[str, np.ndarray]:
        try:
            record = self.reader[int(self.positions[index])]
            image = see(decode(record.image, self.view.channels))
            label = int(record.label) if self.num_classes else 0
            if self.num_classes and not 0 <= label < self.num_classes:
                raise ValueError(f"label {label}; expected 0 .. {self.num_classes - 1}")
        except Exception as error:
            refuse_full_table(error)
            # Broken files raise a dozen kinds of exception; the pipeline counts all of them.
            reason = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
            raise Unreadable(self.name(index), reason) from error
        return {"image": image, "label": np.int32(label)}


class Chosen(Sequence):
    """Some items of a sequence, in an order of their own, looked up when asked for."""

    def __init__(self, every: Sequence, positions: np.ndarray):
        self._every, self._positions = every, positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index):
        return self._every[int(self._positions[index])]


def decode(image: bytes | np.ndarray, channels: int) -> Any:
    """A PIL image, upright as its EXIF orientation says, grey or RGB; what is transparent is laid over white.

    Raises:
      OSError: for bytes that are no whole image.
      ValueError: for bytes that are no image, or more than 8 bits per channel.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        opened = Image.fromarray(_squeezed(image)) if isinstance(image, np.ndarray) else Image.open(io.BytesIO(image))
    except UnidentifiedImageError:
        raise ValueError("not an image file") from None  # Pillow's text holds an address in memory.
    if opened.mode in ("I", "F") or opened.mode.startswith("I;16"):
        raise ValueError(f"it has mode {opened.mode}; expected 8 bits per channel")
    opened.load()
    upright = ImageOps.exif_transpose(opened)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        solid = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", solid.size, "white"), solid)
    return upright.convert("L" if channels == 1 else "RGB")


def image_dataset(
    reader: Reader, *, size: int | tuple[int, int] | None, crop: str, flip: bool, zoom: float, channels: int,
    buckets: Any, heldout: float | int | Reader, split_seed: int, num_classes: int,
) -> Dataset:  # fmt: skip
    """A `Dataset` of the records of a reader: the arguments that all sources of images share.

    Args:
      size: side or `(height, width)` of what training sees; None takes that of the first image.
      crop, flip, zoom, channels: see `View`.
      buckets: None; `((height, width), ...)`; or an integer, of which all sides shall be multiples, for all shapes with
        at most `size * size` pixels and an aspect ratio of at most 2. Each image goes to the shape nearest to its own
        in log aspect ratio, and a batch holds one shape; shapes without images are dropped.
      heldout: a share in (0, 1), a number of images, or a reader of other images.
      split_seed: another seed gives another split. It keeps the shares of classes where every class can be split.
      num_classes: labels are below it; 0 for none.

    Raises:
      ValueError: for settings that are not possible, or too few images.
    """
    require("PIL", "Pillow")
    if not len(reader):
        raise ValueError("no images")
    view = View((_size(size, reader),), crop, flip, zoom, channels)
    _check(view)
    if isinstance(heldout, float | int):
        train, held = split(len(reader), getattr(reader, "labels", None) if num_classes else None, heldout, split_seed)
        other = reader
    else:
        train, held, other = np.arange(len(reader)), np.arange(len(heldout)), heldout
    groups = None
    if buckets is not None:
        groups, shapes = bucketed(reader, train, bucket_shapes(buckets, view.shapes[0]))
        view = View(shapes, crop, flip, zoom, channels)
    shape = (*view.shapes[0], channels)
    evaluated = View(view.shapes[:1], "none" if crop == "none" else "center", channels=channels)
    return Dataset(
        train=ImageSource(reader, train, view, groups, num_classes=num_classes),
        heldout=ImageSource(other, held, evaluated, num_classes=num_classes),
        shape=shape,
        num_classes=num_classes,
        to_pixels=PIXELS,
        buckets=tuple((*s, channels) for s in view.shapes) if groups is not None else (),
    )


def split(n: int, labels, heldout: float | int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`(train, heldout)`: positions `0 .. n - 1` in two parts, each class in both in its share where that is possible.

    Raises:
      ValueError: if a part would be empty.
    """
    held = int(np.ceil(heldout * n)) if isinstance(heldout, float) and heldout < 1 else int(heldout)
    if not 0 < held < n or held != heldout and not 0 < heldout < 1:
        raise ValueError(f"cannot hold out {heldout!r} of {n} images; give a share in (0, 1), or 1 .. {n - 1}")
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    if labels is not None:
        # Every class evenly over [0, 1): any stretch of that order holds its share of each.
        labels, place = np.asarray(labels)[order], np.empty(n)
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            place[members] = (np.arange(len(members)) + rng.random()) / len(members)
        order = order[np.argsort(place, kind="stable")]
    return np.sort(order[held:]), np.sort(order[:held])


def bucket_shapes(buckets: Any, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """`((height, width), ...)` that `buckets` stands for: see `image_dataset`.

    Raises:
      ValueError: if it is neither shapes nor an integer that divides both sides of `size`.
    """
    if isinstance(buckets, int) and not isinstance(buckets, bool):
        step, (height, width) = buckets, size
        if step < 1 or height % step or width % step:
            raise ValueError(f"buckets={step}: expected a divisor of both sides of size={size}")
        sides = range(step, 2 * max(size) + 1, step)
        found = {(h, height * width // h // step * step) for h in sides}
        found |= {(w, h) for h, w in found}
        return tuple(sorted(s for s in found if min(s) and max(s) <= 2 * min(s)))
    try:
        shapes = tuple((int(h), int(w)) for h, w in buckets)
    except (TypeError, ValueError):
        shapes = ()
    if not shapes or min(min(s) for s in shapes) < 1:
        raise ValueError(f"buckets={buckets!r}: expected an integer such as 16, or shapes such as ((64, 64), (48, 80))")
    return shapes


def bucketed(reader: Reader, positions: np.ndarray, shapes) -> tuple[np.ndarray, tuple]:
    """`(bucket [N] of each position, shapes)`, with the fullest bucket first and empty ones left out."""

    def ratio(position):
        try:
            width, height = shown_size(reader, int(position))
        except Exception as error:
            refuse_full_table(error)
            return 0.0  # It is counted when it is read.
        return np.log(width / height)

    with ThreadPoolExecutor(8) as pool:
        ratios = np.array(list(pool.map(ratio, positions)))
    aspects = np.log([w / h for h, w in shapes])
    nearest = np.argmin(np.abs(ratios[:, None] - aspects), axis=1)
    used, counts = np.unique(nearest, return_counts=True)
    used = used[np.argsort(-counts, kind="stable")]
    place = {int(old): new for new, old in enumerate(used)}
    return np.array([place[int(g)] for g in nearest], np.int32), tuple(shapes[g] for g in used)


def shown_size(reader: Reader, index: int) -> tuple[int, int]:
    """`(width, height)` of the image of a record as it is shown, from its header alone where the reader opens it."""
    if not hasattr(reader, "open"):
        return measure(reader[index].image)
    with reader.open(index) as file:
        return measure(file)


def measure(image: bytes | np.ndarray | BinaryIO) -> tuple[int, int]:
    """`(width, height)` of an image as it is shown, from its header; of WebP Pillow reads the whole file."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    file = io.BytesIO(image) if isinstance(image, bytes) else image
    with Image.open(_without_pixels(file)) as opened:
        # In place of the format's own, which for PNG decodes the image in search of what lies behind the pixels.
        turned = Image.Image.getexif(opened).get(_ORIENTATION) in _TURNED
        # The size that Pillow gives of a TIFF is turned already.
        size = tuple(opened.tag_v2[tag] for tag in _STORED) if opened.format == "TIFF" else opened.size
        return size[::-1] if turned else size


def _without_pixels(file: BinaryIO) -> BinaryIO:
    """A PNG file with nothing in place of its pixels, and what lay behind them before them; any other file itself."""
    if file.read(len(_PNG)) != _PNG:
        file.seek(0)
        return file
    kept = [_PNG]
    while len(head := file.read(8)) == 8 and not head.endswith(b"IEND"):
        length = int.from_bytes(head[:4], "big") + 4  # and its checksum
        # Those of an animation have frames of their own.
        if head[4:] in (b"IDAT", b"acTL", b"fcTL", b"fdAT"):
            file.seek(length, io.SEEK_CUR)
        else:
            kept += [head, file.read(length)]
    return io.BytesIO(b"".join([*kept, b"\0\0\0\0IDAT", zlib.crc32(b"IDAT").to_bytes(4, "big")]))


def _squeezed(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels


def _size(size, reader) -> tuple[int, int]:
    if size is None:
        for index in range(min(len(reader), 100)):
            try:
                return shown_size(reader, index)[::-1]
            except Exception as error:
                refuse_full_table(error)
        raise ValueError(f"the first images, such as {reader.name(0)}, cannot be read; give size=64 or so")
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or any(not isinstance(s, int) or s < 1 for s in sides):
        raise ValueError(f"size={size!r}: expected a side such as 64, or (height, width)")
    return sides


def _check(view: View) -> None:
    if view.crop not in CROPS:
        raise ValueError(f"crop={view.crop!r}; known: {', '.join(CROPS)}")
    if view.channels not in (1, 3):
        raise ValueError(f"channels={view.channels}: expected 1 (grey) or 3 (RGB)")
    if not view.zoom >= 1:
        raise ValueError(f"zoom={view.zoom}: expected at least 1")
    if view.zoom > 1 and view.crop != "random":
        raise ValueError(f"zoom={view.zoom} needs crop='random': a centred crop would cut off every border")
