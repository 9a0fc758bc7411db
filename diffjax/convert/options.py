"""What diffusers' scheduler files may say: each class's options with its own defaults, as data, and their checks.

Defaults and choices are those of diffusers 0.42.1.
"""

from __future__ import annotations

import difflib
import math
from types import SimpleNamespace
from typing import Any

_TABLE = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_LATENT = _TABLE | {"beta_start": 0.00085, "beta_end": 0.012}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_RESPACE = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FLOW = {"use_flow_sigmas": False, "flow_shift": 1.0}
_SHIFTING = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_DPM = _TABLE | _THRESHOLD | _RESPACE | _FLOW | {"solver_order": 2}
_EDM = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "final_sigmas_type": "zero",
}
_FEW = (
    _LATENT
    | _THRESHOLD
    | _CLIP
    | _LEADING
    | {
        "beta_schedule": "scaled_linear",
        "original_inference_steps": 50,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "timestep_scaling": 10.0,
        "rescale_betas_zero_snr": False,
    }
)

DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": _TABLE
    | _CLIP
    | _THRESHOLD
    | _LEADING
    | {"variance_type": "fixed_small", "rescale_betas_zero_snr": False},
    "DDIMScheduler": _TABLE
    | _CLIP
    | _THRESHOLD
    | _LEADING
    | {"set_alpha_to_one": True, "rescale_betas_zero_snr": False},
    "DDIMInverseScheduler": _TABLE | _CLIP | _LEADING | {"set_alpha_to_one": True, "rescale_betas_zero_snr": False},
    "EulerDiscreteScheduler": _TABLE
    | _RESPACE
    | _LINSPACE
    | {
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
        "rescale_betas_zero_snr": False,
        "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": _TABLE | _LINSPACE | {"rescale_betas_zero_snr": False},
    "DPMSolverMultistepScheduler": _DPM
    | _LINSPACE
    | _SHIFTING
    | {
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
        "rescale_betas_zero_snr": False,
    },
    "FlowMatchEulerDiscreteScheduler": _RESPACE
    | _SHIFTING
    | {
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "invert_sigmas": False,
        "shift_terminal": None,
        "stochastic_sampling": False,
    },
    "HeunDiscreteScheduler": _LATENT | _RESPACE | _LINSPACE | _CLIP | {"clip_sample": False},
    "UniPCMultistepScheduler": _DPM
    | _LINSPACE
    | _SHIFTING
    | {
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
        "final_sigmas_type": "zero",
        "rescale_betas_zero_snr": False,
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
    "PNDMScheduler": _TABLE | _LEADING | {"skip_prk_steps": False, "set_alpha_to_one": False},
    "LMSDiscreteScheduler": _TABLE | _RESPACE | _LINSPACE,
    "DPMSolverSinglestepScheduler": _DPM
    | _SHIFTING
    | {
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": False,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    },
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": _EDM
    | _THRESHOLD
    | {
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
    },
    "LCMScheduler": _FEW,
    "TCDScheduler": _FEW,
    "CMStochasticIterativeScheduler": {
        "num_train_timesteps": 40,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "sigma_data": 0.5,
        "s_noise": 1.0,
        "rho": 7.0,
        "clip_denoised": True,
    },
    "FlowMatchHeunDiscreteScheduler": {"num_train_timesteps": 1000, "shift": 1.0},
    "DEISMultistepScheduler": _DPM
    | _LINSPACE
    | _SHIFTING
    | {"algorithm_type": "deis", "solver_type": "logrho", "lower_order_final": True},
    "KDPM2DiscreteScheduler": _LATENT | _RESPACE | _LINSPACE,
    "KDPM2AncestralDiscreteScheduler": _LATENT | _RESPACE | _LINSPACE,
    "DPMSolverSDEScheduler": _LATENT | _RESPACE | _LINSPACE | {"noise_sampler_seed": None},
    "SASolverScheduler": _TABLE
    | _THRESHOLD
    | _RESPACE
    | _FLOW
    | _LINSPACE
    | {
        "predictor_order": 2,
        "corrector_order": 2,
        "tau_func": None,
        "algorithm_type": "data_prediction",
        "lower_order_final": True,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    },
    "IPNDMScheduler": {"num_train_timesteps": 1000, "trained_betas": None},
    "UnCLIPScheduler": _CLIP
    | {
        "num_train_timesteps": 1000,
        "variance_type": "fixed_small_log",
        "prediction_type": "epsilon",
        "beta_schedule": "squaredcos_cap_v2",
    },
}

_CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}

STEP_OPTIONS: dict[str, dict[str, Any]] = {name: {} for name in DEFAULTS} | {
    "DDPMScheduler": {"timesteps": None},
    "DDIMScheduler": {"eta": 0.0, "use_clipped_model_output": False},
    "EulerDiscreteScheduler": _CHURN | {"timesteps": None, "sigmas": None},
    "DPMSolverMultistepScheduler": {"mu": None, "timesteps": None},
    "FlowMatchEulerDiscreteScheduler": _CHURN | {"sigmas": None, "mu": None, "timesteps": None},
    "HeunDiscreteScheduler": {"timesteps": None},
    "UniPCMultistepScheduler": {"sigmas": None, "mu": None},
    "LMSDiscreteScheduler": {"order": 4},
    "DPMSolverSinglestepScheduler": {"mu": None, "timesteps": None},
    "EDMEulerScheduler": _CHURN,
    "LCMScheduler": {"original_inference_steps": None, "timesteps": None},
    "TCDScheduler": {"eta": 0.3, "original_inference_steps": None, "timesteps": None},
    "CMStochasticIterativeScheduler": {"timesteps": None},
    "FlowMatchHeunDiscreteScheduler": _CHURN,
    "DEISMultistepScheduler": {"mu": None},
    "DPMSolverSDEScheduler": {"s_noise": 1.0},
}

_NETWORKS = ("epsilon", "sample", "v_prediction")
_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
_LOWERED = ("midpoint", "heun", "logrho", "bh1", "bh2")

CHOICES: dict[str, tuple] = {
    "beta_schedule": _BETAS,
    "prediction_type": _NETWORKS,
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "time_shift_type": ("exponential", "linear"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "sigma_schedule": ("karras", "exponential"),
    "solver_type": _LOWERED,
}

_SPECIAL: dict[str, dict[str, tuple]] = {
    "DDPMScheduler": {
        "beta_schedule": (*_BETAS, "laplace", "sigmoid"),
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"),
    },
    "DDIMInverseScheduler": {"timestep_spacing": ("leading", "trailing")},
    "EulerDiscreteScheduler": {"prediction_type": (*_NETWORKS, "original_sample")},
    "EulerAncestralDiscreteScheduler": {"prediction_type": ("epsilon", "v_prediction")},
    "DPMSolverMultistepScheduler": {
        "prediction_type": (*_NETWORKS, "flow_prediction"),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "deis"),
        "variance_type": (None, "learned", "learned_range"),
        "solver_order": (1, 2, 3),
    },
    "UniPCMultistepScheduler": {
        "prediction_type": (*_NETWORKS, "flow_prediction"),
        "solver_p": (None,),
        "solver_order": (1, 2, 3, 4, 5),
    },
    "PNDMScheduler": {"prediction_type": ("epsilon", "v_prediction")},
    "DPMSolverSinglestepScheduler": {
        "prediction_type": (*_NETWORKS, "flow_prediction"),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "deis"),
        "variance_type": (None, "learned", "learned_range"),
        "solver_order": (1, 2, 3),
    },
    "EDMEulerScheduler": {"prediction_type": ("epsilon", "v_prediction")},
    "EDMDPMSolverMultistepScheduler": {
        "prediction_type": ("epsilon", "v_prediction"),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
        "solver_order": (1, 2, 3),
    },
    "DEISMultistepScheduler": {
        "prediction_type": (*_NETWORKS, "flow_prediction"),
        "algorithm_type": ("deis", "dpmsolver", "dpmsolver++"),
        "solver_order": (1, 2, 3),
    },
    "KDPM2DiscreteScheduler": {"prediction_type": ("epsilon", "v_prediction")},
    "KDPM2AncestralDiscreteScheduler": {"prediction_type": ("epsilon", "v_prediction")},
    "DPMSolverSDEScheduler": {"prediction_type": ("epsilon", "v_prediction")},
    "SASolverScheduler": {
        "prediction_type": (*_NETWORKS, "flow_prediction"),
        "algorithm_type": ("data_prediction", "noise_prediction"),
        "variance_type": (None, "learned", "learned_range"),
        "predictor_order": (1, 2, 3, 4),
        "corrector_order": (1, 2, 3, 4),
    },
    "UnCLIPScheduler": {
        "beta_schedule": ("squaredcos_cap_v2",),
        "prediction_type": ("epsilon", "sample"),
        "variance_type": ("fixed_small_log", "learned_range"),
    },
}

# Left by other classes in files of widely used checkpoints; diffusers drops them.
_LEFTOVERS = ("set_alpha_to_one", "skip_prk_steps", "steps_offset", "sample_max_value", "clip_sample_range")


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _foreign(kind: str, name: str, value) -> None:
    """Raises unless diffusers may drop an option that the class does not have without changing what was meant."""
    owners = [k for k, options in DEFAULTS.items() if name in options]
    if owners and (value in (None, False) or name in _LEFTOVERS or any(value == DEFAULTS[k][name] for k in owners)):
        return
    where = f"; it is an option of {', '.join(owners)}" if owners else _nearest(name, DEFAULTS[kind])
    raise ValueError(
        f"{kind} has no option {name!r} (got {value!r}){where}. diffusers would drop it; remove it, or change "
        f"_class_name. Known: {', '.join(sorted(DEFAULTS[kind]))}"
    )


def _numeric(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _check(kind: str, name: str, value, default) -> None:
    """Raises for a value that is not one of an option's choices or not of its type."""
    choices = _SPECIAL.get(kind, {}).get(name, CHOICES.get(name))
    if choices is not None:
        fine, allowed = value in choices, "one of " + ", ".join(map(repr, choices))
    elif isinstance(default, bool):
        fine, allowed = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        least = 0 if name == "steps_offset" else 1
        fine, allowed = isinstance(value, int) and not isinstance(value, bool), f"a whole number >= {least}"
        fine = fine and value >= least
    elif isinstance(default, float):
        fine, allowed = _numeric(value), "a number"
    elif name in ("sigma_min", "sigma_max", "shift_terminal"):
        fine, allowed = value is None or _numeric(value), "a number or null"
    elif name == "tau_func":
        fine, allowed = value is None or callable(value), "null or a function of the time step"
    elif name == "noise_sampler_seed":
        fine, allowed = True, "anything"
    else:
        listed = isinstance(value, (list, tuple)) or getattr(value, "ndim", None) == 1
        fine, allowed = listed or (value is None and default is None), "a list of numbers"
    if not fine:
        raise ValueError(f"{kind}: {name}={value!r} is not supported; expected {allowed}")


def read_options(config: dict) -> tuple[str, SimpleNamespace]:
    """The class's name and its options, all of them, with diffusers' defaults for those that the file leaves out.

    Raises:
      ValueError: for an unknown class, an option that it does not have, or a value that is not supported.
    """
    kind = config.get("_class_name")
    if kind not in DEFAULTS:
        raise ValueError(
            f"_class_name: unknown scheduler {kind!r}; known: {', '.join(sorted(DEFAULTS))}"
            + _nearest(str(kind), DEFAULTS)
        )
    options = dict(DEFAULTS[kind])
    for name, value in config.items():
        if name.startswith("_"):
            continue
        if name not in options:
            _foreign(kind, name, value)
            continue
        _check(kind, name, value, options[name])
        options[name] = value
    if sum(options.get(name, False) for name in _RESPACE) > 1:
        raise ValueError(f"{kind}: at most one of {', '.join(_RESPACE)} may be true")
    return kind, SimpleNamespace(**options)


def read_step_options(kind: str, given: dict) -> SimpleNamespace:
    """The arguments of the class's `step` and `set_timesteps`, with their defaults.

    Raises:
      ValueError: for one that the class does not take, or a value of the wrong type.
    """
    known = STEP_OPTIONS[kind]
    for name, value in given.items():
        if name not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise ValueError(f"{kind} takes no step option {name!r}; known: {listed}{_nearest(name, known)}")
        default = known[name]
        fine = _numeric(value) if isinstance(default, (int, float)) and not isinstance(default, bool) else True
        fine = isinstance(value, bool) if isinstance(default, bool) else fine
        if not fine:
            raise ValueError(f"{kind}: step option {name}={value!r}; expected a value like {default!r}")
    return SimpleNamespace(**(known | given))
