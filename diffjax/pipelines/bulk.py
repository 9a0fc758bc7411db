"""`diffjax sample --num=50000`: samples in shards, over devices and processes, the same bits however often stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from diffjax import files
from diffjax.pipelines.generate import Samples, check_classes, classes_of, describe, largest_pixel, pixels_of
from diffjax.pipelines.sampler import (
    Settings,
    check_finite,
    compile_sampler,
    cost,
    grid,
    keys_of,
    settings_for,
    settings_of,
)
from diffjax.train import paths
from diffjax.train.errors import WorkdirError
from diffjax.train.parallel.mesh import batch_sharding, make_mesh, replicated

INDEX, PREVIEW = "index.json", "preview.png"
# What a seed's key is folded with for its label: another stream than those of its noise.
_LABEL = 2


class Bulk(NamedTuple):
    """What a call of `sample_many` did.

    Attributes:
      folder: where the shards are.
      drawn: samples that this call drew.
      kept: samples of its share that were there already.
      complete: whether every shard of the folder is there, those of other processes included.
    """

    folder: Path
    drawn: int
    kept: int
    complete: bool


def sample_many(
    workdir: str | os.PathLike,
    num: int,
    *,
    classes: Sequence[int] | None = None,
    labels: str = "balanced",
    seed: int = 0,
    shard_size: int = 1000,
    batch_size: int = 128,
    part: tuple[int, int] = (0, 1),
    devices: Sequence[jax.Device] | None = None,
    out: str | os.PathLike | None = None,
    ema: str | None = None,
    step: int | str | None = None,
    data: str | None = None,
    **settings,
) -> Bulk:
    """Draws `num` samples from the run in `workdir` into `samples_00000-of-00050.npz` and so on.

    Sample i has the seed `seed + i` and depends on nothing but it, its label and the settings. Finished shards are kept
    and checked (their sums, labels and seeds), so the same call goes on with a killed one, which loses at most the
    shard that it was at; the files are the same bytes as without the interruption. Every device works on batches of
    the same size, so the number of devices and of processes does not change them either, on one kind of device.

    Each shard holds `images` (integers of the data set), `labels` and `seeds`; `index.json` holds what they were drawn
    with, `preview.png` shows the first of them.

    Args:
      workdir: of a training run.
      num: samples in all.
      classes: labels to draw; default all of them.
      labels: `"balanced"`: sample i has the class `i % len(classes)`; `"random"`: uniform, drawn from its seed.
      seed: of the first sample.
      shard_size: samples in a file.
      batch_size: samples in a call, on each device.
      part: `(i, n)`: this process draws the shards i, i + n, i + 2 n, ...
      devices: to use; default all local ones.
      out: folder; default `workdir/samples-NUM`.
      ema: which average of the parameters; default the run's first.
      step: which checkpoint, a number or `"best"`; default the newest.
      data: the same data where they lie now, to be opened in place of the run's note of what it was trained on.
      **settings: `solver`, `steps`, `spacing`, `guidance` and `interval`, as in `Settings`.

    Raises:
      ValueError: for wrong settings, or a folder with samples of others; lists every difference.
      WorkdirError: if another process draws the same part there.
      FloatingPointError: if a sample is not finite; nothing of its shard is written.
    """
    from diffjax.train.state import load_run

    check_numbers(num, seed, shard_size, batch_size, part, labels)
    run = load_run(os.fspath(workdir), ema=ema, step=step, data=data, items=False)
    chosen = settings_for(run, **settings)
    folder = Path(out) if out is not None else Path(workdir) / f"samples-{num}"
    index = {
        "num": num, "shard_size": shard_size, "shards": math.ceil(num / shard_size), "seed": seed,
        "labels": labels, "classes": check_classes(classes, classes_of(run)), "batch_size": batch_size,
        "settings": plain(chosen), "data": run.config.data, "step": int(run.step),
        "ema": run.ema, "params_sha256": digest(run.params),
    }  # fmt: skip
    # First, as it refuses settings that cannot be drawn with.
    draw = compile_on_devices(run, chosen, batch_size, devices)
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder, index)
    with locked(folder, part):
        mine = range(part[0], index["shards"], part[1])
        sizes = {number: len(seeds_of(index, number)) for number in mine}
        left = [number for number in mine if not finished(folder, index, number)]
        total, missing = sum(sizes.values()), sum(sizes[number] for number in left)
        seconds = draw_shards(run, draw, folder, index, left, part=part, total=total)
    complete = all(shard_path(folder, index, number).exists() for number in range(index["shards"]))
    if complete and not (folder / PREVIEW).exists():
        write_preview(folder, index, run, chosen)
    rate = f", {missing / seconds:.4g} samples/s" if missing else ""
    state = "complete" if complete else "shards of other processes are missing"
    sys.stdout.write(f"{missing} samples drawn, {total - missing} there already{rate} -> {folder} ({state})\n")
    return Bulk(folder, missing, total - missing, complete)


def check_numbers(num, seed, shard_size, batch_size, part, labels) -> None:
    """Refuses numbers that name no samples.

    Raises:
      ValueError: for a count below 1, seeds beyond 32 bits, a part that is not one of the parts, or an unknown rule.
    """
    for name, value in {"num": num, "shard_size": shard_size, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    if seed < 0 or seed + num > 2**32:
        raise ValueError(f"seeds from {seed} to {seed + num - 1}: expected integers in [0, 2**32)")
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part={part[0]}/{part[1]}: expected I/N with 0 <= I < N, such as 0/4 for the first of four")
    if labels not in ("balanced", "random"):
        raise ValueError(f"labels={labels!r}; known: balanced, random")


def plain(settings: Settings) -> dict:
    """The settings as strict JSON values; infinities become strings."""
    values = settings._asdict()
    return values | {"interval": [end if math.isfinite(end) else str(end) for end in settings.interval]}


def digest(params) -> str:
    """SHA-256 over names, shapes and values of the parameters."""
    total = hashlib.sha256()
    for name, leaf in sorted(paths.named_leaves(params).items()):
        total.update(f"{name} {leaf.shape} {leaf.dtype}".encode())
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


def claim(folder: Path, index: dict) -> None:
    """Writes the index of a folder, or compares it with the one that is there.

    Raises:
      ValueError: if they differ; lists every difference.
    """
    path = folder / INDEX
    if not path.exists():
        files.write_text(path, json.dumps(index, indent=1, allow_nan=False) + "\n")
    # Read again: of two processes that start at once, the later one has written it.
    there = read_index(folder)
    differ = [key for key, value in index.items() if there.get(key) != value]
    if differ:
        # Other parameters follow from another step, and nobody can give their sum.
        shown = [key for key in differ if key != "params_sha256" or len(differ) == 1]
        changes = "; ".join(f"{key}: {there.get(key)!r} -> {index[key]!r}" for key in shown)
        step = f" (--step={there.get('step')} for those of that step)" if "step" in differ else ""
        raise ValueError(
            f"{os.fspath(folder)!r} holds samples that were drawn otherwise (stored -> given): {changes}; give the "
            f"stored values{step} to go on with them, or another --out"
        )


def read_index(folder: Path) -> dict:
    """The index of a folder of samples.

    Raises:
      ValueError: if there is none, or it is damaged.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise ValueError(
            f"{os.fspath(folder)!r} holds no samples: no {INDEX}; `diffjax sample --num=N --out=...` makes it"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove the folder and draw the samples again") from error


def shard_path(folder: Path, index: dict, number: int) -> Path:
    """The file of a shard."""
    return Path(folder) / f"samples_{number:05d}-of-{index['shards']:05d}.npz"


def seeds_of(index: dict, number: int) -> np.ndarray:
    """The seeds of a shard, int64."""
    begin = number * index["shard_size"]
    return index["seed"] + np.arange(begin, min(begin + index["shard_size"], index["num"]), dtype=np.int64)


def labels_of(index: dict, seeds: np.ndarray) -> np.ndarray:
    """The labels of samples by their seeds, int32; a sample's label does not depend on how many there are."""
    classes = np.asarray(index["classes"], np.int32)
    if index["labels"] == "balanced":
        return classes[(seeds - index["seed"]) % len(classes)]
    draw = jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, _LABEL), (), 0, len(classes)))
    return classes[np.asarray(draw(keys_of(seeds)))]


def finished(folder: Path, index: dict, number: int) -> bool:
    """Whether a shard is there, undamaged, and holds the samples that the index says."""
    path, seeds = shard_path(folder, index, number), seeds_of(index, number)
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:
                return False
        with np.load(path) as arrays:
            same = np.array_equal(arrays["seeds"], seeds) and np.array_equal(arrays["labels"], labels_of(index, seeds))
            # Their shape is the decoder's, where the data are latents.
            return same and len(arrays["images"]) == len(seeds)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False


def draw_shards(run, draw: Callable, folder: Path, index: dict, left: list[int], *, part, total) -> float:
    """Draws with `compile_on_devices(...)` and writes the shards `left`, with a progress bar over the `total` samples
    of this process; seconds."""
    for stale in folder.glob(f"*.{part[0]}-of-{part[1]}.part"):
        stale.unlink()
    if not left:
        return 0.0
    missing = sum(len(seeds_of(index, number)) for number in left)
    begun = time.perf_counter()
    with tqdm(desc="sampling", unit="sample", total=total, initial=total - missing, disable=None, leave=False) as bar:
        for number in left:
            seeds = seeds_of(index, number)
            labels = labels_of(index, seeds)
            x = draw(seeds, labels, bar.update)
            check_finite(x, number * index["shard_size"])
            images = pixels_of(run.dataset, x, batch_size=index["batch_size"])
            path = shard_path(folder, index, number)
            with files.replacing(path, "wb", tag=f"{part[0]}-of-{part[1]}") as file:
                np.savez(file, images=images, labels=labels, seeds=seeds)
    return time.perf_counter() - begun


def compile_on_devices(run, settings: Settings, batch_size: int, devices=None) -> Callable:
    """`(seeds [N], labels [N], done: count -> None) -> x0 [N, H, W, C]`, in batches of `batch_size` on each device."""
    mesh = make_mesh(devices=list(jax.local_devices() if devices is None else devices))
    split, whole = batch_sharding(mesh), replicated(mesh)
    levels, draw = grid(run, settings), compile_sampler(run, settings)
    params = jax.device_put(run.params, whole)
    sample = jax.jit(
        lambda params, keys, labels: draw(params, keys, labels, levels, settings.guidance),
        in_shardings=(whole, split, split),
        out_shardings=split,
    )
    width = batch_size * mesh.size

    def every(seeds, labels, done):
        parts = []
        for start in range(0, len(seeds), width):
            # The last call is filled up with copies, so that every call is of one size.
            rows = np.minimum(np.arange(start, start + width), len(seeds) - 1)
            keys, given = jax.device_put((keys_of(seeds[rows]), jnp.asarray(labels[rows])), split)
            kept = min(width, len(seeds) - start)
            parts.append(np.asarray(sample(params, keys, given))[:kept])
            done(kept)
        return np.concatenate(parts)

    return every


def write_preview(folder: Path, index: dict, run, settings: Settings) -> Path:
    """A picture of the first samples, up to a hundred."""
    from diffjax import viz

    with np.load(shard_path(folder, index, 0)) as arrays:
        images, labels = arrays["images"][:100], arrays["labels"][:100]
    columns = min(10, len(images)) if index["labels"] != "balanced" else min(len(index["classes"]), 20, len(images))
    classes = f"Classes from {labels.min()} to {labels.max()}. " if classes_of(run) else ""
    figure = viz.image_grid(
        viz.first_channels(images),
        columns=max(columns, min(10, len(images))) if columns == 1 else columns,
        max_value=largest_pixel(run.dataset),
        title=f"The first {len(images)} of {index['num']} samples after {run.step} training steps",
        note=classes + describe(settings, cost(run, settings)),
    )
    return viz.save(figure, folder / PREVIEW)


def read_samples(folder: str | os.PathLike, run) -> tuple[Samples, dict]:
    """All samples of a folder as if they had just been drawn (without `x` and `path`), and its index.

    Raises:
      ValueError: if the folder is of other data than the run's, or shards are missing or damaged; names them.
    """
    folder, index = Path(folder), read_index(Path(folder))
    if index["data"] != run.config.data:
        raise ValueError(f"{os.fspath(folder)!r} holds samples of {index['data']}, the run is one of {run.config.data}")
    numbers = range(index["shards"])
    missing = [shard_path(folder, index, n).name for n in numbers if not finished(folder, index, n)]
    if missing:
        raise ValueError(
            f"{os.fspath(folder)!r}: {len(missing)} of {index['shards']} shards are missing or damaged, the first is "
            f"{missing[0]}; run its `diffjax sample` again, it goes on"
        )
    seeds = index["seed"] + np.arange(index["num"], dtype=np.int64)
    labels, images = labels_of(index, seeds), None
    for number in numbers:
        with np.load(shard_path(folder, index, number)) as arrays:
            part = arrays["images"]
        # Tens of thousands of images take gigabytes: they are held once.
        images = np.empty((len(seeds), *part.shape[1:]), part.dtype) if images is None else images
        start = number * index["shard_size"]
        images[start : start + len(part)] = part
    values = index["settings"] | {"interval": tuple(float(end) for end in index["settings"]["interval"])}
    settings = settings_of(values)
    return Samples(None, images, labels, seeds, settings, cost(run, settings), 0.0, ()), index


def locked(folder: Path, part: tuple[int, int]) -> contextlib.AbstractContextManager[None]:
    """Holds the lock of one part of a folder while the block lasts.

    Raises:
      WorkdirError: if another process holds it.
    """

    def refusal(owner):
        given = f"process {owner} draws part {part[0]}/{part[1]} of {os.fspath(folder)!r}"
        return WorkdirError(f"{given}; wait for it, stop it, or give another --out")

    return files.locked(folder / f".lock-{part[0]}-of-{part[1]}", refusal)
