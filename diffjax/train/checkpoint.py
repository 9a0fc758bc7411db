"""Checkpoints that a crash cannot lose: written in the background, verified leaf by leaf when they are read.

One checkpoint is one folder `<directory>/<step>/`, complete or absent: it is written under another name and renamed at
the end. Orbax keeps the arrays, one entry per leaf name; a JSON file beside them keeps everything else, among it a
checksum of every leaf, which Orbax does not verify.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import math
import platform
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import checkpoint_managers as policies

from diffjax.train import paths

log = logging.getLogger(__name__)

FORMAT = 1
STATE, META = "state", "meta"
DAMAGED = "damaged"
_PACKAGES = ("diffjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or one that exists and cannot be read; the message says what to do."""


class _Damaged(Exception):
    """One checkpoint fails its own checks; the one before it may do."""


def open_checkpoints(
    directory: str | Path, *, keep: int = 2, best_metric: str | None = None, best_mode: str = "min"
) -> Checkpoints:
    """The checkpoints of a run; makes and removes nothing before the first `save`, so a reader never disturbs a writer.

    Args:
      directory: where the folders of the steps are; need not exist.
      keep: how many of the latest to keep; at least 2, so that there is one to fall back to.
      best_metric: name of the metric, of those given to `save`, whose best checkpoint is kept as well.
      best_mode: `"min"` or `"max"`: which values of it are better.

    Raises:
      ValueError: for `keep < 2` or another mode.
    """
    if keep < 2:
        raise ValueError(f"keep {keep!r}: expected at least 2 checkpoints, so that a damaged one has a predecessor")
    if best_mode not in ("min", "max"):
        raise ValueError(f"best_mode {best_mode!r}: expected 'min' or 'max'")
    return Checkpoints(Path(directory).absolute(), keep, best_metric, best_mode)


class Checkpoints:
    """What `open_checkpoints` returns. One writer at a time; any number of readers."""

    def __init__(self, directory: Path, keep: int, best_metric: str | None, best_mode: str):
        self.directory = directory
        self._keep, self._best_metric, self._best_sign = keep, best_metric, 1 if best_mode == "min" else -1
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None
        self._scores: dict[int, float] = {}
        self._damaged: set[int] = set()

    def save(
        self,
        step: int,
        state: Any,
        iterator: Any = None,
        config: Mapping | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Copies everything to the host and writes it in the background; False if this step is saved already.

        The caller may donate or change `state` as soon as this returns. Waits for the save before it.

        Args:
          step: number of optimiser steps done; greater than every saved one.
          state: a pytree of arrays.
          iterator: its `get_state()` must be JSON (dicts with string keys, lists, strings, numbers, None).
          config: JSON as well; a `ConfigDict` will do.
          metrics: numbers by name.

        Raises:
          CheckpointError: if this or the previous save cannot be written (disk full, folder read-only), naming the last
            good checkpoint; or if there are later checkpoints than this step.
          ValueError: if a leaf is not a plain array, or something that should be JSON is not.
        """
        self.wait()
        later = [s for s in self.steps() if s >= step]
        if step in later:
            return False
        if later:
            raise CheckpointError(
                f"cannot save step {step} in {self.directory}: later steps {later} are there; move them elsewhere first"
            )
        host = {name: _host(name, leaf) for name, leaf in paths.named_leaves(state).items()}
        meta = {
            "format": FORMAT,
            "step": int(step),
            "versions": versions(),
            "config": _json("config", config.to_dict() if hasattr(config, "to_dict") else config),
            "iterator": _json("the iterator's get_state()", None if iterator is None else iterator.get_state()),
            "metrics": {key: float(value) for key, value in (metrics or {}).items()},
            "leaves": {name: _entry(array) for name, array in host.items()},
        }
        sealed = {"digest": _digest(meta), "content": meta}
        args = ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(host), META: ocp.args.JsonSave(sealed)})
        with self._writing(step):
            if self._manager is None:
                self._manager = self._open_manager()
            self._scores[step] = self._score(meta)
            self._manager.save(step, args=args, force=True)
            self._saving = step
        return True

    def restore(self, state_like: Any, iterator: Any = None, step: int | None = None) -> tuple[int, Any] | None:
        """`(step, state)` of the latest checkpoint that passes its checks, or None if the folder holds none.

        A damaged checkpoint (a file changed, cut, zeroed or missing) is reported by a logged warning that names it and
        the leaf, and the one before it is tried. The next `save` moves it to the subfolder `damaged`.

        Args:
          state_like: pytree of arrays or `jax.ShapeDtypeStruct`. Names, shapes and dtypes must be those of the
            checkpoint; nothing is cast. Leaves with a sharding are placed there, numpy arrays stay on the host, others
            go to the default device; saved on one mesh, restored on another is fine.
          iterator: gets the saved state by `set_state`, after everything else has succeeded.
          step: this one only; a damaged one then raises.

        Raises:
          CheckpointError: if there are checkpoints and none is readable, if `step` is not there, or if the format is of
            a later version.
          ValueError: if the checkpoint is sound and does not fit `state_like`; lists what is missing, unexpected,
            misshapen or of another dtype.
        """
        like = paths.named_leaves(state_like)

        def read(folder, meta):
            _check_fit(f"checkpoint {folder}", meta["leaves"], like)
            return _read_leaves(folder, {name: meta["leaves"][name] for name in like})

        found = self._first_sound(read, step)
        if found is None:
            return None
        at, meta, host = found
        if iterator is not None and meta["iterator"] is None:
            raise ValueError(f"checkpoint {self.directory / str(at)} was saved without the state of a data iterator")
        state = jax.tree_util.tree_map_with_path(lambda path, leaf: _place(host[paths.name(path)], leaf), state_like)
        if iterator is not None:
            iterator.set_state(meta["iterator"])
        return at, state

    def restore_part(self, prefix: str, step: int | None = None) -> tuple[int, dict] | None:
        """`(step, tree)` with the leaves whose names start with `prefix/` alone, read and verified, for inference.

        Args:
          prefix: `"params"`, or `"ema/decay(0.999)"`.
          step: as `restore`.

        Returns:
          The tree as nested dicts of jax arrays on the default device, keys as strings; None if there is no checkpoint.

        Raises:
          CheckpointError: as `restore`.
          ValueError: if no leaf has that prefix; lists the first parts of the names.
        """

        def read(folder, meta):
            table = {n: entry for n, entry in meta["leaves"].items() if n.startswith(prefix + "/")}
            if not table:
                known = sorted({n.rpartition("/")[0] for n in meta["leaves"]})
                raise ValueError(f"checkpoint {folder} has nothing under {prefix!r}; it has: {', '.join(known)}")
            return _read_leaves(folder, table)

        found = self._first_sound(read, step)
        if found is None:
            return None
        tree: dict = {}
        for name, array in found[2].items():
            *parents, last = name.removeprefix(prefix + "/").split("/")
            node = tree
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = _place(array)
        return found[0], tree

    def steps(self) -> list[int]:
        """The complete checkpoints in the folder, in increasing order, without those that were found damaged."""
        if not self.directory.is_dir():
            return []
        found = (int(p.name) for p in self.directory.iterdir() if p.name.isdecimal() and p.is_dir())
        return sorted(set(found) - self._damaged)

    def info(self, step: int) -> dict:
        """The JSON part: `step`, `config`, `metrics`, `iterator`, `versions`, `leaves` (shapes, dtypes, checksums).

        Raises:
          CheckpointError: if there is no such step, or it is damaged.
        """
        if step not in self.steps():
            raise CheckpointError(self._absent(step))
        try:
            return _read_meta(self.directory / str(step))
        except _Damaged as error:
            raise CheckpointError(f"checkpoint {self.directory / str(step)} is damaged: {error}") from error

    def best_step(self) -> int | None:
        """The step with the best `best_metric`, the latest of equals; None if no checkpoint has a finite one."""
        scores = {step: self._stored_score(step) for step in self.steps()}
        scores = {step: score for step, score in scores.items() if score < math.inf}
        return min(scores, key=lambda step: (scores[step], -step)) if scores else None

    def wait(self) -> None:
        """Returns when the save in progress, if any, is on disk.

        Raises:
          CheckpointError: if it failed, naming the last good checkpoint.
        """
        if self._saving is not None:
            with self._writing(self._saving):
                self._manager.wait_until_finished()
            self._saving = None

    def close(self) -> None:
        """Waits, then frees the threads; the object can still be read from and saved to.

        Raises:
          CheckpointError: as `wait`.
        """
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _open_manager(self) -> ocp.CheckpointManager:
        for step in sorted(self._damaged):
            _set_aside(self.directory, step)
        self._damaged.clear()
        self._scores = {step: self._stored_score(step) for step in self.steps()}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep), _Best(self._scores)]),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        return ocp.CheckpointManager(self.directory, options=options)

    @contextlib.contextmanager
    def _writing(self, step: int):
        """Turns whatever goes wrong in a write into one error that says what is left."""
        try:
            yield
        except Exception as error:
            self._saving, broken, self._manager = None, self._manager, None
            if broken is not None:
                # Its threads hold the error that is being reported here, and closing raises it once more.
                with contextlib.suppress(Exception):
                    broken.close()
            left = self.steps()
            good = f"the last good checkpoint is step {left[-1]}" if left else "there is no earlier checkpoint"
            raise CheckpointError(
                f"cannot write checkpoint {step} in {self.directory}: {type(error).__name__}: {error}; {good}; "
                "free space or make the folder writable, then run the same command again"
            ) from error

    def _first_sound(self, read: Callable[[Path, dict], Any], step: int | None) -> tuple[int, dict, Any] | None:
        """`(step, meta, read(folder, meta))` of the latest checkpoint, or of `step`, that is not damaged."""
        self.wait()
        steps = self.steps()
        if step is not None and step not in steps:
            raise CheckpointError(self._absent(step))
        tried = {}
        for at in reversed(steps) if step is None else [step]:
            folder = self.directory / str(at)
            try:
                meta = _read_meta(folder)
                return at, meta, read(folder, meta)
            except _Damaged as error:
                tried[at] = str(error)
                if step is None:
                    self._damaged.add(at)
                    log.warning("checkpoint %s is damaged: %s; trying the one before it", folder, error)
        if tried and step is not None:
            others = [at for at in steps if at != step] or "none"
            folder = self.directory / str(step)
            raise CheckpointError(f"checkpoint {folder} is damaged: {tried[step]}; other steps: {others}")
        if tried:
            reasons = "; ".join(f"step {at}: {reason}" for at, reason in tried.items())
            raise CheckpointError(
                f"no readable checkpoint in {self.directory}: {reasons}; restore the folder from a copy, "
                "or start afresh in another one"
            )
        return None

    def _absent(self, step: int) -> str:
        return f"no checkpoint of step {step} in {self.directory}; there are: {self.steps() or 'none'}"

    def _stored_score(self, step: int) -> float:
        try:
            return self._score(_read_meta(self.directory / str(step)))
        except _Damaged:
            return math.inf

    def _score(self, meta: dict) -> float:
        """The tracked metric, smaller is better; inf for a checkpoint that does not have it."""
        score = self._best_sign * meta["metrics"].get(self._best_metric, math.nan)
        return score if math.isfinite(score) else math.inf


class _Best:
    """Orbax preservation policy: keeps the smallest score. Orbax's own forgets the metrics across restarts."""

    def __init__(self, scores: Mapping[int, float]):
        self._scores = scores

    def should_preserve(self, checkpoints, *, context):
        scored = [(self._scores.get(info.step, math.inf), -info.step) for info in checkpoints]
        best = min((pair for pair in scored if pair[0] < math.inf), default=None)
        return [pair == best for pair in scored]


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def checksum(array: np.ndarray) -> str:
    """CRC-32 of the bytes in C order, as 8 hexadecimal digits."""
    # Through uint8 because arrays of the small float types have no buffer interface.
    return f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8)):08x}"


def _host(name: str, leaf: Any) -> np.ndarray:
    """A copy of the global value of a leaf in memory of its own."""
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)) or jax.dtypes.issubdtype(
        leaf.dtype, jax.dtypes.extended
    ):
        raise ValueError(f"cannot save leaf {name!r}: {type(leaf).__name__} is not a plain array; store one instead")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        whole = leaf.is_fully_replicated
        leaf = leaf.addressable_data(0) if whole else multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf, copy=True)


def _entry(array: np.ndarray) -> dict:
    return {"shape": list(array.shape), "dtype": array.dtype.name, "crc32": checksum(array)}


def _json(what: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be stored as JSON: {error}; use dicts, lists, strings and numbers") from None


def _digest(content: Any) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _read_meta(folder: Path) -> dict:
    try:
        sealed = json.loads((folder / META / "metadata").read_text(encoding="utf-8"))
        meta = sealed["content"]
        if _digest(meta) != sealed["digest"]:
            raise _Damaged(f"{META}/metadata does not match its checksum")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"{META}/metadata cannot be read: {type(error).__name__}: {error}") from error
    if meta["format"] > FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {meta['format']}, this version reads up to {FORMAT}; "
            f"use diffjax {meta['versions'].get('diffjax', 'of a later version')}"
        )
    return meta


def _read_leaves(folder: Path, table: Mapping[str, dict]) -> dict[str, np.ndarray]:
    """The leaves of `table` as host arrays, each checked against its entry.

    Orbax's own reader names no leaf when a file is damaged, and abandons the other reads in flight, each of which then
    prints a traceback; so the arrays are read from its store directly.
    """
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder / STATE}/"}}
    context = tensorstore.Context()
    spec = lambda name: {"driver": "zarr", "kvstore": store | {"path": f"{name}/"}}
    opened = {name: tensorstore.open(spec(name), read=True, context=context) for name in table}
    reads, found = {}, {}
    for name, array in opened.items():
        with _reading(name):
            reads[name] = array.result().read()
    for name, entry in table.items():
        with _reading(name):
            found[name] = reads[name].result()
        if _entry(found[name]) != entry:
            raise _Damaged(f"leaf {name!r} does not match its checksum")
    return found


@contextlib.contextmanager
def _reading(name: str):
    try:
        yield
    except ValueError as error:
        # TensorStore reports every failure of a read as ValueError.
        raise _Damaged(f"leaf {name!r} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _check_fit(where: str, table: Mapping[str, dict], like: Mapping[str, Any]) -> None:
    problems = [f"missing from it: {name}" for name in like if name not in table]
    problems += [f"unexpected in it: {name}" for name in table if name not in like]
    for name in like:
        if name in table:
            has = (tuple(table[name]["shape"]), table[name]["dtype"])
            wants = (tuple(like[name].shape), np.dtype(like[name].dtype).name)
            if has != wants:
                problems.append(f"{name}: it has {has[1]}{list(has[0])}, wanted {wants[1]}{list(wants[0])}")
    if problems:
        more = f"\n  and {len(problems) - 40} more" if len(problems) > 40 else ""
        lines = "".join(f"\n  {line}" for line in problems[:40])
        raise ValueError(f"{where} does not fit the state that it is restored into:{lines}{more}")


def _place(host: np.ndarray, like: Any = None) -> jax.Array | np.ndarray:
    """The array where `like` is: in host memory for a numpy array, at its sharding, or on the default device."""
    if isinstance(like, (np.ndarray, np.generic)):
        return host
    if jax.dtypes.canonicalize_dtype(host.dtype) != host.dtype:
        raise ValueError(f"a leaf is {host.dtype}; set jax_enable_x64, or restore into numpy arrays, to read it uncast")
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return jax.numpy.array(host)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _set_aside(directory: Path, step: int) -> None:
    """Moves a damaged checkpoint out of the way of the one that will be written in its place."""
    if jax.process_index() == 0 and (directory / str(step)).exists():
        (directory / DAMAGED).mkdir(exist_ok=True)
        taken = len(list((directory / DAMAGED).iterdir()))
        target = directory / DAMAGED / f"{step}-{taken}"
        (directory / str(step)).rename(target)
        log.warning("moved the damaged checkpoint of step %d to %s", step, target)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"set aside {step}")
