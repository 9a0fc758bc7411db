"""From a trained run to a compiled sampler: guidance where it acts, fixed batches, one key per sample, exact costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import core, registry
from diffjax.core.types import Denoiser, Level, Solver
from diffjax.data.latents import LatentPixels
from diffjax.guidance import cfg, clip_x0, interval
from diffjax.sampling import SOLVERS, check_grid, prior, sample, self_conditioned
from diffjax.train import parts

# What a sample's key is folded with for its start and for the solver's noise: one seed, two independent streams.
_START, _STEPS = 0, 1


class Settings(NamedTuple):
    """How samples are drawn, as plain values; the same keys as `config.sample`.

    Attributes:
      solver: spec, such as `"dpmpp_2m()"`.
      steps: steps of the solver; the number of network calls follows from it and the solver.
      spacing: spec of the grid, such as `"karras(s_max=40.0)"`.
      guidance: scale of classifier-free guidance; 1 is the plain conditional model, 0 the unconditional one.
      interval: `(lo, hi)` of `sigma / alpha` between which guidance acts; outside it the conditional model runs alone.
    """

    solver: str = "dpmpp_2m()"
    steps: int = 20
    spacing: str = "karras(s_max=40.0)"
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)


class Cost(NamedTuple):
    """What one sample costs.

    Attributes:
      steps: steps of the solver that move.
      calls: times the network runs; a guided call is one run on a doubled batch.
      evaluations: network evaluations per sample (NFE): a guided call counts twice.
    """

    steps: int
    calls: int
    evaluations: int


def settings_of(defaults: Mapping | Settings, **overrides) -> Settings:
    """`defaults` (a run's `config.sample`) with every override that is not None in place of its value.

    Raises:
      ValueError: for a guidance scale that is not finite or an interval that is not two numbers `0 <= lo < hi`.
    """
    values = dict(defaults._asdict() if isinstance(defaults, Settings) else defaults)
    values |= {name: value for name, value in overrides.items() if value is not None}
    chosen = Settings(**{name: values[name] for name in Settings._fields if name in values})
    if np.shape(chosen.interval) != (2,):
        given = chosen.interval
        raise ValueError(f"interval={given}: expected two levels of sigma / alpha, lo and hi, such as 0.1,3.0 or 0,inf")
    lo, hi = (float(end) for end in chosen.interval)
    if not math.isfinite(chosen.guidance):
        raise ValueError(f"guidance={chosen.guidance}: expected a finite scale; 1 turns guidance off")
    if not 0 <= lo < hi:
        raise ValueError(f"interval={chosen.interval}: expected 0 <= lo < hi, levels of sigma / alpha")
    return chosen._replace(interval=(lo, hi), guidance=float(chosen.guidance), steps=int(chosen.steps))


def settings_for(run, **overrides) -> Settings:
    """`settings_of` the run's `config.sample`, refused where the run cannot be guided.

    Raises:
      ValueError: as `settings_of` and `check_guidance`.
    """
    settings = settings_of(run.config.sample, **overrides)
    check_guidance(run, settings)
    return settings


def check_guidance(run, settings: Settings) -> None:
    """Refuses guidance of a network that has not learnt both halves of it, with a class and without.

    Raises:
      ValueError: for a scale other than 1 if the data has no classes or no label was dropped in training.
    """
    if settings.guidance == 1:
        return
    given, cure = f"guidance={settings.guidance:g}", "; only guidance=1, the plain model, is possible here: set that"
    if not run.dataset.num_classes:
        raise ValueError(f"{given}: the model has no classes to be guided to{cure}")
    if not can_guide(run):
        raise ValueError(
            f"{given}: the run was trained with config.label_dropout=0, so the network never learnt the null class"
            f"{cure}, or train with config.label_dropout=0.1"
        )


def can_guide(run) -> bool:
    """Whether the run's network has learnt to work with a class and without one."""
    return bool(run.dataset.num_classes) and run.config.label_dropout > 0


def grid(run, settings: Settings, *, length: int | None = None) -> Level:
    """The run's grid for `settings`, `[steps + 1]` float64; padded to `length` steps with its last level.

    `sample` skips a step between equal levels, so grids padded to one length share one compiled sampler.

    Raises:
      ValueError: for an unknown spacing, one that returns no grid of that many steps from noise to data, a grid on
        which the run's head is undefined, or `length < steps`.
    """
    levels = parts.grid(settings.spacing, run.schedule, settings.steps)
    if not isinstance(levels, Level):
        kind = type(levels).__name__
        raise ValueError(f"spacing {settings.spacing!r} returned a {kind}; expected a Level of arrays [steps + 1]")
    levels, _ = check_grid(levels)
    if len(levels.t) != settings.steps + 1:
        raise ValueError(
            f"spacing {settings.spacing!r} returned {len(levels.t)} levels for steps={settings.steps}; expected "
            f"{settings.steps + 1}: set steps={len(levels.t) - 1}, or let the spacing follow its argument"
        )
    run.head.check(levels.at(slice(None, -1)))
    return levels if length is None else pad(levels, length)


def pad(levels: Level, length: int) -> Level:
    """The grid with its last level repeated until it has `length` steps.

    Raises:
      ValueError: if it has more steps than that.
    """
    steps = len(levels.t) - 1
    if steps > length:
        raise ValueError(f"a grid of {steps} steps cannot be padded to {length}")
    return Level(*(np.concatenate([field, np.repeat(field[-1:], length - steps)]) for field in levels))


def guided_denoiser(run, apply: Callable, labels, settings: Settings, *, scale=None) -> Denoiser:
    """The denoiser that sampling calls: conditional, guided inside the interval, x0 clipped to the range of images.

    Latents have no range and are not clipped.

    Args:
      run: `head` and `dataset` of it are read.
      apply: `(x, t, y) -> out`, the network with its parameters closed over; guidance calls it on twice the batch.
      labels: `[B] int32`, or None for a model without classes.
      settings: `guidance` and `interval` are read.
      scale: in place of `settings.guidance`; may be traced.
    """
    network = lambda y: core.denoiser(lambda x, t: apply(x, t, y), run.head)
    clip = (lambda denoise: denoise) if isinstance(getattr(run.dataset, "to_pixels", None), LatentPixels) else clip_x0
    plain = network(labels)
    if labels is None or (scale is None and settings.guidance == 1):
        return clip(plain)
    null = jnp.full_like(labels, run.dataset.num_classes)
    pair = network(jnp.concatenate([labels, null]))
    guided = cfg(pair, settings.guidance if scale is None else scale)
    lo, hi = settings.interval
    return clip(guided if (lo, hi) == (0, math.inf) else interval(guided, plain, lo, hi))


def compile_sampler(run, settings: Settings, *, guided: bool | None = None, trace: Callable | None = None) -> Callable:
    """`(params, keys [B], labels [B], levels, scale) -> x0 [B, H, W, C]`, jitted; with `trace`, `-> (x0, traced)`.

    Grid and scale are arguments: a sweep over grids of one length or over scales compiles once per solver. Every sample
    draws from its own key alone. `levels` should come from `grid`, which checks it.

    Args:
      run: what `load_run` returned.
      settings: `solver` and `interval` are compiled in, `guidance` only decides whether there is any.
      guided: whether to compile guidance; default `settings.guidance != 1`. A model without classes never has it.
      trace: as for `diffjax.sampling.sample`.
    """
    solver = registry.build(settings.solver, SOLVERS, "solver", schedule=run.schedule)
    if run.model.config.get("self_condition"):
        solver = self_conditioned(solver)
    guided = settings.guidance != 1 if guided is None else guided

    def draw(params, keys, labels, levels, scale):
        fold = lambda stream: jax.vmap(lambda key: jax.random.fold_in(key, stream))(keys)
        x = prior(fold(_START), (len(keys), *run.dataset.shape), levels)
        labels = labels if run.dataset.num_classes else None

        def denoise(x, level, *estimate):
            # Guidance doubles the batch that the network sees, and so what the network is given beside it.
            twice = lambda e, x: jnp.tile(e, (len(x) // len(e), 1, 1, 1))
            beside = lambda x: {"estimate": twice(estimate[0], x)} if estimate else {}
            apply = lambda x, t, y: run.model.apply(params, x, t, y, **beside(x))
            plain = settings._replace(guidance=1.0)
            return guided_denoiser(run, apply, labels, plain, scale=scale if guided else None)(x, level)

        return sample(solver, denoise, x, levels, fold(_STEPS), trace=trace)

    return jax.jit(draw)


def make_sampler(
    run,
    *,
    solver: str = "dpmpp_2m()",
    steps: int = 20,
    spacing: str = "karras(s_max=40.0)",
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, math.inf),
    trace: Callable | None = None,
) -> Callable:
    """`(params, keys [B], labels [B]) -> x0 [B, H, W, C] float32` in `[-1, 1]`, compiled once for each batch size.

    The noise of a key is bit for bit the same alone and in any batch. With `trace`, `(x0, traced)` comes back, as from
    `diffjax.sampling.sample`.

    Args:
      run: what `load_run` returned: schedule, head, dataset and model are read, for guidance the config too.
      solver: spec, such as `"heun()"`.
      steps: of the solver.
      spacing: spec of the grid.
      guidance: scale; 1 turns it off and halves the cost.
      interval: `(lo, hi)` of `sigma / alpha` between which guidance acts.
      trace: `StepInfo -> pytree`.

    Raises:
      ValueError: for unknown names, arguments that they do not take, a grid on which the head is undefined, or
        guidance of a run that has learnt none.
    """
    settings = settings_of(Settings(solver, steps, spacing, guidance, interval))
    check_guidance(run, settings)
    levels, draw = grid(run, settings), compile_sampler(run, settings, trace=trace)
    return lambda params, keys, labels: draw(params, keys, labels, levels, settings.guidance)


def compile_counter(run, settings: Settings, *, guided: bool | None = None) -> Callable[[Level], Cost]:
    """`levels -> Cost` of one sample, counted: the sampler runs on one value with a network that counts its calls.

    Nothing is assumed about the solver. Where guidance acts, and steps that are skipped, are counted as they happen.
    Grids of one length share one compilation.
    """
    sizes: list[int] = []
    guided = settings.guidance != 1 if guided is None else guided
    solver: Solver = registry.build(settings.solver, SOLVERS, "solver", schedule=run.schedule)
    labels = jnp.zeros(1, jnp.int32) if run.dataset.num_classes else None

    def counting(x, t, y):
        # Of the level, so that no compiler hoists the call out of the loop.
        jax.debug.callback(lambda _: sizes.append(len(x)), t)
        return (x, x) if run.model.config.get("variance") else x

    denoise = guided_denoiser(run, counting, labels, settings._replace(guidance=2.0 if guided else 1.0))
    walk = jax.jit(lambda levels: sample(solver, denoise, jnp.ones((1, 1)), levels, jax.random.key(0)))

    def count(levels):
        sizes.clear()
        jax.block_until_ready(walk(levels))
        jax.effects_barrier()
        moving = np.diff(levels.alpha).astype(bool) | np.diff(levels.sigma).astype(bool)
        return Cost(int(moving.sum()), len(sizes), sum(sizes))

    return count


def cost(run, settings: Settings, *, length: int | None = None) -> Cost:
    """The exact cost of one sample, counted as in `compile_counter`; padding to `length` steps does not change it."""
    return compile_counter(run, settings)(grid(run, settings, length=length))


def keys_of(seeds) -> jax.Array:
    """One typed key per seed, `[N]`; the key of a seed is `jax.random.key(seed)`.

    Raises:
      ValueError: for a seed that does not fit in 32 bits.
    """
    seeds = np.asarray(seeds)
    if seeds.size and not (0 <= seeds.min() and seeds.max() < 2**32):
        raise ValueError(f"seeds from {seeds.min()} to {seeds.max()}: expected integers in [0, 2**32)")
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def in_batches(
    draw: Callable, seeds, labels, *, batch_size: int = 128, progress: Callable[[Iterable], Iterable] = iter
) -> Any:
    """`draw(keys [B], labels [B])` for every seed, the pytrees joined along their first axis as numpy `[N, ...]`.

    Every call has `batch_size` samples, the last one padded with copies that are dropped, so nothing is compiled twice.

    Args:
      draw: a sampler with its parameters closed over.
      seeds: `[N]` integers.
      labels: `[N]` integers.
      batch_size: samples in a call.
      progress: wraps the iterable of batches, such as `tqdm.tqdm`.

    Raises:
      ValueError: for a batch size below 1, or seeds that do not fit in 32 bits.
      FloatingPointError: if a sample is infinite or not a number.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1")
    keys, labels = keys_of(seeds), np.asarray(labels, np.int32)
    count, parts = len(labels), []
    for start in progress(range(0, count, batch_size)):
        index = np.minimum(np.arange(start, start + batch_size), count - 1)
        out = draw(keys[index], jnp.asarray(labels[index]))
        kept = min(batch_size, count - start)
        parts.append(jax.tree.map(lambda a, kept=kept: np.asarray(a)[:kept], out))
        check_finite(parts[-1], start)
    return jax.tree.map(lambda *a: np.concatenate(a), *parts)


def check_finite(samples, start: int = 0) -> None:
    """Refuses samples that are no images; `start` is the index of the first of them.

    Raises:
      FloatingPointError: if a value is infinite or not a number.
    """
    for leaf in jax.tree.leaves(samples):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        bad = ~np.isfinite(leaf).reshape(len(leaf), -1).all(1)
        if bad.any():
            raise FloatingPointError(
                f"{bad.sum()} of {len(leaf)} samples, the first of them number {start + int(bad.argmax())}, are not "
                "finite; try another solver or spacing, more steps, less guidance, or an earlier checkpoint"
            )
