"""Runs of diffusers' schedulers, written as small files that the tests read.

    .venv-oracle/bin/python tests/parity/schedulers.py --out tests/parity/golden      the committed cases
    .venv-oracle/bin/python tests/parity/schedulers.py --out FOLDER --seed 7 --count 40   random ones, 40 of each class

Each run is in the pipelines' order: scale_model_input, network, step. A file holds, for each case, its configuration,
the time steps, the start, every state and every noise draw in order. Needs torch and diffusers, not jax.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

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


# (class without "Scheduler", steps, configuration, step options); each option of each class occurs.
_FIXED = [
    ("DDPM", 10, {}, {}),
    ("DDPM", 5, {"variance_type": "fixed_large", "prediction_type": "v_prediction", "steps_offset": 1}, {}),
    (
        "DDPM",
        5,
        {"variance_type": "fixed_small_log", "beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 0.5},
        {},
    ),
    ("DDPM", 5, {"variance_type": "learned_range", "timestep_spacing": "trailing", "clip_sample": False}, {}),
    ("DDPM", 2, {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}, {}),
    ("DDPM", 4, {"beta_schedule": "sigmoid", "prediction_type": "sample"}, {"timesteps": [900, 500, 40, 0]}),
    ("DDPM", 5, {"beta_schedule": "laplace", "timestep_spacing": "linspace"}, {}),
    ("DDIM", 10, {}, {}),
    ("DDIM", 25, {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False}, {}),
    ("DDIM", 5, {"timestep_spacing": "linspace", "clip_sample_range": 0.5}, {"eta": 1.0}),
    (
        "DDIM",
        5,
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {},
    ),
    ("DDIM", 5, {"thresholding": True, "sample_max_value": 2.0}, {"eta": 0.5, "use_clipped_model_output": True}),
    ("DDIM", 1, {"prediction_type": "sample", "steps_offset": 1}, {}),
    ("DDIM", 5, {"set_alpha_to_one": False, "beta_start": 0.001, "beta_end": 0.03, "num_train_timesteps": 500}, {}),
    ("DDIMInverse", 10, {"clip_sample": False}, {}),
    (
        "DDIMInverse",
        5,
        {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "set_alpha_to_one": False},
        {},
    ),
    ("DDIMInverse", 5, {"steps_offset": 1, "clip_sample_range": 2.0}, {}),
    ("EulerDiscrete", 10, {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1}, {}),
    (
        "EulerDiscrete",
        5,
        {"use_karras_sigmas": True, "prediction_type": "v_prediction"},
        {"s_churn": 2.0, "s_noise": 1.003},
    ),
    (
        "EulerDiscrete",
        5,
        {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"},
        {"s_churn": 1.0, "s_tmin": 0.5},
    ),
    ("EulerDiscrete", 5, {"use_beta_sigmas": True, "prediction_type": "sample", "sigma_max": 20.0}, {"s_churn": 1.0}),
    ("EulerDiscrete", 5, {"interpolation_type": "log_linear", "timestep_spacing": "trailing"}, {"s_tmax": 9.0}),
    ("EulerDiscrete", 5, {"timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_min": 0.1}, {}),
    ("EulerDiscrete", 3, {}, {"timesteps": [999, 400, 30]}),
    ("EulerDiscrete", 3, {}, {"sigmas": [12.0, 3.0, 0.2, 0.0]}),
    ("EulerDiscrete", 1, {"num_train_timesteps": 1100}, {}),
    ("EulerAncestralDiscrete", 10, {"beta_schedule": "scaled_linear"}, {}),
    (
        "EulerAncestralDiscrete",
        5,
        {"prediction_type": "v_prediction", "timestep_spacing": "leading", "steps_offset": 1},
        {},
    ),
    ("DPMSolverMultistep", 10, {}, {}),
    ("DPMSolverMultistep", 25, {"use_karras_sigmas": True, "solver_order": 3}, {}),
    (
        "DPMSolverMultistep",
        5,
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "euler_at_final": True},
        {},
    ),
    ("DPMSolverMultistep", 20, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun"}, {}),
    ("DPMSolverMultistep", 5, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "solver_order": 2}, {}),
    (
        "DPMSolverMultistep",
        5,
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "prediction_type": "sample"},
        {},
    ),
    (
        "DPMSolverMultistep",
        10,
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
        {},
    ),
    (
        "DPMSolverMultistep",
        5,
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_type": "heun", "thresholding": True},
        {},
    ),
    ("DPMSolverMultistep", 5, {"use_lu_lambdas": True, "solver_type": "heun", "lower_order_final": False}, {}),
    ("DPMSolverMultistep", 5, {"use_exponential_sigmas": True, "prediction_type": "v_prediction"}, {}),
    ("DPMSolverMultistep", 5, {"use_beta_sigmas": True, "thresholding": True, "sample_max_value": 1.5}, {}),
    ("DPMSolverMultistep", 5, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}, {}),
    (
        "DPMSolverMultistep",
        5,
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True},
        {"mu": 0.7},
    ),
    ("DPMSolverMultistep", 5, {"lambda_min_clipped": -3.0, "beta_schedule": "squaredcos_cap_v2"}, {}),
    ("DPMSolverMultistep", 5, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "solver_order": 1}, {}),
    ("DPMSolverMultistep", 5, {"timestep_spacing": "leading", "steps_offset": 1, "variance_type": "learned_range"}, {}),
    ("DPMSolverMultistep", 3, {}, {"timesteps": [999, 500, 100]}),
    ("FlowMatchEulerDiscrete", 10, {"shift": 3.0}, {}),
    ("FlowMatchEulerDiscrete", 5, {"use_dynamic_shifting": True}, {"mu": 0.9}),
    ("FlowMatchEulerDiscrete", 5, {"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 1.5}),
    ("FlowMatchEulerDiscrete", 5, {"shift_terminal": 0.1}, {}),
    ("FlowMatchEulerDiscrete", 5, {"invert_sigmas": True, "shift": 2.0}, {}),
    ("FlowMatchEulerDiscrete", 5, {"stochastic_sampling": True}, {}),
    ("FlowMatchEulerDiscrete", 5, {"use_karras_sigmas": True}, {}),
    ("FlowMatchEulerDiscrete", 5, {"use_exponential_sigmas": True, "num_train_timesteps": 500}, {}),
    ("FlowMatchEulerDiscrete", 5, {"use_beta_sigmas": True}, {}),
    ("FlowMatchEulerDiscrete", 3, {"shift": 3.0}, {"sigmas": [1.0, 0.6, 0.2]}),
    ("HeunDiscrete", 5, {"use_karras_sigmas": True}, {}),
    ("HeunDiscrete", 5, {"clip_sample": True, "clip_sample_range": 2.0, "prediction_type": "sample"}, {}),
    ("HeunDiscrete", 10, {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}, {}),
    ("HeunDiscrete", 1, {"timestep_spacing": "leading", "steps_offset": 1}, {}),
    ("UniPCMultistep", 10, {}, {}),
    ("UniPCMultistep", 10, {"solver_order": 3, "final_sigmas_type": "sigma_min", "lower_order_final": False}, {}),
    ("UniPCMultistep", 5, {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, {}),
    (
        "UniPCMultistep",
        5,
        {"predict_x0": False, "final_sigmas_type": "sigma_min", "prediction_type": "v_prediction"},
        {},
    ),
    ("UniPCMultistep", 5, {"disable_corrector": [0, 1], "use_karras_sigmas": True, "sigma_min": 0.05}, {}),
    ("UniPCMultistep", 5, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}, {}),
    (
        "UniPCMultistep",
        5,
        {
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
            "use_karras_sigmas": True,
            "thresholding": True,
        },
        {},
    ),
    (
        "UniPCMultistep",
        5,
        {
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
            "use_dynamic_shifting": True,
            "shift_terminal": 0.1,
        },
        {"mu": 0.7},
    ),
    ("UniPCMultistep", 5, {"use_exponential_sigmas": True, "sigma_max": 20.0, "prediction_type": "sample"}, {}),
    ("PNDM", 10, {}, {}),
    ("PNDM", 10, {"skip_prk_steps": True, "beta_schedule": "scaled_linear", "steps_offset": 1}, {}),
    ("PNDM", 5, {"skip_prk_steps": True, "prediction_type": "v_prediction", "set_alpha_to_one": True}, {}),
    ("PNDM", 7, {"prediction_type": "v_prediction", "timestep_spacing": "linspace"}, {}),
    ("PNDM", 1, {"skip_prk_steps": True, "timestep_spacing": "trailing"}, {}),
    ("LMSDiscrete", 10, {}, {}),
    ("LMSDiscrete", 5, {"use_karras_sigmas": True, "prediction_type": "v_prediction"}, {"order": 2}),
    ("DPMSolverSinglestep", 10, {}, {}),
    ("DPMSolverSinglestep", 9, {"solver_order": 3, "final_sigmas_type": "sigma_min"}, {}),
    ("DPMSolverSinglestep", 7, {"solver_order": 3, "solver_type": "heun", "use_karras_sigmas": True}, {}),
    (
        "DPMSolverSinglestep",
        6,
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_type": "heun"},
        {},
    ),
    ("DPMSolverSinglestep", 8, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "lower_order_final": True}, {}),
    ("EDMEuler", 10, {}, {}),
    ("EDMEuler", 5, {"sigma_schedule": "exponential", "prediction_type": "v_prediction"}, {"s_churn": 2.0}),
    ("EDMEuler", 5, {"sigma_data": 1.0, "sigma_max": 20.0, "rho": 5.0, "final_sigmas_type": "sigma_min"}, {}),
    ("EDMDPMSolverMultistep", 10, {}, {}),
    ("EDMDPMSolverMultistep", 16, {"solver_order": 3, "sigma_schedule": "exponential"}, {}),
    ("EDMDPMSolverMultistep", 5, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, {}),
    ("LCM", 4, {}, {}),
    ("LCM", 1, {"clip_sample": True, "original_inference_steps": 100, "timestep_scaling": 5.0}, {}),
    ("LCM", 3, {"thresholding": True, "prediction_type": "v_prediction"}, {"timesteps": [999, 499, 19]}),
    ("TCD", 4, {}, {}),
    ("TCD", 5, {"prediction_type": "v_prediction"}, {"eta": 0.0}),
    ("TCD", 5, {"prediction_type": "sample"}, {"eta": 1.0}),
    ("CMStochasticIterative", 2, {}, {}),
    ("CMStochasticIterative", 3, {"s_noise": 0.9, "clip_denoised": False}, {"timesteps": [30, 20, 5]}),
    ("FlowMatchHeunDiscrete", 5, {"shift": 3.0}, {}),
    ("FlowMatchHeunDiscrete", 5, {}, {"s_churn": 1.0, "s_noise": 1.01}),
    ("DEISMultistep", 10, {"solver_order": 3}, {}),
    ("DEISMultistep", 5, {"use_karras_sigmas": True, "thresholding": True}, {}),
    ("DEISMultistep", 5, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, {}),
    ("KDPM2Discrete", 5, {}, {}),
    ("KDPM2Discrete", 5, {"use_karras_sigmas": True, "prediction_type": "v_prediction"}, {}),
    ("KDPM2AncestralDiscrete", 5, {}, {}),
    ("KDPM2AncestralDiscrete", 5, {"use_exponential_sigmas": True, "prediction_type": "v_prediction"}, {}),
    ("DPMSolverSDE", 5, {"use_karras_sigmas": True}, {"s_noise": 0.9}),
    ("DPMSolverSDE", 5, {"prediction_type": "v_prediction", "timestep_spacing": "leading", "steps_offset": 1}, {}),
    ("SASolver", 10, {}, {}),
    ("SASolver", 5, {"predictor_order": 1, "corrector_order": 3, "use_karras_sigmas": True}, {}),
    ("SASolver", 5, {"algorithm_type": "noise_prediction", "lower_order_final": False}, {}),
    ("IPNDM", 10, {}, {}),
    ("UnCLIP", 10, {}, {}),
    ("UnCLIP", 5, {"variance_type": "learned_range", "prediction_type": "sample", "clip_sample_range": 2.0}, {}),
]
FIXED = [({"_class_name": f"{kind}Scheduler", **config}, n, options) for kind, n, config, options in _FIXED]


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


def run(config: dict, n: int, options: dict, *, jitter: int | None = None) -> dict:
    """Arrays of one run; `jitter` seeds relative errors of 6e-8 in the start and in the network's output."""
    import inspect
    import sys

    import diffusers
    import torch

    kind = config["_class_name"]
    cls = getattr(diffusers, kind)
    scheduler = cls(**{k: v for k, v in config.items() if k != "_class_name"})
    log: list[np.ndarray] = []
    _record(sys.modules[cls.__module__], log, np.random.default_rng(5))
    setting = {k: v for k, v in options.items() if k in inspect.signature(cls.set_timesteps).parameters}
    stepping = {k: v for k, v in options.items() if k not in setting}
    if "timesteps" in setting or "sigmas" in setting:
        scheduler.set_timesteps(**setting)
    else:
        scheduler.set_timesteps(n, **setting)
    shake = np.random.default_rng(jitter)
    off = lambda x: x * (1 + 6e-8 * torch.from_numpy(shake.normal(size=x.shape))).float() if jitter is not None else x
    x = torch.from_numpy(np.random.default_rng(3).normal(size=SHAPE).astype(np.float32))
    x = off(x * getattr(scheduler, "init_noise_sigma", 1.0))
    out = {"x": x.numpy(), "timesteps": scheduler.timesteps.numpy().astype(np.float64)}
    if isinstance(getattr(scheduler, "sigmas", None), torch.Tensor):
        out["sigmas"] = scheduler.sigmas.numpy()
    states, counts = [], []
    steps = scheduler.timesteps
    for i, t in enumerate(steps):
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        y = off(network(x_in, t.to(torch.float32), torch))
        if config.get("variance_type") in ("learned", "learned_range"):
            y = torch.cat([y, variance(x_in, t, torch)], dim=1)
        if kind == "UnCLIPScheduler" and i + 1 < len(steps):
            stepping["prev_timestep"] = steps[i + 1]
        elif kind == "UnCLIPScheduler":
            stepping["prev_timestep"] = None
        x = scheduler.step(y, t, x, **stepping).prev_sample
        states.append(x.numpy())
        counts.append(len(log))
    last = ends(kind, config, len(states))
    out["states"] = np.stack([states[i] for i in last]).astype(np.float32)
    bounds = [0, *(counts[i] for i in last)]
    width = max(b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True))
    noise = np.zeros((len(last), width, *SHAPE), np.float32)
    for i, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        for j in range(a, b):
            noise[i, j - a] = log[j]
    out["noise"] = noise
    return out


def spread(config: dict, n: int, options: dict, states: np.ndarray) -> np.ndarray:
    """What rounding alone changes in the states, relative to their rms [n]: the scheduler's own precision."""
    other = [run(config, n, options, jitter=seed)["states"] for seed in (1, 2)]
    rms = lambda a: np.sqrt(np.mean(a.astype(np.float64) ** 2, axis=tuple(range(1, a.ndim))))
    return np.max([rms(o - states) for o in other], axis=0) / rms(states)


class Pick(random.Random):
    """Draws of options, seeded."""

    def maybe(self, options: dict, name: str, *values, chance: float = 0.5) -> None:
        if self.random() < chance:
            options[name] = self.choice(values)

    def respacing(self, c: dict, chance: float = 0.6) -> None:
        if self.random() < chance:
            c[self.choice(["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])] = True

    def betas(self, c: dict, *more: str) -> None:
        self.maybe(c, "num_train_timesteps", 1000, 500, 1100, 250, chance=0.3)
        self.maybe(c, "beta_schedule", "linear", "scaled_linear", "squaredcos_cap_v2", *more)
        if self.random() < 0.5:
            c["beta_start"], c["beta_end"] = self.choice([(1e-4, 0.02), (0.00085, 0.012), (1e-3, 0.03)])
        if self.random() < 0.1:
            total = c.get("num_train_timesteps", 1000)
            c["trained_betas"] = [float(b) for b in np.linspace(2e-4, 0.015, total)]

    def thresholds(self, c: dict) -> None:
        if self.random() < 0.3:
            c["thresholding"] = True
            self.maybe(c, "dynamic_thresholding_ratio", 0.9, 0.7)
            self.maybe(c, "sample_max_value", 1.5, 3.0)

    def spacing(self, c: dict) -> None:
        self.maybe(c, "timestep_spacing", "leading", "trailing", "linspace", chance=0.7)
        self.maybe(c, "steps_offset", 0, 1, chance=0.4)

    def churn(self, o: dict) -> None:
        if self.random() < 0.4:
            o["s_churn"] = self.choice([0.5, 2.0, 10.0])
            self.maybe(o, "s_noise", 1.003, 0.9)
            self.maybe(o, "s_tmin", 0.05, 0.4)
            self.maybe(o, "s_tmax", 5.0, 50.0)


def random_case(kind: str, seed: int) -> tuple[dict, int, dict]:
    """One random configuration of a class, its number of steps and its step options."""
    pick = Pick(f"{kind}{seed}")
    c: dict = {"_class_name": kind}
    o: dict = {}
    n = pick.choice([1, 2, 3, 4, 5, 6, 7, 9, 10, 12, 14, 15, 16, 20, 25, 30])
    DRAWS[kind](pick, c, o)
    if kind == "PNDMScheduler" and not c.get("skip_prk_steps"):
        n = max(n, 4)
    if kind == "UnCLIPScheduler":
        n = max(n, 2)
    return c, n, o


def _prediction(pick, c, *kinds):
    pick.maybe(c, "prediction_type", *(kinds or ("epsilon", "sample", "v_prediction")), chance=0.6)


def _ancestral(pick, c, o):
    pick.betas(c, *(("laplace", "sigmoid") if c["_class_name"] == "DDPMScheduler" else ()))
    pick.thresholds(c)
    pick.spacing(c)
    _prediction(pick, c)
    pick.maybe(c, "clip_sample", True, False)
    pick.maybe(c, "clip_sample_range", 0.5, 2.0, chance=0.3)
    pick.maybe(c, "rescale_betas_zero_snr", True, chance=0.15)
    if c["_class_name"] == "DDPMScheduler":
        kinds = ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"]
        pick.maybe(c, "variance_type", *kinds)
    else:
        pick.maybe(c, "set_alpha_to_one", True, False)
        pick.maybe(o, "eta", 0.3, 1.0)
        pick.maybe(o, "use_clipped_model_output", True)


def _ddim_inverse(pick, c, o):
    pick.betas(c)
    c["timestep_spacing"] = pick.choice(["leading", "trailing"])
    pick.maybe(c, "steps_offset", 0, 1)
    _prediction(pick, c, "epsilon", "v_prediction")
    pick.maybe(c, "clip_sample", True, False)
    pick.maybe(c, "clip_sample_range", 0.5, 2.0, chance=0.3)
    pick.maybe(c, "set_alpha_to_one", True, False)
    pick.maybe(c, "rescale_betas_zero_snr", True, chance=0.15)


def _euler(pick, c, o):
    pick.betas(c)
    pick.spacing(c)
    _prediction(pick, c)
    pick.maybe(c, "rescale_betas_zero_snr", True, chance=0.1)
    pick.maybe(c, "final_sigmas_type", "zero", "sigma_min")
    pick.respacing(c)
    pick.maybe(c, "interpolation_type", "log_linear", chance=0.25)
    pick.maybe(c, "timestep_type", "continuous", chance=0.3)
    pick.maybe(c, "sigma_min", 0.02, 0.1, chance=0.3)
    pick.maybe(c, "sigma_max", 10.0, 30.0, chance=0.3)
    pick.churn(o)


def _euler_ancestral(pick, c, o):
    pick.betas(c)
    pick.spacing(c)
    _prediction(pick, c, "epsilon", "v_prediction")
    pick.maybe(c, "rescale_betas_zero_snr", True, chance=0.1)


def _karras(pick, c, o):
    kind = c["_class_name"]
    pick.betas(c)
    pick.spacing(c)
    both = kind in ("HeunDiscreteScheduler", "LMSDiscreteScheduler")
    _prediction(pick, c, "epsilon", "v_prediction", *(("sample",) if both else ()))
    pick.respacing(c)
    if kind == "HeunDiscreteScheduler":
        pick.maybe(c, "clip_sample", True)
        pick.maybe(c, "clip_sample_range", 0.5, 2.0)
    if kind == "LMSDiscreteScheduler":
        pick.maybe(o, "order", 1, 2, 3, 4)
    if kind == "DPMSolverSDEScheduler":
        pick.maybe(o, "s_noise", 0.9)


def _exponential(pick, c, o):
    kind = c["_class_name"]
    pick.betas(c)
    pick.thresholds(c)
    pick.maybe(c, "solver_order", 1, 2, 3, chance=0.8)
    pick.maybe(c, "solver_type", "midpoint", "heun")
    pick.maybe(c, "lower_order_final", True, False)
    flow = pick.random() < 0.2
    _prediction(pick, c, "epsilon", "sample", "v_prediction", "flow_prediction")
    if flow:
        c["use_flow_sigmas"], c["prediction_type"] = True, "flow_prediction"
        pick.maybe(c, "flow_shift", 3.0, 0.7)
    else:
        pick.respacing(c)
    if flow and kind != "SASolverScheduler" and pick.random() < 0.4:
        c["use_dynamic_shifting"] = True
        o["mu"] = 0.8
    if kind != "DPMSolverSinglestepScheduler":
        pick.spacing(c)
    if kind.startswith("DPMSolver"):
        names = ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"]
        names = names[:-1] if kind == "DPMSolverSinglestepScheduler" else names
        pick.maybe(c, "algorithm_type", *names, chance=0.7)
        pick.maybe(c, "final_sigmas_type", "zero", "sigma_min")
        pick.maybe(c, "lambda_min_clipped", -5.1, -3.0, chance=0.2)
        if not c.get("algorithm_type", "++").endswith("++"):
            c["final_sigmas_type"] = "sigma_min"
            if c.get("prediction_type") == "flow_prediction":
                c["prediction_type"] = "v_prediction"
    if kind == "DPMSolverMultistepScheduler":
        pick.maybe(c, "euler_at_final", True, chance=0.3)
        pick.maybe(c, "rescale_betas_zero_snr", True, chance=0.1)
        if not flow and not any(k.endswith("_sigmas") for k in c):
            pick.maybe(c, "use_lu_lambdas", True, chance=0.3)
    if kind == "UniPCMultistepScheduler":
        pick.maybe(c, "solver_type", "bh1", "bh2")
        pick.maybe(c, "predict_x0", True, False)
        pick.maybe(c, "disable_corrector", [0], [0, 1], chance=0.3)
        pick.maybe(c, "final_sigmas_type", "sigma_min")
        pick.maybe(c, "rescale_betas_zero_snr", True, chance=0.1)
        pick.maybe(c, "sigma_min", 0.02, chance=0.2)
        pick.maybe(c, "sigma_max", 20.0, chance=0.2)
        if flow:
            pick.maybe(c, "shift_terminal", 0.1, chance=0.3)
            pick.maybe(c, "use_karras_sigmas", True, chance=0.3)
            pick.maybe(c, "time_shift_type", "linear", chance=0.3)
            c.pop("predict_x0", None)
        elif not c.get("predict_x0", True) and c.get("prediction_type") == "flow_prediction":
            c["prediction_type"] = "epsilon"
    if kind == "SASolverScheduler":
        c.pop("solver_order", None), c.pop("solver_type", None)
        pick.maybe(c, "predictor_order", 1, 2, 3)
        pick.maybe(c, "corrector_order", 1, 2, 3)
        pick.maybe(c, "algorithm_type", "noise_prediction", chance=0.3)
        if c.get("algorithm_type") == "noise_prediction":
            c.pop("thresholding", None)
            if c.get("prediction_type") == "flow_prediction":
                c["prediction_type"] = "v_prediction"


def _flow_euler(pick, c, o):
    pick.maybe(c, "num_train_timesteps", 500, 1000, chance=0.3)
    pick.maybe(c, "shift", 3.0, 0.5, 12.0)
    if pick.random() < 0.4:
        c["use_dynamic_shifting"] = True
        o["mu"] = pick.choice([0.5, 1.15])
        pick.maybe(c, "time_shift_type", "linear")
    pick.maybe(c, "shift_terminal", 0.1, 0.02, chance=0.3)
    pick.maybe(c, "invert_sigmas", True, chance=0.3)
    pick.maybe(c, "stochastic_sampling", True, chance=0.3)
    pick.respacing(c, 0.4)


def _pndm(pick, c, o):
    pick.betas(c)
    pick.spacing(c)
    _prediction(pick, c, "epsilon", "v_prediction")
    pick.maybe(c, "skip_prk_steps", True)
    pick.maybe(c, "set_alpha_to_one", True)


def _edm(pick, c, o):
    _prediction(pick, c, "epsilon", "v_prediction")
    pick.maybe(c, "sigma_min", 0.01, chance=0.3)
    pick.maybe(c, "sigma_max", 40.0, chance=0.3)
    pick.maybe(c, "sigma_data", 1.0, chance=0.3)
    pick.maybe(c, "rho", 5.0, chance=0.3)
    pick.maybe(c, "sigma_schedule", "exponential")
    pick.maybe(c, "final_sigmas_type", "sigma_min")
    if c["_class_name"] == "EDMEulerScheduler":
        pick.churn(o)
        return
    pick.thresholds(c)
    pick.maybe(c, "solver_order", 1, 2, 3)
    pick.maybe(c, "solver_type", "heun")
    pick.maybe(c, "lower_order_final", False)
    pick.maybe(c, "euler_at_final", True)
    pick.maybe(c, "algorithm_type", "sde-dpmsolver++")


def _distilled(pick, c, o):
    pick.betas(c)
    pick.thresholds(c)
    _prediction(pick, c)
    pick.maybe(c, "clip_sample", True)
    pick.maybe(c, "set_alpha_to_one", False)
    pick.maybe(c, "original_inference_steps", 40, 100)
    pick.maybe(c, "timestep_scaling", 5.0)
    if c["_class_name"] == "TCDScheduler":
        pick.maybe(o, "eta", 0.0, 0.5, 1.0)
        c.pop("thresholding", None)


def _consistency(pick, c, o):
    pick.maybe(c, "sigma_max", 40.0)
    pick.maybe(c, "s_noise", 0.9)
    pick.maybe(c, "rho", 5.0)
    pick.maybe(c, "sigma_data", 1.0)
    pick.maybe(c, "clip_denoised", False)
    pick.maybe(c, "num_train_timesteps", 150)


def _flow_heun(pick, c, o):
    pick.maybe(c, "shift", 3.0, 0.5)
    pick.churn(o)


def _ipndm(pick, c, o):
    pass


def _unclip(pick, c, o):
    _prediction(pick, c, "epsilon", "sample")
    pick.maybe(c, "clip_sample", False)
    pick.maybe(c, "clip_sample_range", 2.0)
    pick.maybe(c, "variance_type", "learned_range")


DRAWS = {
    "DDPMScheduler": _ancestral,
    "DDIMScheduler": _ancestral,
    "DDIMInverseScheduler": _ddim_inverse,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "DPMSolverMultistepScheduler": _exponential,
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
    "HeunDiscreteScheduler": _karras,
    "UniPCMultistepScheduler": _exponential,
    "PNDMScheduler": _pndm,
    "LMSDiscreteScheduler": _karras,
    "DPMSolverSinglestepScheduler": _exponential,
    "EDMEulerScheduler": _edm,
    "EDMDPMSolverMultistepScheduler": _edm,
    "LCMScheduler": _distilled,
    "TCDScheduler": _distilled,
    "CMStochasticIterativeScheduler": _consistency,
    "FlowMatchHeunDiscreteScheduler": _flow_heun,
    "DEISMultistepScheduler": _exponential,
    "KDPM2DiscreteScheduler": _karras,
    "KDPM2AncestralDiscreteScheduler": _karras,
    "DPMSolverSDEScheduler": _karras,
    "SASolverScheduler": _exponential,
    "IPNDMScheduler": _ipndm,
    "UnCLIPScheduler": _unclip,
}


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
