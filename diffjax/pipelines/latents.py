"""Latents of a data set, computed once by an encoder and written in shards: resumable, and split over processes.

The format is that of `diffjax.data.latents`. A shard counts as finished when the JSON beside it is there and its
checksum fits; both are put in place by renaming, so a killed process leaves whole shards and nothing else.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from diffjax import files, registry
from diffjax.data import SOURCES, Unreadable, UnreadableError
from diffjax.data.latents import FORMAT, INDEX, callable_of

SETTINGS = "settings.json"
EVERY = 10.0  # seconds between lines of progress


class Shard(NamedTuple):
    """One file to write: items `start .. stop - 1` of `split`, and the name without its suffix."""

    split: str
    start: int
    stop: int
    name: str


class Work(NamedTuple):
    """How to turn items into latents, and where to."""

    dataset: Any
    encode: Callable
    out: Path
    batch_size: int
    max_bad: int
    pool: ThreadPoolExecutor
    advance: Callable[[int], None]


def write_latents(
    data: str, encode: str, out: str, *, shards: int = 16, batch_size: int = 64, threads: int = 4, max_bad: int = 0,
    process_index: int = 0, process_count: int = 1, stream: TextIO | None = None,
) -> int:  # fmt: skip
    """Writes the latents of both halves of a data set and returns how many items this call encoded.

    Finished shards are kept, so the same call goes on with an interrupted one and ends with the same bytes. The index
    is written by the process that finds all shards finished.

    Args:
      data: as `config.data`; items are read as evaluation sees them, centred and not mirrored.
      encode: `"package.module:fn"`, the function `images [B, H, W, C] float32 in [-1, 1] -> latents [B, h, w, c]`, or
        `"package.module:make(arg=1)"`, which returns it. It gets full batches: the last one of a shard is padded.
      out: the folder, made if absent.
      shards: files for the training half; the held-out half gets as many as fit its size, at least one.
      batch_size: images in one call of `encode`.
      threads: that read and decode images.
      max_bad: how many images of one shard may be left out because they cannot be read; their names are in the index.
      process_index, process_count: process p of P writes the shards whose number is p modulo P.
      stream: where progress is written.

    Raises:
      ValueError: for a data set or an encoder that cannot be built, another number of shards, data (also other files in
        it, which would fall into other halves) or encoder than those that `out` was begun with, or latents that are not
        finite or not one per image.
      UnreadableError: for more unreadable images than allowed.
    """
    dataset = registry.build(data, SOURCES, "data")
    fn, root = callable_of(encode, "encoder"), Path(out).expanduser()
    if batch_size < 1 or threads < 1 or max_bad < 0 or not 0 <= process_index < process_count:
        given = (
            f"batch_size={batch_size}, threads={threads}, max_bad={max_bad}, process {process_index}/{process_count}"
        )
        raise ValueError(f"{given}: expected batch_size and threads at least 1, and process 0 .. count - 1")
    plan = shards_of(dataset, shards)
    root.mkdir(parents=True, exist_ok=True)
    halves = {split: contents(getattr(dataset, split)) for split in ("train", "heldout")}
    settle(root, {"data": data, "encode": encode, "shards": shards, "batch_size": batch_size} | halves)
    mine = [shard for i, shard in enumerate(plan) if i % process_count == process_index]
    left = [shard for shard in mine if facts_of(root, shard) is None]
    total, kept = sum(s.stop - s.start for s in left), len(mine) - len(left)
    progress = Progress(stream, total, f"{kept} of {len(mine)} shards are there already; " if kept else "")
    with ThreadPoolExecutor(threads) as pool:
        work = Work(dataset, fn, root, batch_size, max_bad, pool, progress.advance)
        for shard in left:
            write_shard(work, shard)
    facts = [read_facts(root, shard) for shard in plan]
    if None not in facts:
        # Every byte of the other shards is read for this, so only where the index may follow.
        facts = [fact if shard in left else facts_of(root, shard) for shard, fact in zip(plan, facts, strict=True)]
    waiting = facts.count(None)
    if not waiting:
        write_json(root / INDEX, index(dataset, plan, facts))
    progress.end(f"{root}: " + (f"{waiting} shards of other processes are still to come" if waiting else "complete"))
    return total


def shards_of(dataset: Any, shards: int) -> list[Shard]:
    """Every shard of both halves, in the order of their numbers.

    Raises:
      ValueError: if there are more shards than training items, or none.
    """
    count = len(dataset.train)
    if not 1 <= shards <= count:
        raise ValueError(f"shards={shards}: expected 1 .. {count}, the number of training items")
    found = []
    for split, size in (("train", count), ("heldout", len(dataset.heldout))):
        n = shards if split == "train" else max(1, shards * size // count)
        ends = [size * k // n for k in range(n + 1)]
        found += [Shard(split, ends[k], ends[k + 1], f"{split}-{k:05}-of-{n:05}") for k in range(n)]
    return found


def contents(source: Any) -> str:
    """How many items a source has and, where they have names, the CRC-32 of these in their order."""
    if not hasattr(source, "name"):
        return f"{len(source)} items"
    value = 0
    for i in range(len(source)):
        value = zlib.crc32(os.fsencode(source.name(i)), value)
    return f"{len(source)} items, {value:08x}"


def settle(root: Path, settings: dict) -> None:
    """Writes what the latents are of, or compares it with what is there.

    Raises:
      ValueError: if it differs.
    """
    file = root / SETTINGS
    if not file.exists():
        write_json(file, settings)
        return
    stored = json.loads(file.read_text(encoding="utf-8"))
    changed = [f"{k}: {stored.get(k)!r} -> {v!r}" for k, v in settings.items() if stored.get(k) != v]
    if changed:
        raise ValueError(
            f"{str(root)!r} was begun with other settings (stored -> given): {'; '.join(changed)}; give the stored "
            "ones to go on, or another folder"
        )


def write_shard(work: Work, shard: Shard) -> None:
    """Encodes one shard and puts it in place, its facts last."""
    kept, skipped, parts = [], [], []
    for indices, items in read(work, shard, skipped):
        parts.append(encode_rows(work, items))
        kept += indices
        work.advance(len(items))
    if not parts:
        raise UnreadableError(f"no image of {shard.name} can be read: {'; '.join(skipped[:8])}")
    total, squares = moments(parts)
    rows = np.concatenate(parts)
    file = work.out / f"{shard.name}.npy"
    with files.replacing(file, "wb", tag="shard") as stream:
        np.save(stream, rows, allow_pickle=False)
    facts = {"file": file.name, "count": len(rows), "bytes": os.path.getsize(file), "crc32": crc32(file)}
    facts |= {"shape": list(rows["latent"].shape[1:]), "sum": total, "squares": squares, "skipped": skipped}
    texts = getattr(getattr(work.dataset, shard.split), "captions", None)
    if texts is not None:
        facts["captions"] = [texts[i] for i in kept]
    write_json(file.with_suffix(".json"), facts)


def moments(parts: list[np.ndarray]) -> tuple[list[float], list[float]]:
    """`(sums, sums of squares)` of each channel of some rows, in float64, which is held for a batch at a time."""
    total, squares = 0.0, 0.0
    for part in parts:
        exact = part["latent"].astype(np.float64)
        total, squares = total + exact.sum((0, 1, 2)), squares + (exact**2).sum((0, 1, 2))
    return total.tolist(), squares.tolist()


def encode_rows(work: Work, items: list[dict]) -> np.ndarray:
    """`[n]` rows with the fields `latent` and `label` of up to `batch_size` items.

    Raises:
      ValueError: if the encoder gives anything but one finite latent for each image.
    """
    images = np.stack([item["image"] for item in items])
    short = work.batch_size - len(images)
    padded = np.concatenate([images, np.repeat(images[-1:], short, 0)]) if short else images
    latent = np.asarray(work.encode(padded), np.float32)
    if latent.ndim != 4 or len(latent) != len(padded):
        raise ValueError(f"the encoder gives shape {latent.shape} for images {padded.shape}; expected [B, h, w, c]")
    if not np.isfinite(latent).all():
        raise ValueError("the encoder gives values that are not finite; look at its parameters and at the images")
    rows = np.empty(len(images), [("latent", "<f4", latent.shape[1:]), ("label", "<i4")])
    rows["latent"], rows["label"] = latent[: len(images)], [item["label"] for item in items]
    return rows


def read(work: Work, shard: Shard, skipped: list[str]) -> Iterator[tuple[list[int], list[dict]]]:
    """The positions and items of a shard in lists of up to `batch_size`, the next ones read while these are used.

    Raises:
      UnreadableError: if more than `max_bad` cannot be read; those that can be left out go to `skipped`.
    """
    source = getattr(work.dataset, shard.split)

    def one(index):
        try:
            return source[index]
        except Unreadable as error:
            return f"{error.name}: {error.reason}"

    ranges = [range(i, min(i + work.batch_size, shard.stop)) for i in range(shard.start, shard.stop, work.batch_size)]
    ahead = work.pool.map(one, ranges[0])
    for indices, following in zip(ranges, [*ranges[1:], range(0)], strict=True):
        found, ahead = list(ahead), work.pool.map(one, following)
        skipped += [item for item in found if isinstance(item, str)]
        if len(skipped) > work.max_bad:
            raise UnreadableError(
                f"{len(skipped)} images of {shard.name} cannot be read, and the limit is {work.max_bad}: "
                f"{'; '.join(skipped[:8])}; mend them, or raise --max_bad to leave them out"
            )
        read = [(i, item) for i, item in zip(indices, found, strict=True) if not isinstance(item, str)]
        if read:
            yield [i for i, _ in read], [item for _, item in read]


def facts_of(root: Path, shard: Shard) -> dict | None:
    """The facts of a finished shard, its bytes checked; None if it is still to be written."""
    facts, file = read_facts(root, shard), root / f"{shard.name}.npy"
    if facts is None or not file.is_file() or file.stat().st_size != facts["bytes"] or crc32(file) != facts["crc32"]:
        return None
    return facts


def read_facts(root: Path, shard: Shard) -> dict | None:
    """The JSON beside a shard, or None."""
    try:
        return json.loads((root / f"{shard.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def index(dataset: Any, plan: list[Shard], facts: list[dict]) -> dict:
    """What `diffjax.data.latents` reads: the shards of each split, and mean and deviation of each channel of the
    training half."""
    shapes = {tuple(fact["shape"]) for fact in facts}
    if len(shapes) > 1:
        raise ValueError(f"the encoder gave latents of several shapes: {sorted(shapes)}; expected one")
    (shape,) = shapes
    train = [fact for shard, fact in zip(plan, facts, strict=True) if shard.split == "train"]
    n = sum(fact["count"] for fact in train) * shape[0] * shape[1]
    mean = np.sum([fact["sum"] for fact in train], 0) / n
    variance = np.maximum(np.sum([fact["squares"] for fact in train], 0) / n - mean**2, 0)
    drop = ("sum", "squares", "shape")
    splits = {"train": [], "heldout": []}
    for shard, fact in zip(plan, facts, strict=True):
        splits[shard.split].append({k: v for k, v in fact.items() if k not in drop})
    return {
        "format": FORMAT, "shape": list(shape), "num_classes": dataset.num_classes, "mean": mean.tolist(),
        "std": np.sqrt(variance).tolist(), "splits": splits,
    }  # fmt: skip


def crc32(path: str | Path) -> str:
    """CRC-32 of a file, as 8 hexadecimal digits."""
    value = 0
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def write_json(path: Path, content: Any) -> None:
    """Writes JSON in one move, so that a reader never sees half of it."""
    files.write_text(path, json.dumps(content, indent=1) + "\n")


class Progress:
    """Lines such as `latents: 1200 of 50000, 350.1/s, 2 min left`, every ten seconds and at the end."""

    def __init__(self, stream: TextIO | None, total: int, note: str):
        self._stream, self._total, self._done = stream, total, 0
        self._begun = self._shown = time.monotonic()
        self._write(f"latents: {note}{total} images to encode")

    def advance(self, count: int) -> None:
        """`count` more images are done."""
        self._done += count
        now = time.monotonic()
        if now - self._shown >= EVERY:
            self._shown, rate = now, self._done / (now - self._begun)
            minutes = (self._total - self._done) / rate / 60
            self._write(f"latents: {self._done} of {self._total}, {rate:.1f}/s, {minutes:.1f} min left")

    def end(self, note: str) -> None:
        """The last line."""
        seconds = max(time.monotonic() - self._begun, 1e-9)
        self._write(f"latents: {self._done} images in {seconds:.1f} s, {self._done / seconds:.1f}/s; {note}")

    def _write(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(text + "\n")
            self._stream.flush()
