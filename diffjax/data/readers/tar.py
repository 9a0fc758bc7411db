"""WebDataset-style shards: uncompressed tar files in which the members of one item share their name up to the first
dot, read at random by offset."""

from __future__ import annotations

import glob
import json
import logging
import os
import tarfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffjax.data.images import Record, image_dataset
from diffjax.data.sources import Dataset
from diffjax.files import write_text

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm")
INDEX = ".index.json"
_FORMAT = 1

log = logging.getLogger("diffjax")


class TarReader:
    """Records of the items in tar files, in the order in which they lie there.

    Attributes:
      shards: the files.
      items: `[(shard, key, {extension: (offset, size)})]`.
      labels: `[N]` integers, or None if no item has one.
      captions: one text per item, or None if not every item has one.
    """

    def __init__(self, shards: Sequence[str], items: list):
        self.shards, self.items = list(shards), items
        self._files, self._lock = {}, threading.Lock()
        self.labels = self._labels()
        told = all({"txt", "json"} & set(members) for _, _, members in items)
        self.captions = TarTexts(self) if told and self._caption(0) is not None else None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Record:
        members = self.items[index][2]
        extension = next(e for e in IMAGES if e in members)
        return Record(self.read(index, extension), 0 if self.labels is None else self.labels[index])

    def __getstate__(self) -> dict:
        # Open files and locks stay behind in the process that made them.
        return self.__dict__ | {"_files": {}, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state | {"_lock": threading.Lock()}

    def read(self, index: int, extension: str) -> bytes:
        """The bytes of one member of an item.

        Raises:
          OSError: if the file ends before it.
        """
        shard, _, members = self.items[index]
        offset, size = members[extension]
        with self._lock:
            if shard not in self._files:
                self._files[shard] = open(self.shards[shard], "rb")
        found = os.pread(self._files[shard].fileno(), size, offset)
        if len(found) < size:
            raise OSError(f"{self.shards[shard]} ends within it")
        return found

    def name(self, index: int) -> str:
        """The shard and the key in it."""
        shard, key, _ = self.items[index]
        return f"{self.shards[shard]}:{key}"

    def _labels(self) -> list[int] | None:
        labelled = [bool({"cls", "json"} & set(members)) for _, _, members in self.items]
        if not labelled or not labelled[0] or self._label(0) is None:
            return None
        found = [self._label(i) if known else None for i, known in enumerate(labelled)]
        missing = next((i for i, label in enumerate(found) if label is None), None)
        if missing is not None:
            raise ValueError(f"{self.name(missing)} has no label and {self.name(0)} has one; expected a .cls for each")
        return found

    def _label(self, index: int) -> int | None:
        if "cls" in self.items[index][2]:
            text = self.read(index, "cls").decode().strip()
        else:
            text = str(self._json(index).get("label", self._json(index).get("cls", "")))
        if text and not text.isdecimal():
            raise ValueError(f"{self.name(index)}: label {text!r}; expected an integer from 0")
        return int(text) if text else None

    def _caption(self, index: int) -> str | None:
        if "txt" in self.items[index][2]:
            return self.read(index, "txt").decode().strip()
        fields = self._json(index)
        return fields.get("text", fields.get("caption"))

    def _json(self, index: int) -> dict:
        fields = json.loads(self.read(index, "json"))
        return fields if isinstance(fields, dict) else {}


class TarTexts(Sequence):
    """The captions of a reader's items, read when they are asked for."""

    def __init__(self, reader: TarReader):
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index):
        return self._reader._caption(index) or ""


def tar(
    path: str | tuple[str, ...], size: int | tuple[int, int] | None = None, *, crop: str = "center", flip: bool = False,
    zoom: float = 1.0, channels: int = 3, buckets: Any = None, heldout: float | int = 0.1, split_seed: int = 0,
    labels: bool = True,
) -> Dataset:  # fmt: skip
    """A `Dataset` of tar shards as WebDataset writes them: `000.jpg`, `000.cls`, `000.txt` or `000.json` for an item.

    Labels come from `.cls` (a decimal number) or `label` in `.json`, captions from `.txt`, or `text` or `caption` in
    `.json`. Where each member lies is found once and kept beside each shard in `SHARD.index.json`, or only in memory
    where that cannot be written.

    Args:
      path: a file, a pattern such as `"shards/train-*.tar"`, or a tuple of them.
      size, crop, flip, zoom, channels, buckets, heldout, split_seed, labels: see `folder`.

    Raises:
      FileNotFoundError: if no file fits the pattern.
      ValueError: for a compressed or damaged tar file, items of which only some have labels, or as `folder`.
    """
    shards = matching(path, "tar(path=...) takes files such as 'train-*.tar'")
    items = []
    for number, shard in enumerate(shards):
        items += [(number, key, {e: tuple(at) for e, at in members.items()}) for key, members in index_of(shard)]
    if not items:
        raise ValueError(f"no image in {', '.join(shards[:3])}; expected members such as 000.jpg and 000.cls")
    reader = TarReader(shards, items)
    known = labels and reader.labels is not None
    return image_dataset(
        reader, size=size, crop=crop, flip=flip, zoom=zoom, channels=channels, buckets=buckets, heldout=heldout,
        split_seed=split_seed, num_classes=max(reader.labels) + 1 if known else 0,
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


def index_of(shard: str) -> list:
    """`[[key, {extension: [offset, size]}], ...]` of the items with an image, from the index beside the file if that
    belongs to it, else from the file.

    Raises:
      ValueError: if it is not an uncompressed tar file.
    """
    state, path = os.stat(shard), Path(shard + INDEX)
    stamp = [_FORMAT, state.st_size, state.st_mtime_ns]
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["stamp"] == stamp:
            return kept["items"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # There is none, or it is not whole: it is made from the file.
    items = scan(shard)
    try:
        write_text(path, json.dumps({"stamp": stamp, "items": items}))
    except OSError as error:
        log.info("the index of %s is kept in memory only: %s", shard, error)
    return items


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
