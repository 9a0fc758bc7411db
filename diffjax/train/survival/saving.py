"""Saves that fail: the run says so, keeps the last good checkpoint, and stops or goes on as configured."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffjax.train.checkpoint import CheckpointError
from diffjax.train.errors import WorkdirError
from diffjax.train.parallel import processes
from diffjax.train.survival.workdir import CONFIG_FILE

log = logging.getLogger(__name__)


def keep(session: Any, step: int, state: Any, config: Mapping, metrics: Mapping[str, float], *, last: bool) -> bool:
    """Whether the state was handed over to be saved.

    Under `config.on_save_error = "continue"` a save that fails, this one or the one before, which may fail while it is
    written in the background, is reported and the run goes on; the last save of a run must succeed under either policy.
    So must every save of several processes: they write one checkpoint together, and one that went on without the others
    would wait for them in vain.

    Raises:
      CheckpointError: if a save fails that must not.
      WorkdirError: if the folder of the run is gone.
    """
    bear = session.config.on_save_error == "continue" and processes.jax_count() == 1
    # That the save before failed in the background comes to light here, and says nothing about this one.
    attempt(session, step, session.checkpoints.wait, bear=bear)

    def save():
        require_workdir(session.workdir)
        session.checkpoints.save(step, state, session.iterator, config, metrics)

    return attempt(session, step, save, bear=bear and not last)


def attempt(session: Any, step: int, write: Callable[[], Any], *, bear: bool) -> bool:
    """Whether `write()` worked; with `bear`, one that did not is reported, else its error raised."""
    try:
        write()
        return True
    except (CheckpointError, WorkdirError) as error:
        if not bear:
            raise
        text = f"{error}; training goes on, and the next save is tried at its time (config.on_save_error)"
        log.warning("%s", text)
        session.terminal.write_texts(step, {"note": text})
        return False


def require_workdir(workdir: str) -> None:
    """Raises `WorkdirError` if the folder of a run is no longer there, or another one has taken its place."""
    if not os.path.isfile(os.path.join(workdir, CONFIG_FILE)):
        raise WorkdirError(
            f"the folder of the run, {workdir!r}, is gone or no longer holds its {CONFIG_FILE}; nothing is saved into "
            "what took its place; bring it back, or start again with another --workdir"
        )


class Files:
    """The writers that leave files in the folder of a run, as one writer that says clearly when it cannot.

    Args:
      open_writers: `step -> writers` whose files go on from a step.
      step: the step to go on from.
      on_error: `"stop"` or `"continue"`, of `config.on_save_error`.
    """

    def __init__(self, open_writers: Callable[[int], Sequence[Any]], step: int, on_error: str):
        self._open, self._bear, self._failed = open_writers, on_error == "continue", False
        self._writers = list(open_writers(step))

    def write_scalars(self, step, scalars):
        self._each("write_scalars", step, scalars)

    def write_images(self, step, images):
        self._each("write_images", step, images)

    def write_texts(self, step, texts):
        self._each("write_texts", step, texts)

    def write_hparams(self, hparams):
        self._each("write_hparams", hparams)

    def flush(self):
        self._each("flush")

    def close(self):
        self._each("close")

    def rewind(self, step: int) -> None:
        """Goes on from an earlier step: rows that are later are dropped."""
        self._each("close")
        self._writers = list(self._open(step))

    def _each(self, method: str, *args):
        for writer in self._writers:
            try:
                getattr(writer, method)(*args)
            except OSError as error:
                text = f"cannot write the metrics with {type(writer).__name__}: {type(error).__name__}: {error}"
                if not self._bear:
                    raise WorkdirError(f"{text}; free space or make the folder writable, then run it again") from error
                if not self._failed:
                    log.warning("%s; training goes on, and rows are lost until it can be written again", text)
                self._failed = True


def stretched(stored: Any, config: Any, step: int, lr: Callable[[int], Any]) -> str | None:
    """One line on what another number of steps does to the learning rate of a run that goes on; None if it is the same.

    Args:
      stored: the config that the run was started with, or None.
      config: the one that it goes on with.
      step: that it goes on from.
      lr: learning rate by step, of `config`.
    """
    from diffjax.train import optim

    if stored is None or not step or stored.num_steps == config.num_steps:
        return None
    before = float(optim.build_lr(stored.optim, stored.num_steps)(step))
    return (
        f"config.num_steps {stored.num_steps} -> {config.num_steps}: the learning rate is laid out over all steps, so "
        f"at step {step} it is {float(lr(step)):.4g} where it would have been {before:.4g}"
    )
