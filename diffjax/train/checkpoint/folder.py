"""The checkpoints of a run: saved in the background, verified when they are read, the damaged ones passed over."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from diffjax.train import paths
from diffjax.train.checkpoint import meta as metas
from diffjax.train.checkpoint import read as reads
from diffjax.train.checkpoint.blocks import Staging
from diffjax.train.checkpoint.errors import CheckpointError, Damaged
from diffjax.train.checkpoint.item import BlocksSave
from diffjax.train.parallel import processes

log = logging.getLogger(__name__)

DAMAGED = "damaged"
# Leaves that do not fit, as a message lists them.
SHOWN = 8


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
        self._staging = Staging()

    def reserve(self, state: Any) -> None:
        """Makes room in host memory for the copies of such a state, in the background; saves are slow without it.

        Needed where the state is in host memory itself (CPU): there the room is as large as the state.
        """
        self._staging.reserve(paths.named_leaves(state))

    def save(
        self,
        step: int,
        state: Any,
        iterator: Any = None,
        config: Mapping | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Copies everything to the host and writes it in the background; False if this step is saved already.

        The caller may donate or change `state` as soon as this returns. Waits for the save before it. Of arrays spread
        over several processes each process saves what it holds, so all of them must call this with the same step; the
        iterator's state and the metrics are those of process 0.

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
        leaves = paths.named_leaves(state)
        staged = self._staging.copy(leaves)
        meta = {
            "format": metas.FORMAT,
            "step": int(step),
            "processes": jax.process_count(),
            "versions": metas.versions(),
            "config": metas.plain("config", config.to_dict() if hasattr(config, "to_dict") else config),
            "iterator": metas.plain("the iterator's get_state()", None if iterator is None else iterator.get_state()),
            "metrics": {key: float(value) for key, value in (metrics or {}).items()},
            "leaves": {name: {"shape": list(x.shape), "dtype": x.dtype.name} for name, x in leaves.items()},
        }
        args = ocp.args.Composite(**{metas.STATE: BlocksSave(staged), metas.META: ocp.args.JsonSave(metas.seal(meta))})
        with self._writing(step):
            if self._damaged and self._manager is not None:
                # It was opened before they were found damaged, and takes them for saved.
                self._manager.close()
                self._manager = None
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
            wanted = {name: reads.boxes(leaf) for name, leaf in like.items()}
            return {name: reads.place(found, like[name]) for name, found in reads.read_leaves(folder, meta, wanted)}

        found = self._first_sound(read, step, agree=True)
        if found is None:
            return None
        at, meta, leaves = found
        if iterator is not None and meta["iterator"] is None:
            raise ValueError(f"checkpoint {self.directory / str(at)} was saved without the state of a data iterator")
        state = jax.tree_util.tree_map_with_path(lambda path, _: leaves[paths.name(path)], state_like)
        if iterator is not None:
            iterator.set_state(meta["iterator"])
        return at, state

    def restore_part(self, prefix: str, step: int | None = None, *, host: bool = False) -> tuple[int, dict] | None:
        """`(step, tree)` with the leaves whose names start with `prefix/` alone, read and verified, for inference.

        Args:
          prefix: `"params"`, or `"ema/decay(0.999)"`.
          step: as `restore`.
          host: leaves the arrays in host memory, whatever devices there are.

        Returns:
          The tree as nested dicts of jax arrays on the default device, or of numpy arrays, keys as strings; None if
          there is no checkpoint.

        Raises:
          CheckpointError: as `restore`.
          ValueError: if no leaf has that prefix; lists the first parts of the names.
        """

        def read(folder, meta):
            table = {n: entry for n, entry in meta["leaves"].items() if n.startswith(prefix + "/")}
            if not table:
                known = sorted({n.rpartition("/")[0] for n in meta["leaves"]})
                raise ValueError(f"checkpoint {folder} has nothing under {prefix!r}; it has: {', '.join(known)}")
            wanted = {name: [reads.whole(entry)] for name, entry in table.items()}
            like = np.empty(0) if host else None
            return {name: reads.place(found, like) for name, found in reads.read_leaves(folder, meta, wanted)}

        found = self._first_sound(read, step)
        if found is None:
            return None
        tree: dict = {}
        for name, array in found[2].items():
            *parents, last = name.removeprefix(prefix + "/").split("/")
            node = tree
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = array
        return found[0], tree

    def steps(self) -> list[int]:
        """The complete checkpoints in the folder, in increasing order, without those that were found damaged."""
        if not self.directory.is_dir():
            return []
        found = (int(p.name) for p in self.directory.iterdir() if p.name.isdecimal() and p.is_dir())
        return sorted(set(found) - self._damaged)

    def info(self, step: int) -> dict:
        """The JSON part: `step`, `config`, `metrics`, `iterator`, `versions`, `leaves` (shapes, dtypes).

        Raises:
          CheckpointError: if there is no such step, or it is damaged.
        """
        if step not in self.steps():
            raise CheckpointError(self._absent(step))
        try:
            return metas.read_meta(self.directory / str(step))
        except Damaged as error:
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

    def _first_sound(self, read: Callable[[Path, dict], Any], step: int | None, *, agree: bool = False):
        """`(step, meta, read(folder, meta))` of the latest checkpoint, or of `step`, that is not damaged, or None.

        With `agree`, what one process finds damaged or does not see is passed over by all.
        """
        self.wait()
        steps, least = self.steps(), processes.least if agree else int
        if step is not None and step not in steps:
            raise CheckpointError(self._absent(step))
        tried, left = {}, steps if step is None else [step]
        while left := [at for at in left if at not in tried]:
            at, found, reason = least(left[-1]), None, "another process cannot read it"
            folder = self.directory / str(at)
            try:
                meta = metas.read_meta(folder)
                found = at, meta, read(folder, meta)
            except Damaged as error:
                reason = str(error)
            if least(found is not None):
                return found
            tried[at] = reason
            if step is None:
                self._damaged.add(at)
                log.warning("checkpoint %s is damaged: %s; trying the one before it", folder, reason)
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
            return self._score(metas.read_meta(self.directory / str(step)))
        except Damaged:
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
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        lines = "".join(f"\n  {line}" for line in problems[:SHOWN])
        raise ValueError(f"{where} does not fit the state that it is restored into:{lines}{more}")


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
