"""`diffjax sample`: images from a run, with everything that made them, as one npz and one picture."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from diffjax.models.checkpoint import takes_labels
from diffjax.pipelines.sampler import Cost, Settings, compile_counter, compile_sampler, grid, in_batches, settings_for


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
      path: the states and the predictions of x0 of the first samples, both `[steps, up to 3, H, W, C]`.
      files: what was written.
    """

    x: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    seeds: np.ndarray
    settings: Settings
    cost: Cost
    seconds: float
    path: tuple[np.ndarray, np.ndarray]
    files: tuple[Path, ...] = ()


def generate(
    workdir: str | os.PathLike,
    *,
    classes: Sequence[int] | None = None,
    seeds: Sequence[int] = tuple(range(10)),
    solver: str | None = None,
    steps: int | None = None,
    spacing: str | None = None,
    guidance: float | None = None,
    interval: tuple[float, float] | None = None,
    ema: str | None = None,
    step: int | str | None = None,
    batch_size: int = 128,
    out: str | os.PathLike | None = None,
    data: str | None = None,
) -> Samples:
    """Draws one sample of every class for every seed from the run in `workdir`, as an npz and a picture; returns them.

    One line on stdout says what was drawn and where it is. What is None is taken from the run's `config.sample`.

    Args:
      workdir: of a training run.
      classes: labels, the columns of the picture; default all of them.
      seeds: integers, its rows: the samples of a row start from the same noise.
      solver, steps, spacing, guidance, interval: see `Settings`.
      ema: which average of the parameters; default the run's first.
      step: which checkpoint, a number or `"best"`; default the newest.
      batch_size: samples in one call.
      out: a folder, or a `.png` or `.npz` file whose twin is written beside it; default `workdir/samples`.
      data: the same data where they lie now, to be opened in place of the run's note of what it was trained on.

    Raises:
      ValueError: for a class that the data does not have or the network is not told, no seed, or wrong settings.
      FloatingPointError: if a sample is not finite.
    """
    from diffjax.train.state import load_run

    run = load_run(os.fspath(workdir), ema=ema, step=step, data=data, items=False)
    settings = settings_for(
        run, solver=solver, steps=steps, spacing=spacing, guidance=guidance, interval=interval
    )
    chosen = check_classes(classes, classes_of(run))
    if not len(seeds):
        raise ValueError("seeds: none were given; one seed gives one sample of every class")
    every, labels = np.repeat(np.asarray(seeds), len(chosen)), np.tile(np.asarray(chosen, np.int32), len(seeds))
    samples = draw_samples(run, settings, every, labels, batch_size=batch_size, show="sampling")
    base = Path(out) if out is not None else Path(workdir) / "samples"
    base = base.with_suffix("") if base.suffix in (".png", ".npz") else base / "samples"
    samples = samples._replace(files=write(base, samples, run, columns=len(chosen)))
    where = ", ".join(map(str, samples.files))
    sys.stdout.write(f"{len(every)} samples: {describe(settings, samples.cost)}, {samples.seconds:.1f} s -> {where}\n")
    return samples


def classes_of(run) -> int:
    """Classes that the run's network can be asked for: those of its data, or 0 if it is told none."""
    return run.dataset.num_classes if takes_labels(run.model.config) else 0


def check_classes(classes: Sequence[int] | None, num_classes: int) -> list[int]:
    """The labels to draw: `classes`, or every class for None.

    Raises:
      ValueError: for a class that there is not.
    """
    if classes is None:
        return list(range(max(num_classes, 1)))
    wrong = [label for label in classes if not 0 <= label < max(num_classes, 1)]
    if wrong or not len(classes):
        allowed = f"0 to {num_classes - 1}" if num_classes else "0 only: the model has no classes to draw"
        raise ValueError(f"classes={list(classes)}: expected {allowed}")
    return list(classes)


class Program(NamedTuple):
    """A sampler and its counter, compiled once for all grids of one length and all guidance scales but 1.

    Attributes:
      draw: as from `compile_sampler`, traced: the way of the first three samples of a batch comes with it.
      count: as from `compile_counter`.
    """

    draw: Callable
    count: Callable


def compile_program(run, settings: Settings) -> Program:
    """The `Program` of `settings`; its guidance scale only decides whether there is any guidance."""
    trace = lambda info: (info.x[:3], info.prediction.x0[:3])
    return Program(compile_sampler(run, settings, trace=trace), compile_counter(run, settings))


def draw_samples(
    run, settings: Settings, seeds, labels, *, batch_size=128, show="", program: Program | None = None, length=None
) -> Samples:
    """Samples of a run, one for each seed and label, nothing written.

    Args:
      run: what `load_run` returned.
      settings: of the sampler.
      seeds: `[N]` integers.
      labels: `[N]` integers.
      batch_size: samples in one call.
      show: heading of a progress bar on a terminal; none when empty.
      program: to use again, from `compile_program` with the same solver and interval.
      length: steps to pad the grid to, for a program that is used again with other numbers of steps.
    """
    program = program or compile_program(run, settings)
    levels, paths = grid(run, settings, length=length), []

    def one(keys, labels):
        x0, path = program.draw(run.params, keys, labels, levels, settings.guidance)
        paths.append(path)
        return x0

    begun = time.perf_counter()
    bar = (lambda batches: tqdm(batches, desc=show, unit="batch", leave=False, disable=None)) if show else iter
    x = in_batches(one, seeds, labels, batch_size=batch_size, progress=bar)
    seconds = time.perf_counter() - begun
    images, labels = pixels_of(run.dataset, x, batch_size=batch_size), np.asarray(labels, np.int32)
    shown = min(3, len(labels))
    path = tuple(np.asarray(part)[: settings.steps, :shown] for part in paths[0])
    return Samples(x, images, labels, np.asarray(seeds), settings, program.count(levels), seconds, path)


def pixels_of(dataset, x: np.ndarray, *, batch_size: int = 128) -> np.ndarray:
    """The integers of samples `[N, ...]`, in batches of one size: a decoder of latents holds no more at once."""
    parts = []
    for start in range(0, len(x), batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), len(x) - 1)
        parts.append(np.asarray(dataset.to_pixels(x[rows]))[: len(x) - start])
    return np.concatenate(parts)


def largest_pixel(dataset) -> int:
    """The integer that stands for 1 in model space: 16 for digits, 255 for photographs."""
    high = getattr(dataset.to_pixels, "high", None)
    if high is not None:
        return int(high)
    return int(np.max(dataset.to_pixels(np.ones((1, *dataset.shape), np.float32))))


def describe(settings: Settings, spent: Cost) -> str:
    """One line for a person: `dpmpp_2m(), 20 steps, guidance 1.15 on sigma / alpha in (0.1, 3]: 27 evaluations ...`."""
    lo, hi = settings.interval
    where = "" if (lo, hi) == (0, float("inf")) else f" on sigma / alpha in ({lo:g}, {hi:g}]"
    guidance = "no guidance" if settings.guidance == 1 else f"guidance {settings.guidance:g}{where}"
    return f"{settings.solver}, {spent.steps} steps, {guidance}: {spent.evaluations} network evaluations per sample"


def write(base: Path, samples: Samples, run, *, columns: int) -> tuple[Path, ...]:
    """Writes `base.npz` and `base.png`, the folder made where missing; the two paths come back."""
    from diffjax import __version__, viz

    base.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "settings": samples.settings._asdict(), "cost": samples.cost._asdict(), "step": int(run.step),
        "ema": run.ema,
        "data": run.config.data, "diffjax": __version__, "jax": jax.__version__,
    }
    npz = base.with_name(base.name + ".npz")
    np.savez_compressed(
        npz, images=samples.images, x=samples.x, labels=samples.labels, seeds=samples.seeds,
        settings=np.array(json.dumps(facts)),
    )
    classes = classes_of(run)
    figure = viz.image_grid(
        viz.first_channels(samples.images), columns=columns if classes else min(10, len(samples.images)),
        column_labels=[str(label) for label in samples.labels[:columns]] if classes else (),
        row_labels=[f"seed {seed}" for seed in samples.seeds[::columns]] if classes else (),
        max_value=largest_pixel(run.dataset), title=f"Samples after {run.step} training steps",
        note=describe(samples.settings, samples.cost),
    )
    return npz, viz.save(figure, base.with_name(base.name + ".png"))
