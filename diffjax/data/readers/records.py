"""ArrayRecord files: of encoded images, of `tf.train.Example` messages, or of anything that a function can decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from diffjax import registry
from diffjax.data.errors import require
from diffjax.data.images import Record, image_dataset
from diffjax.data.readers.tar import matching
from diffjax.data.sources import Dataset


class RecordReader:
    """Records of ArrayRecord files, in order.

    Attributes:
      files: the files.
      parse: `bytes -> Record`.
    """

    def __init__(self, files: list[str], parse: Callable[[bytes], Record]):
        self.files, self.parse = files, parse
        self._source = None
        self._length = len(self._open())

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        return self.parse(self._open()[index])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_source": None}

    def name(self, index: int) -> str:
        """The first file and the number of the record over all files."""
        return f"record {index} of {self.files[0]}" + (f" and {len(self.files) - 1} more" if self.files[1:] else "")

    def _open(self):
        if self._source is None:
            module = require("array_record.python.array_record_data_source", "array-record")
            self._source = module.ArrayRecordDataSource(self.files)
        return self._source


def array_record(
    path: str | tuple[str, ...], size: int | tuple[int, int] | None = None, *, decode: str = "image",
    num_classes: int = 0, crop: str = "center", flip: bool = False, zoom: float = 1.0, channels: int = 3,
    buckets: Any = None, heldout: float | int = 0.1, split_seed: int = 0,
) -> Dataset:  # fmt: skip
    """A `Dataset` of ArrayRecord files.

    Args:
      path: a file, a pattern such as `"train.array_record-*"`, or a tuple of them.
      decode: "image" if a record is an image file; "example" if it is a `tf.train.Example` with a feature `image` or
        `image/encoded` (and `label` or `image/class/label`), as TFDS writes them; or `"package.module:fn"` with
        `fn(bytes) -> {"image": bytes or [H, W, C] uint8, "label": int}`.
      num_classes: labels are below it; 0 for none.
      size, crop, flip, zoom, channels, buckets, heldout, split_seed: see `folder`.

    Raises:
      FileNotFoundError: if no file fits the pattern.
      ModuleNotFoundError: if array-record is not installed.
      ValueError: for an unknown `decode`, or as `folder`.
    """
    files = matching(path, "array_record(path=...) takes files such as 'train.array_record-*'")
    parse = PARSERS.get(decode) or _user(registry.lookup(decode, PARSERS, "decode"))
    try:
        reader = RecordReader(files, parse)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{files[0]!r} cannot be read as ArrayRecord: {error}") from None
    return image_dataset(
        reader, size=size, crop=crop, flip=flip, zoom=zoom, channels=channels, buckets=buckets, heldout=heldout,
        split_seed=split_seed, num_classes=num_classes,
    )  # fmt: skip


def parse_image(data: bytes) -> Record:
    """A record that is an image file."""
    return Record(data)


def parse_example(data: bytes) -> Record:
    """A record that is a `tf.train.Example`.

    Raises:
      ValueError: if it is none, or has no image.
    """
    features = example(data)
    image = next((features[name] for name in ("image", "image/encoded") if name in features), None)
    if not image or not isinstance(image[0], bytes):
        raise ValueError(f"the example has no encoded image; its features: {', '.join(sorted(features)) or 'none'}")
    label = next((features[name] for name in ("label", "image/class/label") if name in features), [0])
    return Record(image[0], int(label[0]))


def _user(fn: Callable) -> Callable[[bytes], Record]:
    def parse(data):
        item = fn(data)
        return Record(item["image"], int(item.get("label", 0)))

    return parse


PARSERS = {"image": parse_image, "example": parse_example}


def example(data: bytes) -> dict[str, list]:
    """The features of a serialised `tf.train.Example`: lists of bytes, floats or integers by name.

    Its messages are nested as Example{1: Features{1: map<string, Feature{1: bytes, 2: floats, 3: ints}>}}
    (tensorflow/core/example/{example,feature}.proto).

    Raises:
      ValueError: if the bytes are no such message.
    """
    found = {}
    for features in _messages(data, 1):
        for entry in _messages(features, 1):
            fields = dict(_fields(entry))
            name = bytes(fields.get(1, b"")).decode()
            for kind, value in _fields(fields.get(2, b"")):
                found[name] = _LISTS[kind](value) if kind in _LISTS else []
    return found


def _floats(data: bytes) -> list[float]:
    return [float(v) for n, part in _fields(data) if n == 1 for v in np.frombuffer(part, "<f4")]


def _ints(data: bytes) -> list[int]:
    values = []
    for _, part in _fields(data):
        if isinstance(part, int):
            values.append(part)
            continue
        at = 0
        while at < len(part):
            value, at = _varint(part, at)
            values.append(value)
    return [v - (1 << 64) if v >> 63 else v for v in values]


_LISTS = {1: lambda data: list(_messages(data, 1)), 2: _floats, 3: _ints}


def _messages(data: bytes, number: int) -> Iterator[bytes]:
    return (value for n, value in _fields(data) if n == number and isinstance(value, bytes))


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a protocol buffer message: `(number, value)`, bytes for all but variable-length integers."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            size, at = (8 if kind == 1 else 4, at) if kind != 2 else _varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError("the record is no tf.train.Example")
        if at > len(data):
            raise ValueError("the record is no whole tf.train.Example")
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        value |= (data[at] & 127) << shift
        at += 1
        if not data[at - 1] & 128:
            return value, at
        shift += 7
    raise ValueError("the record is no whole tf.train.Example")
