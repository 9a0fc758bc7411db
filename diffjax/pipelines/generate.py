"""`diffjax sample`: images from a run, with everything that made them, as one npz and one picture."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from diffjax.pipelines.sampler import Cost, Settings, compile_sampler, cost, grid, in_batches, settings_of


class Samples(NamedTuple):
    """Drawn samples and how they were drawn.

    Attributes:
      x: `[N, H, W, C] float32` in `[-1, 1]`, as the sampler left them.
      images: `[N, H, W, C] uint8`, the integers of the data set.
      labels: `[N] int32`, the classes asked for; 0 for a model without classes.
      seeds: `[N]`; a sample is a function of its seed, its label and the settings.
      settings: of the sampler.
      cost: of one sample.
      seconds: wall clock of the drawing, compilation included.
      files: what was written.
    """

    x: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    seeds: np.ndarray
    settings: Settings
    cost: Cost
    seconds: float
    files: tuple[Path, ...] = ()


def generate(
    workdir: str | os.PathLike,
    *,
    num: int | None = None,
    classes: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    solver: str | None = None,
    steps: int | None = None,
    spacing: str | None = None,
    guidance: float | None = None,
    interval: tuple[float, float] | None = None,
    ema: str | None = None,
    step: int | None = None,
    batch_size: int = 128,
    out: str | os.PathLike | None = None,
) -> Samples:
    """Draws samples from the run in `workdir` and writes `samples.npz` and `samples.png`; what was drawn comes back.

    What is None is taken from the run's `config.sample`.

    Args:
      workdir: of a training run.
      num: how many; default one per seed, else ten per class.
      classes: labels, repeated in turn over the samples; default all of them.
      seeds: one integer per sample; default 0, 1, 2, ...
      solver, steps, spacing, guidance, interval: see `Settings`.
      ema: which average of the parameters; default the run's first.
      step: which checkpoint; default the newest.
      batch_size: samples in one call.
      out: folder, default `workdir/samples`.

    Raises:
      ValueError: for a number of seeds that is not `num`, a class that the data does not have, or wrong settings.
    """
    from diffjax.train.state import load_run

    run = load_run(os.fspath(workdir), ema=ema, step=step)
    settings = settings_of(
        run.config.sample, solver=solver, steps=steps, spacing=spacing, guidance=guidance, interval=interval
    )
    chosen = check_classes(classes, run.dataset.num_classes)
    if seeds is None:
        seeds = np.arange(10 * len(chosen) if num is None else num)
    if num is not None and len(seeds) != num or len(seeds) == 0:
        raise ValueError(f"{len(seeds)} seeds for num={num}: give one seed for each sample, at least one, or num alone")
    labels = np.resize(np.asarray(chosen, np.int32), len(seeds))
    samples = draw_samples(run, settings, seeds, labels, batch_size=batch_size, show="sampling")
    folder = Path(out) if out is not None else Path(workdir) / "samples"
    return samples._replace(files=write(folder, samples, run, columns=min(len(chosen), len(seeds)), ema=ema))


def check_classes(classes: Sequence[int] | None, num_classes: int) -> list[int]:
    """The labels to draw: `classes`, or every class for None.

    Raises:
      ValueError: for a class that the data does not have.
    """
    if classes is None:
        return list(range(max(num_classes, 1)))
    wrong = [label for label in classes if not 0 <= label < max(num_classes, 1)]
    if wrong or not len(classes):
        allowed = f"0 to {num_classes - 1}" if num_classes else "0 only: the data has no classes"
        raise ValueError(f"classes={list(classes)}: expected {allowed}")
    return list(classes)


def draw_samples(
    run, settings: Settings, seeds, labels, *, batch_size: int = 128, show: str = "", draw=None, length=None
) -> Samples:
    """Samples of a run, one for each seed and label, nothing written.

    Args:
      run: what `load_run` returned.
      settings: of the sampler.
      seeds: `[N]` integers.
      labels: `[N]` integers.
      batch_size: samples in one call.
      show: heading of a progress bar; none when empty.
      draw: a compiled sampler to use again, from `compile_sampler` with the same solver and interval.
      length: steps to pad the grid to, for samplers that are used again with other numbers of steps.
    """
    draw = draw or compile_sampler(run, settings)
    levels = grid(run, settings, length=length)
    begun = time.perf_counter()
    bar = (lambda batches: tqdm(batches, desc=show, unit="batch", leave=False)) if show else iter
    one = lambda keys, labels: draw(run.params, keys, labels, levels, settings.guidance)
    x = in_batches(one, seeds, labels, batch_size=batch_size, progress=bar)
    seconds = time.perf_counter() - begun
    images, labels = np.asarray(run.dataset.to_pixels(x)), np.asarray(labels, np.int32)
    return Samples(x, images, labels, np.asarray(seeds), settings, cost(run, settings), seconds)


def largest_pixel(dataset) -> int:
    """The integer that stands for 1 in model space: 16 for digits, 255 for photographs."""
    return int(np.max(dataset.to_pixels(np.ones((1, *dataset.shape), np.float32))))


def describe(settings: Settings, spent: Cost) -> str:
    """One line for a person: `dpmpp_2m(), 20 steps, guidance 1.15 on sigma / alpha in (0.1, 3]: 27 evaluations ...`."""
    lo, hi = settings.interval
    where = "" if (lo, hi) == (0, float("inf")) else f" on sigma / alpha in ({lo:g}, {hi:g}]"
    guidance = "no guidance" if settings.guidance == 1 else f"guidance {settings.guidance:g}{where}"
    return f"{settings.solver}, {spent.steps} steps, {guidance}: {spent.evaluations} network evaluations per sample"


def write(folder: Path, samples: Samples, run, *, columns: int, ema: str | None = None) -> tuple[Path, ...]:
    """Writes `samples.npz` and `samples.png` into `folder`, made where missing; the two paths come back."""
    from diffjax import __version__, viz

    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "settings": samples.settings._asdict(), "cost": samples.cost._asdict(), "step": int(run.step), "ema": ema,
        "data": run.config.data, "diffjax": __version__, "jax": jax.__version__,
    }
    npz = folder / "samples.npz"
    np.savez_compressed(
        npz, images=samples.images, x=samples.x, labels=samples.labels, seeds=samples.seeds,
        settings=np.array(json.dumps(facts)),
    )
    names = [str(label) for label in samples.labels[:columns]] if run.dataset.num_classes else ()
    figure = viz.image_grid(
        samples.images, columns=columns if run.dataset.num_classes else min(10, len(samples.images)),
        column_labels=names, max_value=largest_pixel(run.dataset), title=f"Samples after {run.step} training steps",
        note=describe(samples.settings, samples.cost),
    )
    return npz, viz.save(figure, folder / "samples.png")
