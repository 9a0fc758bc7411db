"""Writes stochastic_golden.npz: what diffusers 0.42.1 and k-diffusion 0.1.1 make of one toy network and given noise.

    HF_HUB_OFFLINE=1 PYTHON_WITH_TORCH make_stochastic_golden.py

Needs torch; the tests read the file only. Keys are `<case>/levels` [3, n + 1] (t, alpha, sigma), `/x` (start), `/noise`
[draws, B, D] in the order drawn, `/out`. The network is `eps = sin(0.7 x) + t / 2000` with the second half
`cos(x)` for learned variances; in k-diffusion `x0 = tanh(x) / (1 + s^2)`.
"""

import importlib.util
import sys
import types
from pathlib import Path

import diffusers
import numpy as np
import torch

RNG = np.random.default_rng(0)
OUT = {}
SHAPE = (2, 3)


def k_diffusion():
    root = Path(importlib.util.find_spec("k_diffusion").submodule_search_locations[0])
    package = types.ModuleType("kd")
    package.__path__ = [str(root)]
    sys.modules["kd"] = package
    utils = types.ModuleType("kd.utils")
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]
    sys.modules["kd.utils"] = utils
    package.utils = utils
    spec = importlib.util.spec_from_file_location("kd.sampling", root / "sampling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model(x, sigma):
    s = sigma[:, None]
    return torch.tanh(x) / (1 + s**2)


def run_k(name, function, sigmas, **options):
    x = torch.tensor(RNG.normal(size=SHAPE) * sigmas[0])
    drawn = []

    def noise(*_):
        drawn.append(RNG.normal(size=SHAPE))
        return torch.tensor(drawn[-1])

    out = function(model, x, torch.tensor(sigmas), noise_sampler=noise, disable=True, **options)
    OUT[f"{name}/levels"] = np.stack([np.zeros_like(sigmas), np.ones_like(sigmas), sigmas])
    OUT[f"{name}/x"], OUT[f"{name}/noise"], OUT[f"{name}/out"] = x.numpy(), np.stack(drawn), out.numpy()


def eps_model(x, t):
    return torch.sin(0.7 * x) + t / 2000


def run_diffusers(name, scheduler, levels, *, halves=False, sigma_space=False, **step_options):
    """`levels(scheduler)`: [3, n + 1]. The state is [B, C] for schedulers that split channels, so C is axis 1."""
    module = sys.modules[type(scheduler).__module__]
    drawn = []

    def randn(shape, *_, **__):
        drawn.append(RNG.normal(size=tuple(shape)))
        return torch.tensor(drawn[-1], dtype=torch.float32)

    module.randn_tensor = randn
    x = torch.tensor(RNG.normal(size=SHAPE), dtype=torch.float32) * getattr(scheduler, "init_noise_sigma", 1.0)
    OUT[f"{name}/x"] = x.numpy()
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = eps_model(x_in, t)
        if halves:
            out = torch.cat([out, torch.cos(x_in)], dim=1)
        x = scheduler.step(out, t, x, return_dict=False, **step_options)[0]
    OUT[f"{name}/levels"] = levels(scheduler)
    OUT[f"{name}/noise"] = np.stack(drawn) if drawn else np.zeros((0, *SHAPE))
    OUT[f"{name}/out"] = x.numpy()


def table_levels(final=None):
    def levels(scheduler):
        bar = scheduler.alphas_cumprod.double().numpy()
        t = scheduler.timesteps.numpy().astype(int)
        a = np.append(bar[t], 1.0 if final is None else bar[final])
        return np.stack([np.append(t, 0), np.sqrt(a), np.sqrt(1 - a)]).astype(np.float64)

    return levels


def vp_sigmas(scheduler):
    s = scheduler.sigmas.double().numpy()
    t = np.append(scheduler.timesteps.double().numpy(), 0)
    alpha = 1 / np.sqrt(1 + s**2)
    return np.stack([t, alpha, s * alpha])


def ve_sigmas(scheduler):
    s = scheduler.sigmas.double().numpy()
    return np.stack([np.append(scheduler.timesteps.double().numpy(), 0), np.ones_like(s), s])


def flow_sigmas(scheduler):
    s = scheduler.sigmas.double().numpy()
    return np.stack([np.append(scheduler.timesteps.double().numpy(), 0), 1 - s, s])


def main():
    k = k_diffusion()
    sigmas = np.append(np.geomspace(10.0, 0.05, 7), 0.0)
    for eta, s_noise in ((1.0, 1.0), (0.6, 1.1)):
        tag = f"{eta}"
        options = {"eta": eta, "s_noise": s_noise}
        run_k(f"k/euler_ancestral/{tag}", k.sample_euler_ancestral, sigmas, **options)
        run_k(f"k/dpmpp_sde/{tag}", k.sample_dpmpp_sde, sigmas, **options)
        run_k(f"k/dpmpp_3m_sde/{tag}", k.sample_dpmpp_3m_sde, sigmas, **options)
        run_k(f"k/dpm_2_ancestral/{tag}", k.sample_dpm_2_ancestral, sigmas, **options)
        for kind in ("midpoint", "heun"):
            run_k(f"k/dpmpp_2m_sde_{kind}/{tag}", k.sample_dpmpp_2m_sde, sigmas, solver_type=kind, **options)

    for variance in ("fixed_small", "fixed_small_log", "fixed_large", "learned_range", "learned"):
        scheduler = diffusers.DDPMScheduler(variance_type=variance, clip_sample=False)
        if variance == "learned":  # a variance has to be positive; the toy's second half is a cosine
            continue
        scheduler.set_timesteps(6)
        run_diffusers(f"d/ddpm_{variance}", scheduler, table_levels(), halves=variance.startswith("learned"))
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(6)
    run_diffusers("d/euler_ancestral", scheduler, ve_sigmas)
    for algorithm in ("sde-dpmsolver++", "sde-dpmsolver"):
        for order in (1, 2, 3):
            for kind in ("midpoint", "heun"):
                if order == 3 and algorithm == "sde-dpmsolver":
                    continue
                final = "zero" if algorithm.endswith("++") and order == 3 else "sigma_min"
                scheduler = diffusers.DPMSolverMultistepScheduler(
                    algorithm_type=algorithm, solver_order=order, solver_type=kind, final_sigmas_type=final
                )
                scheduler.set_timesteps(6)
                run_diffusers(f"d/{algorithm}_{order}_{kind}", scheduler, vp_sigmas)
    scheduler = diffusers.LCMScheduler(beta_schedule="linear")
    scheduler.set_timesteps(4)
    run_diffusers("d/lcm", scheduler, table_levels())
    for eta in (0.0, 0.3, 1.0):
        scheduler = diffusers.TCDScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
        scheduler.set_timesteps(5)
        run_diffusers(f"d/tcd_{eta}", scheduler, table_levels(final=0), eta=eta)
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40, clip_denoised=False)
    scheduler.set_timesteps(4)
    run_diffusers("d/cm", scheduler, ve_sigmas)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(4)
    run_diffusers("d/flow_stochastic", scheduler, flow_sigmas)
    ltx = sys.modules["diffusers"].LTXEulerAncestralRFScheduler
    for eta, s_noise in ((1.0, 1.0), (0.4, 0.9)):
        scheduler = ltx(eta=eta, s_noise=s_noise)
        scheduler.set_timesteps(sigmas=list(np.linspace(1.0, 0.0, 6)))
        scheduler.timesteps = scheduler.timesteps[:-1]
        run_diffusers(f"d/rf_{eta}", scheduler, flow_sigmas)
    for tau, flag in ((1.0, "one"), (0.5, "half")):
        for predictor, corrector in ((1, 1), (2, 2), (3, 3), (3, 4), (2, 1)):
            scheduler = diffusers.SASolverScheduler(
                predictor_order=predictor, corrector_order=corrector, tau_func=lambda t, tau=tau: torch.tensor(tau)
            )
            scheduler.set_timesteps(7)
            run_diffusers(f"d/sa_{flag}_{predictor}{corrector}", scheduler, vp_sigmas)
    np.savez_compressed(Path(__file__).parent / "stochastic_golden.npz", **OUT)


if __name__ == "__main__":
    main()
