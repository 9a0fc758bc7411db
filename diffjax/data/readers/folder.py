"""A folder of image files, labelled by their folders or by a table, with captions beside them."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from diffjax.data.images import HEADER, Record, image_dataset
from diffjax.data.sources import Dataset

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
TABLES = ("metadata.jsonl", "metadata.csv")


class FolderReader:
    """Records of the image files in a folder, in the order of their paths.

    Attributes:
      root: the folder.
      files: paths relative to it.
      labels: `[N]` integers, or None.
      classes: the names that the labels stand for, or () where a table gives integers.
      captions: one text per file, or None.
    """

    def __init__(self, root: Path, files: Sequence[str], labels=None, classes: tuple = (), captions=None):
        self.root, self.files, self.labels, self.classes, self.captions = root, files, labels, classes, captions

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        with open(self.root / self.files[index], "rb") as file:
            return Record(file.read(), 0 if self.labels is None else self.labels[index])

    def open(self, index: int) -> BinaryIO:
        """The image file."""
        return open(self.root / self.files[index], "rb", buffering=HEADER)

    def name(self, index: int) -> str:
        """The path of the file."""
        return str(self.root / self.files[index])


class TextFiles(Sequence):
    """The texts in the `.txt` files beside images, read when they are asked for."""

    def __init__(self, root: Path, files: Sequence[str]):
        self._root, self._files = root, files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index):
        return (self._root / self._files[index]).with_suffix(".txt").read_text(encoding="utf-8").strip()


def folder(
    path: str, size: int | tuple[int, int] | None = None, *, crop: str = "center", flip: bool = False,
    zoom: float = 1.0, channels: int = 3, buckets: Any = None, heldout: float | int | str = 0.1, split_seed: int = 0,
    labels: bool = True,
) -> Dataset:  # fmt: skip
    """A `Dataset` of the image files in a folder and the folders in it.

    Labels and captions come from, in this order: `metadata.jsonl` or `metadata.csv` in the folder (`file_name`, and
    `label`, `text` or `caption`; only the files named there are used); the first folder on the way to each file, if
    every file lies in one (classes are numbered by name); `.txt` files beside the images, if every image has one.

    Args:
      path: the folder; `~` is expanded.
      size: side or `(height, width)` to resize and crop to; None takes that of the first image.
      crop: "center", "random", or "none" to stretch the whole image.
      flip: mirror left to right with probability 1/2.
      zoom: with a random crop, how much smaller than the largest window it is; at least 1.
      channels: 3 for RGB, 1 for grey.
      buckets: one image shape per batch, after the images' aspect ratios; see `diffjax.data.images.image_dataset`.
      heldout: how much to hold out, a share in (0, 1) or a number of images; or another folder, with the same classes.
      split_seed: another seed gives another split.
      labels: False leaves all images unlabelled.

    Raises:
      FileNotFoundError: if there is no such folder, or it holds no image.
      ValueError: for settings that are not possible, images of which only some are labelled, a broken table, or a
        held-out folder whose images are among those to train on.
    """
    reader = read_folder(path, labels=labels)
    held = heldout
    if isinstance(heldout, str):
        held = read_folder(heldout, labels=labels, classes=reader.classes)
        refuse_shared(reader, held)
    return image_dataset(
        reader, size=size, crop=crop, flip=flip, zoom=zoom, channels=channels, buckets=buckets, heldout=held,
        split_seed=split_seed, num_classes=0 if reader.labels is None else max(reader.labels) + 1,
    )  # fmt: skip


def read_folder(path: str, *, labels: bool = True, classes: tuple = ()) -> FolderReader:
    """The reader of a folder; see `folder`. `classes` are the names of the classes where they are known already."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {str(root)!r}; folder(path=...) takes one that holds image files")
    tables = [root / name for name in TABLES if (root / name).is_file()]
    if tables:
        files, found, captions = read_table(tables[0])
        reader = FolderReader(root, files, found, (), captions)
        return reader if labels else FolderReader(root, files, None, (), captions)
    files = sorted(_walk(root, ""))
    if not files:
        raise FileNotFoundError(f"no image in {str(root)!r}; expected files such as a.jpg or cats/a.png ({SUFFIXES})")
    found = None
    if labels and any("/" in file for file in files):
        found, classes = class_labels(files, classes, root)
    texts = TextFiles(root, files) if all(_text(root, file) for file in files) else None
    return FolderReader(root, files, found, classes, texts)


def refuse_shared(reader: FolderReader, held: FolderReader) -> None:
    """Compares two folders of images, one to train on and one held out.

    Raises:
      ValueError: if a file is in both, or only one of them is labelled.
    """
    every = lambda r: {os.path.normpath(os.path.join(os.path.realpath(r.root), file)) for file in r.files}
    if shared := sorted(every(reader) & every(held)):
        raise ValueError(
            f"heldout={str(held.root)!r}: {len(shared)} of its images would be trained on, such as {shared[0]!r}; move "
            f"the folder out of {str(reader.root)!r}, or give a share such as heldout=0.1"
        )
    if (reader.labels is None) != (held.labels is None):
        raise ValueError(
            f"only one of {str(reader.root)!r} and heldout={str(held.root)!r} has labels; give both, or labels=False"
        )


def class_labels(files: Sequence[str], classes: tuple, root: Path) -> tuple[list[int], tuple[str, ...]]:
    """`(label of each file, names)` after the first folder of each path.

    Raises:
      ValueError: if a file lies in no folder, or in one that is not among `classes`.
    """
    loose = next((file for file in files if "/" not in file), None)
    if loose is not None:
        raise ValueError(
            f"{str(root / loose)!r} lies in no class folder and others in {str(root)!r} do; move it into one, or give "
            "labels=False to use all images without labels"
        )
    names = [file.split("/", 1)[0] for file in files]
    known = classes or tuple(sorted(set(names)))
    number = {name: i for i, name in enumerate(known)}
    strange = next((name for name in names if name not in number), None)
    if strange is not None:
        raise ValueError(f"class folder {str(root / strange)!r} is not among those to train on: {', '.join(known)}")
    return [number[name] for name in names], known


def read_table(path: Path) -> tuple[list[str], list[int] | None, list[str] | None]:
    """`(file names, labels or None, captions or None)` of a `metadata.jsonl` or `metadata.csv`.

    Raises:
      ValueError: for a row without `file_name` or with that of another, a label that is no integer from 0, or columns
        that only some rows have.
    """
    # Spreadsheets put a byte order mark in front.
    with open(path, encoding="utf-8-sig", newline="") as stream:
        try:
            lines = (line for line in stream if line.strip())
            rows = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else list(csv.DictReader(stream))
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{str(path)!r}: {error}") from None
    named = lambda row: isinstance(row, dict) and isinstance(row.get("file_name"), str) and row["file_name"]
    wrong = next((i for i, row in enumerate(rows) if not named(row)), None)
    if not rows or wrong is not None:
        raise ValueError(f"{str(path)!r}: row {(wrong or 0) + 1} has no file_name; expected file_name, label, text")
    names = [row["file_name"] for row in rows]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(
            f"{str(path)!r}: {twice!r} comes more than once, so could be trained on and held out; give a file one row"
        )
    columns = {}
    for name in ("label", "text", "caption"):
        values = [row.get(name) for row in rows]
        missing = next((i for i, value in enumerate(values) if value is None or value == ""), None)
        if missing is not None and any(value not in (None, "") for value in values):
            raise ValueError(f"{str(path)!r}: row {missing + 1} has no {name!r} and others have one")
        columns[name] = values if missing is None else None
    labels = columns["label"]
    if labels is not None:
        wrong = next((v for v in labels if isinstance(v, float | bool) or not str(v).isdecimal()), None)
        if wrong is not None:
            raise ValueError(f"{str(path)!r}: label {wrong!r}; expected integers from 0")
        labels = [int(v) for v in labels]
    texts = columns["text"] or columns["caption"]
    return names, labels, None if texts is None else [str(text) for text in texts]


def _walk(root: Path, below: str):
    """Relative paths of the image files, with `/` between the parts; hidden files and folders are left out."""
    with os.scandir(root / below) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(root, below + entry.name + "/")
            elif entry.name.lower().endswith(SUFFIXES):
                yield below + entry.name


def _text(root: Path, file: str) -> bool:
    return (root / file).with_suffix(".txt").is_file()
