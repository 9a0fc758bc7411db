"""WebDataset-style shards: uncompressed tar files in which the members of one item share their name up to the first
dot, read at random by offset."""

from __future__ import annotations

import glob
import io
import json
import logging
import os
import tarfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from diffjax.data.images import HEADER, Record, image_dataset
from diffjax.data.sources import Dataset
from diffjax.files import write_text

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm")
INDEX = ".index.json"
# 2: with labels.
_FORMAT = 2

log = logging.getLogger("diffjax")


class TarReader:
    """Records of the items in tar files, in the order in which they lie there.

    Attributes:
      shards: the files.
      items: `[(shard, key, {extension: (offset, size)})]`.
      labels: `[N]` integers, or None if no item has one.
      captions: one text per item, or None if not every item has one.

    Raises:
      ValueError: if the first item has a label and another has none.
    """

    def __init__(self, shards: Sequence[str], items: list, labels: Sequence[int | None] = ()):
        self.shards, self.items, self._files = list(shards), items, OpenFiles()
        self.labels = list(labels) if labels and labels[0] is not None else None
        if self.labels and None in self.labels:
            missing = self.name(self.labels.index(None))
            raise ValueError(f"{missing} has no label and {self.name(0)} has one; expected a .cls for each")
        told = all({"txt", "json"} & set(members) for _, _, members in items)
        self.captions = TarTexts(self) if told and self._caption(0) is not None else None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Record:
        members = self.items[index][2]
        return Record(self.read(index, image_in(members)), 0 if self.labels is None else self.labels[index])

    def open(self, index: int) -> BinaryIO:
        """The image as a file."""
        shard, _, members = self.items[index]
        offset, size = members[image_in(members)]
        read = lambda n, at: self._files.read(self.shards[shard], n, offset + at)
        return io.BufferedReader(Member(read, size), HEADER)

    def read(self, index: int, extension: str) -> bytes:
        """The bytes of one member of an item.

        Raises:
          OSError: if the file ends before it.
        """
        shard, _, members = self.items[index]
        offset, size = members[extension]
        return self._files.read(self.shards[shard], size, offset)

    def name(self, index: int) -> str:
        """The shard and the key in it."""
        shard, key, _ = self.items[index]
        return f"{self.shards[shard]}:{key}"

    def _caption(self, index: int) -> str | None:
        if "txt" in self.items[index][2]:
            return self.read(index, "txt").decode().strip()
        try:
            fields = fields_of(self.read(index, "json"))
        except ValueError as error:
            raise ValueError(f"{self.name(index)}: {error}") from None
        return fields.get("text", fields.get("caption"))


class TarTexts(Sequence):
    """The captions of a reader's items, read when they are asked for."""

    def __init__(self, reader: TarReader):
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index):
        return self._reader._caption(index) or ""


class Member(io.RawIOBase):
    """A part of a file as a file of its own: `size` bytes of which `read(n, at)` reads some."""

    def __init__(self, read: Callable[[int, int], bytes], size: int):
        self._read, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer) -> int:
        found = self._read(max(min(len(buffer), self._size - self._at), 0), self._at)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


class OpenFiles:
    """Reads of many files through few open ones, by any number of threads at once.

    Each read has its file to itself, so that none is closed under another; the `most` used last stay open.
    """

    def __init__(self, most: int = 64):
        self._most, self._idle, self._lock = most, [], threading.Lock()

    def __reduce__(self):
        # Open files stay behind in the process that opened them.
        return OpenFiles, (self._most,)

    def read(self, path: str, size: int, offset: int) -> bytes:
        """`size` bytes from `offset`.

        Raises:
          OSError: if the file cannot be opened or read, or ends before them.
        """
        file = self._take(path) or open(path, "rb", buffering=0)
        try:
            return _pread(file, size, offset)
        finally:
            self._give(path, file)

    def _take(self, path):
        with self._lock:
            at = next((i for i, (name, _) in enumerate(self._idle) if name == path), None)
            return None if at is None else self._idle.pop(at)[1]

    def _give(self, path, file):
        with self._lock:
            self._idle.append((path, file))
            oldest = self._idle.pop(0)[1] if len(self._idle) > self._most else None
        if oldest:
            oldest.close()


def tar(
    path: str | tuple[str, ...], size: int | tuple[int, int] | None = None, *, crop: str = "center", flip: bool = False,
    zoom: float = 1.0, channels: int = 3, buckets: Any = None, heldout: float | int = 0.1, split_seed: int = 0,
    labels: bool = True,
) -> Dataset:  # fmt: skip
    """A `Dataset` of tar shards as WebDataset writes them: `000.jpg`, `000.cls`, `000.txt` or `000.json` for an item.

    Labels come from `.cls` (a decimal number) or `label` in `.json`, captions from `.txt`, or `text` or `caption` in
    `.json`. Where each member lies, and the labels, are found once and kept beside each shard in `SHARD.index.json`, or
    only in memory where that cannot be written.

    Args:
      path: a file, a pattern such as `"shards/train-*.tar"`, or a tuple of them.
      size, crop, flip, zoom, channels, buckets, heldout, split_seed, labels: see `folder`.

    Raises:
      FileNotFoundError: if no file fits the pattern.
      ValueError: for a compressed or damaged tar file, labels that are no integers or that only some items have, or as
        `folder`.
    """
    shards = matching(path, "tar(path=...) takes files such as 'train-*.tar'")
    items, found = [], []
    for number, shard in enumerate(shards):
        index = index_of(shard, labels=labels)
        items += [(number, key, {e: tuple(at) for e, at in members.items()}) for key, members in index.items]
        found += index.labels if labels else []
    if not items:
        raise ValueError(f"no image in {', '.join(shards[:3])}; expected members such as 000.jpg and 000.cls")
    reader = TarReader(shards, items, found)
    return image_dataset(
        reader, size=size, crop=crop, flip=flip, zoom=zoom, channels=channels, buckets=buckets, heldout=heldout,
        split_seed=split_seed, num_classes=0 if reader.labels is None else max(reader.labels) + 1,
    )  # fmt: skip


def matching(path: str | tuple[str, ...], what: str) -> list[str]:
    """The files that a pattern or a tuple of patterns names, those of each sorted, each file once.

    Raises:
      FileNotFoundError: if a pattern fits none.
    """
    found = []
    for pattern in (path,) if isinstance(path, str) else path:
        name = os.path.expanduser(pattern)
        # A file may be called like a pattern, as in `set[1].tar`.
        files = [name] if os.path.isfile(name) else sorted(f for f in glob.glob(name) if not f.endswith(INDEX))
        if not files:
            raise FileNotFoundError(f"no file {pattern!r}; {what}")
        found += files
    return list(dict.fromkeys(found))


class Index(NamedTuple):
    """What lies where in a shard.

    Attributes:
      items: `[[key, {extension: [offset, size]}], ...]` of the items with an image.
      labels: one for each, None for an item without; or None in place of all while nobody has asked for them.
    """

    items: list
    labels: list[int | None] | None


def index_of(shard: str, *, labels: bool) -> Index:
    """The index of a shard: the one beside the file if it belongs to it, else from the file, and kept.

    Args:
      shard: the file.
      labels: whether they are wanted; else they are not read.

    Raises:
      ValueError: if it is not an uncompressed tar file, or a label that is wanted is no integer.
    """
    state, path = os.stat(shard), Path(shard + INDEX)
    stamp = [_FORMAT, state.st_size, state.st_mtime_ns]
    index = kept(path, stamp)
    if index and (index.labels is not None or not labels):
        return index
    items = index.items if index else scan(shard)
    index = Index(items, labels_of(shard, items) if labels else None)
    try:
        write_text(path, json.dumps({"stamp": stamp, **index._asdict()}))
    except OSError as error:
        log.info("the index of %s is kept in memory only: %s", shard, error)
    return index


def kept(path: Path, stamp: list) -> Index | None:
    """The index in a file; None if there is none, or none that is whole and has this stamp."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        index = Index(found["items"], found["labels"])
        fits = found["stamp"] == stamp and (index.labels is None or len(index.labels) == len(index.items))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return index if fits else None


def scan(shard: str) -> list:
    """The items of a tar file, as `index_of`, from its headers."""
    items: dict[str, dict] = {}
    try:
        with tarfile.open(shard, "r:") as file:
            for member in file:
                folder, _, base = member.name.rpartition("/")
                key, dot, extension = base.partition(".")
                if member.isfile() and key and dot:
                    at = items.setdefault(f"{folder}/{key}" if folder else key, {})
                    at[extension.lower()] = [member.offset_data, member.size]
    except tarfile.TarError as error:
        raise ValueError(f"{shard!r} is not an uncompressed tar file ({error}); unpack .tar.gz with gunzip") from None
    return [[key, members] for key, members in items.items() if set(members) & set(IMAGES)]


def labels_of(shard: str, items: list) -> list[int | None]:
    """The label of each item of a shard, None where it has none.

    Raises:
      OSError: if the file ends within one.
      ValueError: for one that is no integer from 0, or a `.json` that is none.
    """
    found = []
    with open(shard, "rb", buffering=0) as file:
        for key, members in items:
            kind = next((e for e in ("cls", "json") if e in members), None)
            text = _pread(file, *reversed(members[kind])) if kind else b""
            try:
                found.append(label_in(text, kind))
            except ValueError as error:
                raise ValueError(f"{shard}:{key}: {error}") from None
    return found


def image_in(members: Mapping) -> str:
    """The extension of an item's image."""
    return next(e for e in IMAGES if e in members)


def label_in(text: bytes, kind: str | None) -> int | None:
    """The label that a `.cls` or `.json` member holds, None for none.

    Raises:
      ValueError: if it is no integer from 0, or the `.json` is none.
    """
    if kind == "json":
        fields = fields_of(text)
        value = fields.get("label", fields.get("cls"))
        label = "" if value is None else str(value)
    else:
        label = text.decode(errors="replace").strip()
    if label and not label.isdecimal():
        raise ValueError(f"label {label[:40]!r}; expected an integer from 0, or give labels=False")
    return int(label) if label else None


def fields_of(text: bytes) -> dict:
    """The fields of a `.json` member, none if it is another value than an object.

    Raises:
      ValueError: if it is not JSON.
    """
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"its .json is none ({error})") from None
    return fields if isinstance(fields, dict) else {}


def _pread(file, size: int, offset: int) -> bytes:
    found = os.pread(file.fileno(), size, offset)
    if len(found) < size:
        raise OSError(f"{file.name} ends within it")
    return found
