"""Samplers from diffusers' scheduler files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.convert import dpm, flow, karras, pndm, sa, vp
from diffjax.convert.options import read_options, read_step_options
from diffjax.convert.tables import check_finite
from diffjax.core.types import Head, Level, Solver

_FILE = "scheduler_config.json"

READERS = {
    "CMStochasticIterativeScheduler": karras.consistency,
    "DDIMInverseScheduler": vp.ddim_inverse,
    "DDIMScheduler": vp.ddim,
    "DDPMScheduler": vp.ddpm,
    "DEISMultistepScheduler": dpm.deis,
    "DPMSolverMultistepScheduler": dpm.dpm_multistep,
    "DPMSolverSDEScheduler": karras.dpm_sde,
    "DPMSolverSinglestepScheduler": dpm.dpm_singlestep,
    "EDMDPMSolverMultistepScheduler": dpm.edm_dpm,
    "EDMEulerScheduler": karras.edm_euler,
    "EulerAncestralDiscreteScheduler": karras.euler_ancestral,
    "EulerDiscreteScheduler": karras.euler,
    "FlowMatchEulerDiscreteScheduler": flow.flow_euler,
    "FlowMatchHeunDiscreteScheduler": flow.flow_heun,
    "HeunDiscreteScheduler": karras.heun,
    "IPNDMScheduler": vp.ipndm,
    "KDPM2AncestralDiscreteScheduler": karras.dpm2_ancestral,
    "KDPM2DiscreteScheduler": karras.dpm2,
    "LCMScheduler": vp.lcm,
    "LMSDiscreteScheduler": karras.lms,
    "PNDMScheduler": pndm.pndm,
    "SASolverScheduler": sa.sa_solver,
    "TCDScheduler": vp.tcd,
    "UnCLIPScheduler": vp.unclip,
    "UniPCMultistepScheduler": dpm.unipc,
}


def _load(path: str | os.PathLike) -> dict:
    """The dict in a scheduler file, given the file, its folder, or the folder of a whole pipeline.

    Raises:
      ValueError: for what is no JSON object.
      FileNotFoundError: if there is no file.
    """
    path = Path(path)
    tried = [path] if path.is_file() else [path / _FILE, path / "scheduler" / _FILE]
    for file in tried:
        if file.is_file():
            try:
                config = json.loads(file.read_text("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}: no JSON: {str(error)[:200]}") from None
            if not isinstance(config, dict):
                raise ValueError(f"{file}: expected a JSON object with _class_name, got a {type(config).__name__}")
            return config
    raise FileNotFoundError(f"no scheduler file at {', '.join(map(str, tried))}")


def scheduler(config: dict | str | os.PathLike, n: int, **step_options: Any) -> tuple[Solver, Level, Head]:
    """The sampler of a diffusers scheduler: `(solver, levels, head)` whose states are that scheduler's own.

    Drive them as `sample(solver, denoiser(f, head), x, levels, key)`: `f(x, t)` is the raw network, `x` in it is scaled
    as `scale_model_input` does and `t` [B] are the scheduler's own time steps. The state after step i is what the
    scheduler's `step` returns, in its coordinates; `x` given to `sample` is what its pipeline starts from, unit noise
    times `start_scale(config, levels)`.

    Schedulers of two stages (Heun, DPM-2, PNDM's first steps) call `step` more than n times; here each of the n steps
    is a whole one. Draw j of step i is the j-th noise that the scheduler draws in it, so that
    `sample(..., noise=lambda i, j: ...)` replays a run. With `variance_type` "learned" or "learned_range" the network
    returns `(out, variance)`, the two halves of its channels, where diffusers takes them in one array; with the DPM
    solvers too, which drop the second.

    Coefficients are computed as diffusers 0.42.1 does, in float32 where it does, and belong to these levels: a grid of
    another length is an error. Third-order DPM-Solver++ and the others are the published formulas.

    Args:
      config: contents of `scheduler_config.json` with `_class_name`, or the path of the file or of its folder. What it
        leaves out has diffusers' default.
      n: number of inference steps.
      **step_options: keyword arguments of the class's `step` and `set_timesteps`: `eta`, `use_clipped_model_output`,
        `s_churn`, `s_tmin`, `s_tmax`, `s_noise`, `order`, `mu`, `timesteps`, `sigmas`, `original_inference_steps`.

    Raises:
      ValueError: for an unknown class or option, a value that is not supported, an n for which the scheduler has no
        grid, a configuration for which diffusers itself returns NaN, or a file that is no JSON object.
      FileNotFoundError: if there is no file at the path.
    """
    if not isinstance(n, (int, np.integer)) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n: expected a whole number of steps >= 1, got {n!r}")
    config = config if isinstance(config, dict) else _load(config)
    kind, options = read_options(config)
    with np.errstate(all="ignore"):
        solver, levels, head = READERS[kind](options, int(n), read_step_options(kind, step_options))
    check_finite(tuple(levels), f"{kind} with n={n}")
    check_finite(solver.init(np.zeros(1, np.float32), levels)[1], f"{kind} with n={n}")
    noise = np.arctan2(levels.sigma, levels.alpha)
    return solver._replace(ascending=bool(np.any(np.diff(noise) > 0))), levels, head


_KARRAS = ("EulerDiscrete", "EulerAncestral", "HeunDiscrete", "LMSDiscrete", "KDPM2", "DPMSolverSDE")


def start_scale(config: dict | str | os.PathLike, levels: Level) -> float:
    """What a pipeline multiplies unit noise by to start, `init_noise_sigma`: `x = start_scale(config, levels) * noise`.

    1 for the schedulers whose state is variance-preserving or a flow. Those whose state is `x0 + sigma eps` start at
    their largest sigma, or at `sqrt(sigma^2 + 1)` with `timestep_spacing="leading"` and with EDM's preconditioning.

    Args:
      config: as in `scheduler`.
      levels: the grid that `scheduler` returned for it.

    Raises:
      ValueError: as `scheduler` does for the configuration.
    """
    kind, options = read_options(config if isinstance(config, dict) else _load(config))
    if kind.startswith("EDM"):
        return float((options.sigma_max**2 + 1) ** 0.5)
    if kind == "CMStochasticIterativeScheduler":
        return float(options.sigma_max)
    if not kind.startswith(_KARRAS):
        return 1.0
    largest = float(np.max(levels.sigma))
    return largest if options.timestep_spacing in ("linspace", "trailing") else (largest**2 + 1) ** 0.5
