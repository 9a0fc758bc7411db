"""Configurations of diffusers' schedulers: a list that holds every option, and random ones."""

from __future__ import annotations

import random

import numpy as np

_FLOWS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_EPS = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}

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
    (
        "DDIMInverse",
        5,
        {"timestep_spacing": "trailing", "clip_sample": False, "rescale_betas_zero_snr": True},
        {},
    ),
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
    ("DPMSolverMultistep", 5, {**_EPS, "algorithm_type": "sde-dpmsolver", "prediction_type": "sample"}, {}),
    ("DPMSolverMultistep", 10, {**_EPS, "solver_order": 3}, {}),
    ("DPMSolverMultistep", 5, {**_EPS, "solver_type": "heun", "thresholding": True}, {}),
    ("DPMSolverMultistep", 5, {"use_lu_lambdas": True, "solver_type": "heun", "lower_order_final": False}, {}),
    ("DPMSolverMultistep", 5, {"use_exponential_sigmas": True, "prediction_type": "v_prediction"}, {}),
    ("DPMSolverMultistep", 5, {"use_beta_sigmas": True, "thresholding": True, "sample_max_value": 1.5}, {}),
    ("DPMSolverMultistep", 5, {**_FLOWS, "flow_shift": 3.0}, {}),
    ("DPMSolverMultistep", 5, {**_FLOWS, "use_dynamic_shifting": True}, {"mu": 0.7}),
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
    ("UniPCMultistep", 5, {**_FLOWS, "flow_shift": 3.0}, {}),
    (
        "UniPCMultistep",
        5,
        {
            **_FLOWS,
            "use_karras_sigmas": True,
            "thresholding": True,
        },
        {},
    ),
    ("UniPCMultistep", 5, {**_FLOWS, "use_dynamic_shifting": True, "shift_terminal": 0.1}, {"mu": 0.7}),
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
    ("DPMSolverSinglestep", 6, {**_EPS, "solver_type": "heun"}, {}),
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
    ("DEISMultistep", 5, {**_FLOWS}, {}),
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
        if kind != "SASolverScheduler" and pick.random() < 0.4:
            c["use_dynamic_shifting"], o["mu"] = True, 0.8
    else:
        pick.respacing(c)
    if kind != "DPMSolverSinglestepScheduler":
        pick.spacing(c)
    if kind.startswith("DPMSolver"):
        _dpm(pick, c, flow)
    elif kind == "UniPCMultistepScheduler":
        _unipc(pick, c, flow)
    elif kind == "SASolverScheduler":
        _sa(pick, c)


def _no_flow_output(c):
    if c.get("prediction_type") == "flow_prediction":
        c["prediction_type"] = "v_prediction"


def _dpm(pick, c, flow):
    names = ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"]
    multistep = c["_class_name"] == "DPMSolverMultistepScheduler"
    pick.maybe(c, "algorithm_type", *(names if multistep else names[:-1]), chance=0.7)
    pick.maybe(c, "final_sigmas_type", "zero", "sigma_min")
    pick.maybe(c, "lambda_min_clipped", -5.1, -3.0, chance=0.2)
    if not c.get("algorithm_type", "++").endswith("++"):
        c["final_sigmas_type"] = "sigma_min"
        _no_flow_output(c)
    if multistep:
        pick.maybe(c, "euler_at_final", True, chance=0.3)
        pick.maybe(c, "rescale_betas_zero_snr", True, chance=0.1)
        if not flow and not any(k.endswith("_sigmas") for k in c):
            pick.maybe(c, "use_lu_lambdas", True, chance=0.3)


def _unipc(pick, c, flow):
    pick.maybe(c, "solver_type", "bh1", "bh2")
    pick.maybe(c, "disable_corrector", [0], [0, 1], chance=0.3)
    pick.maybe(c, "final_sigmas_type", "sigma_min")
    pick.maybe(c, "rescale_betas_zero_snr", True, chance=0.1)
    pick.maybe(c, "sigma_min", 0.02, chance=0.2)
    pick.maybe(c, "sigma_max", 20.0, chance=0.2)
    if flow:
        pick.maybe(c, "shift_terminal", 0.1, chance=0.3)
        pick.maybe(c, "use_karras_sigmas", True, chance=0.3)
        pick.maybe(c, "time_shift_type", "linear", chance=0.3)
        return
    pick.maybe(c, "predict_x0", True, False)
    if not c.get("predict_x0", True):
        _no_flow_output(c)


def _sa(pick, c):
    for option in ("solver_order", "solver_type"):
        c.pop(option, None)
    pick.maybe(c, "predictor_order", 1, 2, 3)
    pick.maybe(c, "corrector_order", 1, 2, 3)
    pick.maybe(c, "algorithm_type", "noise_prediction", chance=0.3)
    if c.get("algorithm_type") == "noise_prediction":
        c.pop("thresholding", None)
        _no_flow_output(c)


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
    "IPNDMScheduler": lambda pick, c, o: None,
    "UnCLIPScheduler": _unclip,
}
