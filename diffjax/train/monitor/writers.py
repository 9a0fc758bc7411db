"""Where metrics go: JSON lines and the terminal always, TensorBoard when asked for.

A writer is anything with the methods of clu's `MetricWriter` that are listed in `Writer`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TextIO

import numpy as np

from diffjax import files
from diffjax.train.monitor.clock import duration

METRICS_FILE = "metrics.jsonl"
# What a line on the terminal has room for.
SHOWN = ("loss", "grad_norm", "lr", "images_per_s", "step_ms", "data_wait", "mfu")


class Writer(Protocol):
    """What a sink of metrics offers; `step` is the number of updates done."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...
    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None: ...
    def write_texts(self, step: int, texts: Mapping[str, str]) -> None: ...
    def write_hparams(self, hparams: Mapping[str, Any]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Jsonl:
    """Appends one strict JSON object per call to a file: `{"step": 100, "loss": 0.31, ...}`.

    What is not finite is null. Images are not written.

    Args:
      path: the file; made if it is absent.
      upto: the step at which a resumed run goes on. Later rows, left by a run that died after its last checkpoint, are
        dropped, so that the file reads like that of an uninterrupted run.
    """

    def __init__(self, path: str, upto: int | None = None):
        if upto is not None and os.path.exists(path):
            _drop_after(path, upto)
        self._file = open(path, "a", encoding="utf-8")

    def write_scalars(self, step, scalars):
        self._write({"step": int(step), **{k: _finite(v) for k, v in scalars.items()}})

    def write_images(self, step, images):
        """Images have no place in JSON lines."""

    def write_texts(self, step, texts):
        self._write({"step": int(step), **texts})

    def write_hparams(self, hparams):
        self._write({"step": 0, "hparams": dict(hparams)})

    def flush(self):
        self._file.flush()

    def close(self):
        self._file.close()

    def _write(self, row):
        self._file.write(json.dumps(row, allow_nan=False, default=str) + "\n")


class Terminal:
    """A progress bar with rate and time to go on a terminal; elsewhere (a log file) a line every few seconds.

    Args:
      stream: where to write, such as `sys.stderr`.
      total: steps of the whole run.
      initial: steps done before.
      every_s: on no terminal, the least time between two lines; the first and the last are always written.
    """

    def __init__(self, stream: TextIO, total: int, initial: int = 0, every_s: float = 5.0):
        self._stream, self._total, self._every_s = stream, total, every_s
        self._last, self._held = -math.inf, None
        self._bar = None
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, file=stream, unit="step", dynamic_ncols=True, smoothing=0.1)

    def advance(self, step: int) -> None:
        """Moves the bar to `step`; cheap enough for every step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write_scalars(self, step, scalars):
        shown = {k: f"{scalars[k]:.4g}" for k in SHOWN if k in scalars}
        if self._bar is not None:
            self._bar.set_postfix(shown)
            return
        left = (self._total - step) / scalars["steps_per_s"] if scalars.get("steps_per_s") else 0.0
        eta = f"  eta {duration(left)}" if left else ""
        self._held = f"step {step}/{self._total}  " + "  ".join(f"{k} {v}" for k, v in shown.items()) + eta
        if time.monotonic() - self._last >= self._every_s or step >= self._total:
            self.flush()

    def write_images(self, step, images):
        """Images have no place on a terminal."""

    def write_texts(self, step, texts):
        for text in texts.values():
            self._line(text)

    def write_hparams(self, hparams):
        """The settings are in config.json."""

    def flush(self):
        if self._held is not None:
            self._line(self._held)
            self._held, self._last = None, time.monotonic()

    def close(self):
        self.flush()
        if self._bar is not None:
            self._bar.close()

    def _line(self, text):
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
            return
        self._stream.write(text + "\n")
        self._stream.flush()


class TensorBoard:
    """TensorBoard event files in a folder, through tensorboardX.

    Args:
      folder: of the files.
      upto: the step at which a run goes on, 0 from its beginning; TensorBoard leaves out what was written of later
        ones before.

    Raises:
      ModuleNotFoundError: without tensorboardX; the message says what to install.
    """

    def __init__(self, folder: str, upto: int | None = None):
        require_tensorboard()
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=None if upto is None else upto + 1)

    def write_scalars(self, step, scalars):
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, int(step))

    def write_images(self, step, images):
        """Images [H, W, C] or [B, H, W, C], uint8 or float in [0, 1]."""
        for name, image in images.items():
            image = np.asarray(image)
            if image.ndim == 4:
                self._writer.add_images(name, image, int(step), dataformats="NHWC")
            else:
                self._writer.add_image(name, image, int(step), dataformats="HWC")

    def write_texts(self, step, texts):
        for name, text in texts.items():
            self._writer.add_text(name, text, int(step))

    def write_hparams(self, hparams):
        rows = "".join(f"| {k} | {v} |\n" for k, v in hparams.items())
        self._writer.add_text("hparams", "| key | value |\n|---|---|\n" + rows, 0)

    def flush(self):
        self._writer.flush()

    def close(self):
        self._writer.close()


class Pictures:
    """Each image as a PNG in a folder, `samples_001000.png` for the image `samples` at step 1000; nothing else."""

    def __init__(self, folder: str):
        self._folder = folder

    def write_images(self, step, images):
        """Images [H, W, 1 or 3] uint8."""
        from matplotlib.image import imsave

        os.makedirs(self._folder, exist_ok=True)
        for name, image in images.items():
            rgb = np.broadcast_to(image, (*np.shape(image)[:2], 3))
            imsave(os.path.join(self._folder, f"{name}_{int(step):06d}.png"), np.ascontiguousarray(rgb))

    def write_scalars(self, step, scalars):
        """A picture shows none."""

    def write_texts(self, step, texts):
        """A picture shows none."""

    def write_hparams(self, hparams):
        """The settings are in config.json."""

    def flush(self):
        """Every picture is on disk when it is written."""

    def close(self):
        """No file is kept open."""


class Several:
    """Writes to each of several writers."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = tuple(writers)

    def write_scalars(self, step, scalars):
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_images(self, step, images):
        for writer in self._writers:
            writer.write_images(step, images)

    def write_texts(self, step, texts):
        for writer in self._writers:
            writer.write_texts(step, texts)

    def write_hparams(self, hparams):
        for writer in self._writers:
            writer.write_hparams(hparams)

    def flush(self):
        for writer in self._writers:
            writer.flush()

    def close(self):
        for writer in self._writers:
            writer.close()


def require_tensorboard() -> None:
    """Raises `ModuleNotFoundError`, naming the extra to install, unless tensorboardX is there."""
    import importlib.util

    if importlib.util.find_spec("tensorboardX") is None:
        raise ModuleNotFoundError("TensorBoard files need tensorboardX: pip install 'diffjax[tensorboard]'")


def _drop_after(path: str, step: int) -> None:
    kept = [row for row in files.read_rows(path) if row["step"] <= step]
    # A crash here must lose no row.
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept), tag="run")


def _finite(value):
    value = float(value)
    return value if math.isfinite(value) else None
