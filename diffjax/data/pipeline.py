"""From a source to an endless, shuffled, resumable iterator of batches, on Grain."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffjax import registry
from diffjax.data import augment as augmentations
from diffjax.data.augment import Rowwise
from diffjax.data.errors import Unreadable, UnreadableError, WorkerError
from diffjax.data.order import make_order, substitutes

AUGMENTS = {"affine": augmentations.affine, "flip": augmentations.flip, "shift": augmentations.shift}

log = logging.getLogger("diffjax")
# How long a worker goes on after SIGTERM; a program that ends without closing its iterator waits for that.
_GRACE_S = 10.0


def batches(
    source: Any,
    batch_size: int,
    *,
    seed: int,
    augment: str | Callable | tuple | None = None,
    threads: int = 0,
    workers: int = 0,
    prefetch: int = 2,
    max_bad: int = 16,
    process_index: int = 0,
    process_count: int = 1,
    same_items: bool = True,
) -> BatchIterator:
    """An endless iterator of shuffled batches; batch `i` is a function of the first arguments, to `augment`, and `i`.

    Each epoch visits every item once, in an order of its own; a batch may span two epochs, so none is short and no
    item is dropped. `get_state()` and `set_state(state)` stop and go on mid-epoch with the very same batches, also with
    other `threads`, `workers`, `prefetch` and `process_count`: none of them changes a bit of a batch.

    Grain's own shuffle and batch cost Python time per item; here an element of the Grain data set is a whole batch.

    Args:
      source: has `__len__` and `__getitem__(i) -> dict of arrays`, and optionally `take(indices) -> dict of stacked
        arrays`, which is then used for speed; or `draw(i, key)`, the item as training sees it, where `key` is a tuple
        of integers that is another for each place in the stream (random crops and flips come from it).
      batch_size: items per batch over all processes, at most `len(source)`.
      seed: of the order and the augmentation, in `0 .. 2**32 - 1`.
      augment: a spec such as `"shift(pixels=1)"`, a function `(batch, rng) -> batch`, or a tuple of them, applied in
        order; None or an empty one leaves batches as they are. With several processes, functions that are not
        `diffjax.data.augment.Rowwise` make every process read the whole batch.
      threads: 0 reads each batch when it is asked for; more read that many batches at once, ahead of time.
      workers: processes that read batches ahead, for decoding that keeps more than one core busy; each holds a copy
        of the source. A program that is no module needs `if __name__ == "__main__":`.
      prefetch: batches that each worker keeps ready, or the threads together (at least one each).
      max_bad: how many items that cannot be read (`diffjax.data.errors.Unreadable`) are replaced by the ones after
        them in the source before this is an error.
      process_index: which part of each batch: rows `p * B / P .. (p + 1) * B / P` for process p of P.
      process_count: P.
      same_items: whether `set_state` refuses the state of a source with another number of items.

    Returns:
      An iterator of dicts of numpy arrays, `{"image": [B / P, H, W, C] float32, "label": [B / P] int32}` for the
      sources here.

    Raises:
      ValueError: for a batch larger than the data or smaller than 1, a seed out of range, an unknown augmentation, a
        batch that does not divide over the processes, or a negative number of workers, threads or bad items.
    """
    import grain

    rows = _rows(batch_size, len(source), process_index, process_count)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: expected an integer in 0 .. {2**32 - 1}")
    for name, value, least in (("threads", threads, 0), ("workers", workers, 0), ("prefetch", prefetch, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: expected at least {least}")
    if max_bad < 0:
        raise ValueError(f"max_bad={max_bad}: expected at least 0")
    fns = _augments(augment)
    sliced = process_count > 1 and all(isinstance(fn, Rowwise) for fn in fns)
    items = Batches(source, batch_size, seed, rows=rows if sliced else None, max_bad=max_bad)
    dataset = grain.MapDataset.source(items).seed(seed)
    for fn in fns:
        dataset = dataset.random_map(_on_batch(fn, rows if sliced else None, batch_size))
    if process_count > 1 and not sliced:
        dataset = dataset.map(lambda element: ({k: v[rows] for k, v in element[0].items()}, element[1]))
    reading = Reading(threads, workers, prefetch)
    return BatchIterator(dataset, items.order, reading, max_bad, items=len(source), same_items=same_items)


class Reading(NamedTuple):
    """How batches are read ahead: `threads`, `workers`, `prefetch` of `batches`."""

    threads: int
    workers: int
    prefetch: int

    def open(self, dataset: Any) -> Any:
        """A Grain iterator over a `grain.MapDataset`; worker processes start with the first `next`."""
        import grain

        buffer = max(self.threads, self.prefetch) if self.threads else 0
        dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=buffer))
        if self.workers:
            from absl import flags

            # Grain reads absl flags in order to hand them to its workers; programs without absl never parse any.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=self.prefetch)
            dataset = dataset.mp_prefetch(options, worker_init_fn=_serve)
        return iter(dataset)


def _serve(index: int, count: int) -> None:
    """Sets up a worker process: it outlives a signal that a launcher sends to it and the process that it reads for, so
    that the step at hand has its batch and the run can be saved; and it ends with that process, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    late = lambda *_: threading.Timer(_GRACE_S, os._exit, (128 + signal.SIGTERM,)).start()
    signal.signal(signal.SIGTERM, late)
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    multiprocessing.parent_process().join()
    os._exit(128 + signal.SIGTERM)


class BatchIterator:
    """Batches in order, from any batch on; its state is the number of the next batch.

    Attributes:
      bad: `{position in the source: "name: reason"}` of the items that could not be read so far, by this process.
      items: how many the source has.
      items_before: how many it had when the state was saved that `set_state` got last.
    """

    def __init__(
        self, dataset: Any, order: Any, reading: Reading, max_bad: int, *, items: int, same_items: bool = True
    ):
        self._dataset, self._order, self._reading, self._max_bad = dataset, order, reading, max_bad
        self.items = self.items_before = items
        self._same_items = same_items
        self._next, self._iterator = 0, None
        self.bad: dict[int, str] = {}

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            # A slice of the batches themselves, because Grain's own states belong to one number of workers.
            self._iterator = self._reading.open(self._dataset[self._next :])
        try:
            batch, bad = next(self._iterator)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise WorkerError(_death(error, self._reading.workers)) from error
        if bad:
            self._count(json.loads(bad))
        self._next += 1
        return batch

    def get_state(self) -> dict:
        """`{"next_index": number of the next batch, "items": of the source}`, and `bad` if there were any; JSON."""
        bad = {"bad": [[i, text] for i, text in sorted(self.bad.items())]} if self.bad else {}
        return {"next_index": self._next, "items": self.items} | bad

    def set_state(self, state: Mapping) -> None:
        """Goes on with batch `state["next_index"]`, which may lie before or after the present one.

        Raises:
          ValueError: if `state` is no such mapping, or one of a source with another number of items.
        """
        index = state.get("next_index") if isinstance(state, Mapping) else None
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"state {state!r}: expected {{'next_index': n}} with an integer n >= 0")
        had = state.get("items", self.items)
        if self._same_items and had != self.items:
            raise ValueError(
                f"there are {self.items} images to train on, and there were {had} when this run was saved: what is "
                "trained on and what is held out changes with the number, so give the data as it was, go on with "
                "--allow_changes, or start a run in another workdir (config.init_from takes the parameters along)"
            )
        self.close()
        self.items_before, self._next, self.bad = had, index, {int(i): text for i, text in state.get("bad", ())}

    def batch_ids(self, index: int) -> np.ndarray:
        """`[batch_size]` positions in the source of the items of batch `index`, of all processes, in row order.

        An item that cannot be read is replaced by one after it; its own position stands here.
        """
        return self._order.indices(index)

    def close(self) -> None:
        """Stops threads and workers; the next `next` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _count(self, found: list) -> None:
        for position, name, reason in found:
            if position in self.bad:
                continue
            self.bad[position] = f"{name}: {reason}"
            told = "cannot read %s: %s; another item takes its place (%d of at most %d)"
            log.warning(told, name, reason, len(self.bad), self._max_bad)
        if len(self.bad) > self._max_bad:
            raise UnreadableError(_too_many(list(self.bad.values()), self._max_bad))


class Batches:
    """Random access to the batches of all epochs, as `(batch, unreadable)`.

    `unreadable` is "" or the JSON text of `[[position, name, reason], ...]`: text, because it must come out of worker
    processes.

    Attributes:
      source: see `batches`.
      order: which positions each batch holds.
      rows: the slice of each batch that is read, or None for all of it.
    """

    def __init__(
        self, source: Any, batch_size: int, seed: int, *, rows: slice | None = None, max_bad: int = 0, order: Any = None
    ):
        self.source, self.rows, self.order = source, rows, order or make_order(source, batch_size, seed)
        self._batch_size, self._seed, self._max_bad = batch_size, seed, max_bad

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def __getitem__(self, index) -> tuple[dict[str, np.ndarray], str]:
        index, rows = int(index), self.rows or slice(0, self._batch_size)
        positions = self.order.indices(index)[rows]
        if hasattr(self.source, "take"):
            return self.source.take(positions), ""
        bad, start = {}, index * self._batch_size + rows.start
        items = [self._item(int(i), (self._seed, start + r), bad) for r, i in enumerate(positions)]
        batch = {name: np.stack([item[name] for item in items]) for name in items[0]}
        return batch, json.dumps([[i, *why] for i, why in bad.items()]) if bad else ""

    def _item(self, position: int, key: tuple[int, int], bad: dict) -> dict[str, np.ndarray]:
        """The item at `position`, or the first after it that can be read; those that cannot are added to `bad`."""
        try:
            return self._read(position, key)
        except Unreadable as error:
            bad[position] = error.args
        failed = 1
        for other in substitutes(self.source, position):
            if failed > self._max_bad:
                break
            try:
                return self._read(other, key)
            except Unreadable as error:
                bad[other] = error.args
                failed += 1
        raise UnreadableError(_too_many([": ".join(args) for args in bad.values()], self._max_bad))

    def _read(self, position: int, key: tuple[int, int]) -> dict[str, np.ndarray]:
        draw = getattr(self.source, "draw", None)
        return draw(position, key) if draw else self.source[position]


def _rows(batch_size: int, length: int, index: int, count: int) -> slice:
    if not 1 <= batch_size <= length:
        raise ValueError(f"batch_size={batch_size} with {length} items; expected 1 .. {length}")
    if not 0 <= index < count:
        raise ValueError(f"process_index={index} with process_count={count}; expected 0 .. {count - 1}")
    if batch_size % count:
        raise ValueError(f"batch_size={batch_size} does not divide over {count} processes; use a multiple of {count}")
    size = batch_size // count
    return slice(index * size, (index + 1) * size)


def _on_batch(fn: Callable, rows: slice | None, total: int) -> Callable:
    """`fn` on elements `(batch, unreadable)`, for all rows of a batch or for some."""

    def apply(element, rng):
        batch, bad = element
        return (fn(batch, rng) if rows is None else fn.part(batch, rng, rows, total)), bad

    return apply


def _too_many(found: list[str], most: int) -> str:
    shown = "; ".join(found[:8]) + (f"; and {len(found) - 8} more" if len(found) > 8 else "")
    return (
        f"{len(found)} item{'s' if len(found) > 1 else ''} of the data cannot be read, and the limit is {most}: "
        f"{shown}; mend or remove them, or raise config.input.max_bad"
    )


def _death(error: Exception, workers: int) -> str:
    code = str(error).split("exit code")[-1].strip().split(".")[0]
    reasons = {"-9": " (killed, as the system does when memory runs out)", "-7": " (no room left in /dev/shm)"}
    return (
        f"one of the {workers} input workers ended with exit code {code}{reasons.get(code, '')}; its own message, if "
        "it had any, is above; lower config.input.workers or config.input.prefetch, or set workers=0 to see the error "
        "here"
    )


def _augments(augment) -> list[Callable]:
    if not augment:
        return []
    specs = augment if isinstance(augment, list | tuple) else (augment,)
    return [spec if callable(spec) else registry.build(spec, AUGMENTS, "augmentation") for spec in specs if spec]
