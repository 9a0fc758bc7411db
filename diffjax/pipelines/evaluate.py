"""`diffjax eval`: samples against held-out data and baselines, as one table, `report.json` and pictures."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from diffjax import files, registry, viz
from diffjax.pipelines import judge as judges
from diffjax.pipelines import report as reports
from diffjax.pipelines.generate import Samples, compile_program, describe, draw_samples, largest_pixel, pixels_of
from diffjax.pipelines.heldout import heldout_loss
from diffjax.pipelines.judge import Judge
from diffjax.pipelines.sampler import Settings, can_guide, grid, settings_for

# Network evaluations of the sweep; Heun takes the steps whose 2 n - 1 evaluations come closest from below.
SWEEP = {"ddim()": (5, 10, 20, 50, 100), "heun()": (5, 10, 20, 35, 50, 100), "dpmpp_2m()": (5, 10, 20, 50, 100)}
NAMES = {
    "floor": "split floor: real training images",
    "memoriser": "training images, drawn again",
    "gmm100_full": "mixture of 100 Gaussians",
    "class_gaussian": "a Gaussian per class",
    "gmm10_full": "mixture of 10 Gaussians",
    "gaussian": "one Gaussian",
}
DRAWN = (NAMES["memoriser"], NAMES["gmm100_full"], NAMES["class_gaussian"])
SCALES = (0.0, 1.0, 1.5, 2.0, 4.0)
GUIDANCE_STEPS = 10
# Seeds of two repetitions never meet.
SEED_STRIDE = 1_000_000
# Samples up to which metrics that compare every pair of them are taken.
MANY = 5000
# Held-out images below which no metric says much, and samples below which none can be taken.
FEW, LEAST = 100, 6


def evaluate(
    workdir: str | os.PathLike,
    *,
    num_samples: int | None = None,
    seeds: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    quick: bool = False,
    solver: str | None = None,
    steps: int | None = None,
    spacing: str | None = None,
    guidance: float | None = None,
    interval: tuple[float, float] | None = None,
    ema: str | None = None,
    step: int | str | None = None,
    out: str | os.PathLike | None = None,
    data: str | None = None,
) -> dict:
    """Evaluates the run in `workdir`, shows one table on stdout and writes the rest; the report comes back.

    Into `workdir/eval` go `report.json`, `samples.npz` (`images uint8`, `labels`, `split_seed`), `grid.png`,
    `neighbours.png`, `strip.png`, `loss.png`, and unless `quick` also `guidance.png` and `nfe.png`. What is None comes
    from the run's config.

    Args:
      workdir: of a training run.
      num_samples: samples of each repetition; classes come as often as in the held-out data. 0, the config's default:
        as many as there are held-out images, which distances are comparable at, but at most `MANY`.
      seeds: repetitions with other noise; with more than one the table has mean and standard deviation.
      batch_size: samples in one call, about; all calls have the same size.
      seed: of the first repetition.
      quick: leave out the sweeps over guidance and over the number of network evaluations.
      solver, steps, spacing, guidance, interval: see `Settings`.
      ema: which average of the parameters.
      step: which checkpoint, a number or `"best"`.
      out: folder in place of `workdir/eval`.
      data: the same data where they lie now, if the run's config no longer finds them.

    Raises:
      ValueError: for too few samples, seeds or samples in a call, or wrong settings.
      FloatingPointError: if a sample is not finite.
    """
    from diffjax.train.state import load_run

    clock = [("start", time.perf_counter())]

    def lap(name):
        clock.append((name, time.perf_counter()))
        sys.stderr.write(f"{name}: {clock[-1][1] - clock[-2][1]:.1f} s\n")

    run = load_run(os.fspath(workdir), ema=ema, step=step, data=data)
    settings = settings_for(run, solver=solver, steps=steps, spacing=spacing, guidance=guidance, interval=interval)
    num = run.config.eval.num_samples if num_samples is None else num_samples
    num = num or as_many_as(len(run.dataset.heldout))
    repeats = run.config.eval.seeds if seeds is None else seeds
    batch = run.config.eval.batch_size if batch_size is None else batch_size
    if num < LEAST or repeats < 1 or batch < 1:
        given = f"num_samples={num}, seeds={repeats}, batch_size={batch}"
        raise ValueError(f"{given}: expected at least 6 samples, 1 seed and 1 sample in a call")
    folder = Path(out) if out is not None else Path(workdir) / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    lap("load")
    judge = judges.judge_of(run)
    baselines = named(judges.rows(judge))
    lap("baselines")
    draw = sampling_program(run, math.ceil(num / max(1, round(num / batch))))
    labels = stratified(run.dataset, num)
    drawn = [draw(settings, (seed + r) * SEED_STRIDE + np.arange(num), labels, "samples") for r in range(repeats)]
    report = facts(run, settings, drawn, seed=seed) | scored(run, judge, settings, drawn)
    report["rows"] |= baselines
    lap("samples")
    report["heldout"] = heldout_loss(run, batch_size=batch)
    lap("held-out loss")
    if not quick:
        report |= sweeps(run, judge, draw, settings, drawn[0], report["rows"], folder)
    lap("sweeps")
    save_samples(folder, drawn, run)
    pictures(folder, run, settings, drawn[0], judge, workdir)
    lap("pictures")
    report["seconds"] = {name: round(t - before, 2) for (_, before), (name, t) in zip(clock, clock[1:], strict=False)}
    report["seconds"]["all"] = round(clock[-1][1] - clock[0][1], 2)
    write_json(folder / "report.json", report)
    sys.stdout.write(summary(report, folder))
    return report


def as_many_as(heldout: int) -> int:
    """How many samples to compare with so many held-out images: as many, from `LEAST` to `MANY`."""
    return min(max(heldout, LEAST), MANY)


def evaluate_samples(
    workdir: str | os.PathLike,
    samples: str | os.PathLike,
    *,
    out: str | os.PathLike | None = None,
    data: str | None = None,
) -> dict:
    """Judges the samples in the folder of `diffjax sample --num`, drawn from any checkpoint of the run in `workdir`.

    As `evaluate` without drawing: `report.json`, `grid.png` and `neighbours.png` go into `samples/eval`. Of more than
    `MANY` samples only Frechet distances and accuracy are taken; the rest compares every pair. `data` as in `evaluate`.

    Raises:
      ValueError: if shards are missing or damaged, or of other data.
    """
    from diffjax.pipelines.bulk import read_samples
    from diffjax.train.state import load_run

    begun, run = time.perf_counter(), load_run(os.fspath(workdir), data=data)
    drawn, index = read_samples(samples, run)
    folder = Path(out) if out is not None else Path(samples) / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    judge, few = judges.judge_of(run), len(drawn.labels) <= MANY
    about = facts(run, drawn.settings, [drawn], seed=index["seed"])
    about |= {name: index[name] for name in ("step", "ema", "params_sha256")} | {"sampling_seconds": []}
    report = about | scored(run, judge, drawn.settings, [drawn], judges.score if few else judges.brief)
    report["rows"] |= named(judges.rows(judge))
    if not few:
        report["notes"].append(f"of more than {MANY} samples only Frechet distances and accuracy are taken")
    shared = dict(num_classes=run.dataset.num_classes, max_value=largest_pixel(run.dataset))
    reports.draw_grid(folder, drawn, note=describe(drawn.settings, drawn.cost), **shared)
    reports.draw_neighbours(folder, drawn, judge.train, judge.heldout, **shared)
    report["seconds"] = {"all": round(time.perf_counter() - begun, 2)}
    write_json(folder / "report.json", report)
    sys.stdout.write(summary(report, folder))
    return report


def scored(run, judge: Judge, settings: Settings, drawn: list[Samples], score: Callable = judges.score) -> dict:
    """The part of the report that judges the main samples: rows, each seed, floor and notes."""
    asked = drawn[0].labels if run.dataset.num_classes else None
    scores = [score(judge, samples.images, asked) for samples in drawn]
    return {
        "rows": ours(settings, drawn[0], scores),
        "each_seed": scores,
        "closer_if_new": len(judge.protocol.train) / (len(judge.protocol.train) + len(judge.protocol.heldout)),
        "floor": {"metric": judge.headline, "mean": judge.floor[0], "std": judge.floor[1]},
        "notes": [
            *judge.notes,
            *notes_on_size(len(drawn[0].labels), len(judge.protocol.heldout)),
            *notes_on_guidance(run),
        ],
    }


def notes_on_size(num: int, heldout: int) -> list[str]:
    """A warning where the number of samples makes distances incomparable with the floor's."""
    notes = []
    if heldout < FEW:
        notes.append(f"{heldout} held-out images: too few for any of these numbers to say much; look at the pictures")
    if abs(num - heldout) > 0.02 * heldout:
        notes.append(
            f"{num} samples against {heldout} held-out images: Frechet distances and C2ST depend on both numbers, so "
            f"compare with other rows only at {heldout} samples (--num_samples={heldout})"
        )
    return notes


def notes_on_guidance(run) -> list[str]:
    """Why there is no sweep over guidance, where a run with classes has none."""
    if can_guide(run) or not run.dataset.num_classes:
        return []
    return ["no guidance: the run was trained with config.label_dropout=0 and never learnt the null class"]


def stratified(dataset, num: int) -> np.ndarray:
    """`[num] int32` labels in a mixed order, each class as often as among the held-out images (largest remainders).

    All zeros for data without classes.
    """
    if not dataset.num_classes:
        return np.zeros(num, np.int32)
    found = np.array([int(item["label"]) for item in judges.read_items(dataset.heldout)])
    share = np.bincount(found, minlength=dataset.num_classes) / len(found) * num
    counts = np.floor(share).astype(int)
    counts[np.argsort(counts - share, kind="stable")[: num - counts.sum()]] += 1
    return np.random.default_rng(0).permutation(np.repeat(np.arange(dataset.num_classes), counts)).astype(np.int32)


def sampling_program(run, batch_size: int) -> Callable:
    """`(settings, seeds, labels, title) -> Samples`, which compiles a solver once for all lengths, scales and calls."""
    compiled: dict = {}

    def draw(settings: Settings, seeds, labels, title: str) -> Samples:
        # The longest of the sweep; a longer grid gets a length, and so a program, of its own.
        length = max(
            settings.steps, *(steps_for(settings.solver, nfe, run.schedule) for nfe in SWEEP.get(settings.solver, (1,)))
        )
        key = (settings.solver, length, settings.guidance != 1, settings.interval)
        if key not in compiled:
            compiled[key] = compile_program(run, settings)
        return draw_samples(
            run, settings, seeds, labels, batch_size=batch_size, show=title, program=compiled[key], length=length
        )

    return draw


def steps_for(solver: str, nfe: int, schedule) -> int:
    """The most steps of `solver` that take at most `nfe` network calls (at least one step)."""
    from diffjax.sampling import SOLVERS

    calls = registry.build(solver, SOLVERS, "solver", schedule=schedule).nfe
    return max([n for n in range(1, nfe + 1) if calls(n) <= nfe], default=1)


def sweeps(run, judge: Judge, draw: Callable, settings: Settings, main: Samples, known_rows, folder) -> dict:
    """`{"nfe": [...], "guidance": [...], ...}`: the scores of other solvers, lengths and scales, and their pictures.

    All of them use the seeds and labels of `main`.
    """
    plain = settings._replace(guidance=1.0)
    points = [(name, steps_for(name, nfe, run.schedule)) for name, all_nfe in SWEEP.items() for nfe in all_nfe]
    known = {} if settings != plain else {(settings.solver, settings.steps): main}
    rows = []
    for name, n in tqdm(points, desc="solvers", unit="setting", leave=False, disable=None):
        if (name, n) not in known:
            known[name, n] = draw(plain._replace(solver=name, steps=n), main.seeds, main.labels, "")
        samples = known[name, n]
        rows.append(
            {"solver": name, "steps": n, "nfe": samples.cost.evaluations, "seconds": samples.seconds}
            | judges.brief(judge, samples.images, main.labels)
        )
    found = {"nfe": rows, "few_step_ratio": few_step_ratio(rows, judge.headline)}
    curves = {name: [(row["nfe"], row[judge.headline]) for row in rows if row["solver"] == name] for name in SWEEP}
    lines = {name: row[judge.headline] for name, row in known_rows.items() if name in DRAWN}
    figure = viz.quality_curves(
        curves,
        floor=judge.floor,
        lines=lines,
        ylabel=f"{judge.heading} (low is good)",
        title="Sample quality against network evaluations, without guidance",
    )
    viz.save(figure, folder / "nfe.png")
    if can_guide(run):
        found["guidance"] = sweep_guidance(run, judge, draw, settings, main, known, folder)
    return found


def few_step_ratio(rows: list[dict], headline: str) -> float | None:
    """Distance of DPM++ 2M at 10 evaluations over that of Heun at 35: what the few steps cost."""
    value = {(row["solver"], row["nfe"]): row[headline] for row in rows}
    few, many = value.get(("dpmpp_2m()", 10)), value.get(("heun()", 35))
    return few / many if few is not None and many else None


def sweep_guidance(run, judge, draw, settings, main, known, folder) -> list[dict]:
    """The scores at every scale of `SCALES` with DPM++ 2M in few steps, and `guidance.png`."""
    base = settings._replace(solver="dpmpp_2m()", steps=GUIDANCE_STEPS, guidance=1.0)
    panels, rows = [], []
    for scale in tqdm(SCALES, desc="guidance", unit="scale", leave=False, disable=None):
        if scale == 1 and (base.solver, base.steps) in known:
            samples = known[base.solver, base.steps]
        elif scale == 0:
            # The null class everywhere: half the calls, and no class even outside the interval.
            nobody = np.full_like(main.labels, run.dataset.num_classes)
            samples = draw(base, main.seeds, nobody, "")._replace(labels=main.labels)
        else:
            samples = draw(base._replace(guidance=scale), main.seeds, main.labels, "")
        scores = judges.brief(judge, samples.images, main.labels)
        panels.append((scale, samples, scores))
        rows.append({"scale": scale, "nfe": samples.cost.evaluations} | scores)
    lo, hi = settings.interval
    where = "at every level" if (lo, hi) == (0, math.inf) else f"on sigma / alpha in ({lo:g}, {hi:g}]"
    reports.draw_guidance(
        folder,
        panels,
        num_classes=run.dataset.num_classes,
        max_value=largest_pixel(run.dataset),
        note=f"DPM++ 2M, {GUIDANCE_STEPS} steps, guidance {where}; numbers are over {len(main.labels)} samples.",
    )
    return rows


def pictures(folder: Path, run, settings: Settings, samples: Samples, judge: Judge, workdir) -> None:
    """`grid.png`, `neighbours.png`, `strip.png`, and `loss.png` where the run logged two losses or more."""
    shared = dict(num_classes=run.dataset.num_classes, max_value=largest_pixel(run.dataset))
    reports.draw_grid(folder, samples, note=describe(settings, samples.cost), **shared)
    reports.draw_neighbours(folder, samples, judge.train, judge.heldout, **shared)
    begin = grid(run, settings).at(slice(None, -1))
    # Latents are shown as what the data set makes of them.
    seen = lambda tiles: pixels_of(run.dataset, tiles) * (2 / shared["max_value"]) - 1
    show = None if samples.images.shape[1:] == tuple(run.dataset.shape) else seen
    viz.save(viz.denoising_strip(*samples.path, begin.alpha, begin.sigma, show=show), folder / "strip.png")
    log = Path(workdir) / "metrics.jsonl"
    metrics = viz.read_metrics(log) if log.exists() else {}
    if "loss" in metrics and len(metrics["loss"][0]) > 1:
        viz.save(viz.loss_curves(metrics), folder / "loss.png")


def save_samples(folder: Path, drawn: list[Samples], run) -> None:
    """`samples.npz`: the images of all repetitions as the data's integers, their labels, seeds and the split."""
    _, args, kwargs = registry.parse(run.config.data)
    split = kwargs.get("split_seed", args[0] if args and isinstance(args[0], int) else 0)
    np.savez_compressed(
        folder / "samples.npz",
        images=np.concatenate([s.images for s in drawn]),
        labels=np.concatenate([s.labels for s in drawn]),
        seeds=np.concatenate([s.seeds for s in drawn]),
        split_seed=split,
    )


def ours(settings: Settings, samples: Samples, scores: list[dict]) -> dict:
    """The rows of the model: its metrics, or with several seeds their mean and, in a second row, standard deviation."""
    name = f"ours: {settings.solver}, {samples.cost.evaluations} NFE"
    if len(scores) == 1:
        return {name: scores[0]}
    over = lambda f: {key: float(f([each[key] for each in scores])) for key in scores[0]}
    return {name: over(np.mean), f"  std of {len(scores)} seeds": over(lambda v: np.std(v, ddof=1))}


def named(baselines: Mapping[str, Mapping]) -> dict:
    """The rows of the baselines under names that a stranger understands, the floor first."""
    return {NAMES.get(key, key): row for key, row in baselines.items()}


def facts(run, settings: Settings, drawn: list[Samples], *, seed: int) -> dict:
    """What the numbers depend on: run, settings, cost, versions, device."""
    from importlib.metadata import version

    from diffjax import __version__

    text = json.dumps(run.config.to_dict(), sort_keys=True, default=str)
    packages = ("jax", "jaxlib", "flax", "numpy", "scipy", "scikit-learn")
    return {
        "data": run.config.data,
        "step": int(run.step),
        "ema": run.ema,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "num_samples": len(drawn[0].labels),
        "seeds": [seed + r for r in range(len(drawn))],
        "settings": settings._asdict(),
        "cost": drawn[0].cost._asdict(),
        "sampling_seconds": [round(samples.seconds, 3) for samples in drawn],
        "versions": {"diffjax": __version__, "python": platform.python_version(), **{p: version(p) for p in packages}},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpus": os.cpu_count(),
    }


def write_json(path: Path, report: dict) -> None:
    """Writes strict JSON in one move, so that a reader never sees half a report; infinities become strings."""

    def strict(value):
        if isinstance(value, Mapping):
            return {str(key): strict(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [strict(item) for item in value]
        if isinstance(value, np.generic):
            value = value.item()
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    files.write_text(path, json.dumps(strict(report), indent=1, allow_nan=False) + "\n")


def summary(report: dict, folder: Path) -> str:
    """The text for the terminal: the table, the distance in floors, what the samples cost, and where the rest is."""
    title = f"{report['num_samples']} samples of {report['data']}, compared with the held-out images"
    floor, metric = report["floor"], report["floor"]["metric"]
    value = next(iter(report["rows"].values()))[metric]
    spent, seconds = report["cost"], "".join(f"; {each:.1f} s for all" for each in report["sampling_seconds"][:1])
    lines = [
        reports.table(report["rows"], title=title, new=report["closer_if_new"]),
        *(f"note: {note}" for note in report["notes"]),
        f"{reports.SHOWN[metric][0]} is {value / floor['mean']:.2f} times the halves floor {floor['mean']:.3f} +- "
        f"{floor['std']:.3f}: the distance of two random halves of the real images, over ten halvings",
        "(the split floor in the table is one such halving, the one that the model was trained on)",
        f"{spent['steps']} steps, {spent['evaluations']} network evaluations per sample (NFE){seconds}",
    ]
    if "heldout" in report:
        found = report["heldout"]
        lines.append(f"denoising loss {found['loss']:.4f} on {found['images']} held-out images, log-SNR from -6 to 6")
    if report.get("few_step_ratio") is not None:
        lines.append(f"DPM++ 2M at 10 NFE has {report['few_step_ratio']:.2f} times the distance of Heun at 35 NFE")
    lines.append(f"report, samples and pictures: {folder} ({report['seconds']['all']:.0f} s)")
    return "\n".join(lines) + "\n"
