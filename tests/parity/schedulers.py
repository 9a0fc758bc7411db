"""Runs of diffusers' schedulers, written as small files that the tests read.

    .venv-oracle/bin/python tests/parity/schedulers.py --out tests/parity/golden      the committed cases
    .venv-oracle/bin/python tests/parity/schedulers.py --out FOLDER --seed 7 --count 40   random ones, 40 of each class

Each run is in the pipelines' order: scale_model_input, network, step. A file holds, for each case, its configuration,
the time steps, the start, every state and every noise draw in order. Needs torch and diffusers, not jax.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from unittest import mock

import numpy as np

SHAPE = (2, 3, 4, 2)
WEIGHTS = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32) * 0.7
TWO_STAGE = ("Heun", "KDPM2", "DPMSolverSDE")


def network(x, t, xp):
    """A smooth nonlinear function of the input [B, C, H, W] and of the time, the same in numpy, jax and torch."""
    mixed = xp.einsum("bchw,cd->bdhw", x, WEIGHTS if xp.__name__ != "torch" else xp.from_numpy(WEIGHTS).to(x.dtype))
    return 0.8 * xp.tanh(mixed + 0.5 * xp.sin(0.004 * t + 0.3)) + 0.3 * x * xp.cos(0.002 * t)


def variance(x, t, xp):
    """The second output of a network that learns its variance, in [-1, 1]."""
    return xp.tanh(0.5 * x - 0.1)


def ends(kind: str, config: dict, count: int) -> list[int]:
    """Which calls of `step`, of `count`, end a whole step."""
    if any(part in kind for part in TWO_STAGE):
        return [*range(1, count - 1, 2), count - 1]
    if kind == "PNDMScheduler":
        first = [3, 7, 11] if not config.get("skip_prk_steps") else [min(1, count - 1)]
        return first + list(range(first[-1] + 1, count))
    return list(range(count))


def _record(module, log, rng):
    """Replaces the module's noise by recorded draws of numpy."""
    import torch

    def draw(shape, *args, dtype=None, **kwargs):
        log.append(rng.normal(size=tuple(shape)).astype(np.float32))
        return torch.from_numpy(log[-1]).to(dtype or torch.float32)

    module.randn_tensor = draw

    class Brownian:
        def __init__(self, x, *args, **kwargs):
            self.shape = x.shape

        def __call__(self, *args):
            return draw(self.shape)

    if hasattr(module, "BrownianTreeNoiseSampler"):
        module.BrownianTreeNoiseSampler = Brownian


@contextlib.contextmanager
def _doubles():
    """Where torch is asked for float32, or is given an array of numpy's, it takes float64."""
    import torch

    wide = lambda a, take=torch.from_numpy: take(a.astype(np.float64) if a.dtype == np.float32 else a)
    with mock.patch.multiple(torch, float32=torch.float64, from_numpy=wide):
        yield


def _scheduler(config: dict, n: int, options: dict, jitter: int | None, wide: bool):
    """diffusers' scheduler with its time steps set, the options that are left for `step`, and its noise log."""
    import inspect
    import sys

    import diffusers
    import torch

    cls = getattr(diffusers, config["_class_name"])
    scheduler = cls(**{k: v for k, v in config.items() if k != "_class_name"})
    if config.get("rescale_betas_zero_snr") and jitter is not None:
        # The table went through torch's square root, whose last bit differs from machine to machine.
        bar = scheduler.alphas_cumprod
        side = torch.from_numpy(np.random.default_rng(jitter).integers(2, size=bar.shape))
        scheduler.alphas_cumprod = torch.where(bar > 2**-24, torch.nextafter(bar, side.to(bar.dtype)), bar)
    log: list[np.ndarray] = []
    _record(sys.modules[cls.__module__], log, np.random.default_rng(5))
    setting = {k: v for k, v in options.items() if k in inspect.signature(cls.set_timesteps).parameters}
    stepping = {k: v for k, v in options.items() if k not in setting}
    own = "timesteps" in setting or "sigmas" in setting
    with _doubles() if wide else contextlib.nullcontext():
        scheduler.set_timesteps(**setting) if own else scheduler.set_timesteps(n, **setting)
    if wide and isinstance(getattr(scheduler, "sigmas", None), torch.Tensor):
        scheduler.sigmas = scheduler.sigmas.double()
    return scheduler, stepping, log


def _grouped(log: list[np.ndarray], bounds: list[int]) -> np.ndarray:
    """Draws [n, j, B, C, H, W] of each whole step, zeros behind them."""
    width = max(b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True))
    noise = np.zeros((len(bounds) - 1, width, *SHAPE), np.float32)
    for i, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        for j in range(a, b):
            noise[i, j - a] = log[j]
    return noise


def run(config: dict, n: int, options: dict, *, jitter: int | None = None, wide: bool = False) -> dict:
    """Arrays of one run; `jitter` seeds relative errors of 6e-8 in the start and in the network's output, and `wide`
    computes what follows from the levels in float64, with the same draws."""
    import torch

    kind = config["_class_name"]
    scheduler, stepping, log = _scheduler(config, n, options, jitter, wide)
    shake = np.random.default_rng(jitter)
    off = lambda x: x * (1 + 6e-8 * torch.from_numpy(shake.normal(size=x.shape))).float() if jitter is not None else x
    x = torch.from_numpy(np.random.default_rng(3).normal(size=SHAPE).astype(np.float32))
    x = off(x * getattr(scheduler, "init_noise_sigma", 1.0))
    steps = scheduler.timesteps
    out = {"x": x.numpy(), "timesteps": steps.numpy().astype(np.float64)}
    if isinstance(getattr(scheduler, "sigmas", None), torch.Tensor):
        out["sigmas"] = scheduler.sigmas.numpy()
    x = x.double() if wide else x
    states, counts = [], []
    for i, t in enumerate(steps):
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        y = off(network(x_in, t.to(torch.float32), torch))
        if config.get("variance_type") in ("learned", "learned_range"):
            y = torch.cat([y, variance(x_in, t, torch)], dim=1)
        if kind == "UnCLIPScheduler":
            stepping["prev_timestep"] = steps[i + 1] if i + 1 < len(steps) else None
        x = scheduler.step(y, t, x, **stepping).prev_sample
        states.append(x.numpy())
        counts.append(len(log))
    last = ends(kind, config, len(states))
    out["states"] = np.stack([states[i] for i in last]).astype(np.float32)
    return out | {"noise": _grouped(log, [0, *(counts[i] for i in last)])}


def spread(config: dict, n: int, options: dict, states: np.ndarray) -> np.ndarray:
    """What rounding alone changes in the states, relative to their rms [n]: the scheduler's own precision."""
    other = [run(config, n, options, **how)["states"] for how in ({"jitter": 1}, {"jitter": 2}, {"wide": True})]
    rms = lambda a: np.sqrt(np.mean(a.astype(np.float64) ** 2, axis=tuple(range(1, a.ndim))))
    return np.max([rms(o - states) for o in other], axis=0) / rms(states)


def record(cases, path: Path) -> None:
    """Runs the cases and writes them to one file; a case that diffusers fails on keeps its error."""
    arrays, listed = {}, []
    for i, (config, n, options) in enumerate(cases):
        entry = {"config": config, "n": n, "options": options}
        try:
            out = run(config, n, options)
            out["spread"] = spread(config, n, options, out["states"])
            arrays |= {f"{i}/{k}": v for k, v in out.items()}
            entry["finite"] = bool(np.isfinite(out["states"]).all())
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {error}"
        listed.append(entry)
    arrays["cases"] = np.array(json.dumps(listed))
    np.savez_compressed(path, **arrays)


def main() -> None:
    from scheduler_cases import DRAWS, FIXED, random_case

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--kind", default="")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.seed is None:
        record(FIXED, args.out / "schedulers.npz")
        return
    for kind in DRAWS:
        if args.kind in kind:
            seeds = range(args.seed * 100_000, args.seed * 100_000 + args.count)
            record([random_case(kind, seed) for seed in seeds], args.out / f"{kind}.npz")


if __name__ == "__main__":
    main()
