"""The peers' configurations: diffusers' schedulers and k-diffusion's samplers, each in its own coordinates and grids.

Torch, diffusers and k-diffusion only. A `net` has `halves(x, alpha, sigma) -> (E[x0 | x], E[eps | x])`.
"""

import copy
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

FLOW_S_MAX = 999.0  # t = 0.999, where diffusers' flow sigmas start too: k-diffusion's sigma is infinite at t = 1


class Peer(NamedTuple):
    """One configuration: `run(net, noise [B, D], process, budget, draw) -> x` with at most `budget` calls, or None."""

    name: str
    run: Callable
    processes: tuple
    stochastic: bool = False


def scheduler_levels(scheduler, kind, i, t):
    """`(alpha, sigma)` at which call i is made, in the scheduler's own coordinates."""
    if kind == "table":
        alpha2 = scheduler.alphas_cumprod[int(t)].double()
        return alpha2.sqrt().item(), (1 - alpha2).sqrt().item()
    if hasattr(scheduler, "sigmas_interpol") and not scheduler.state_in_first_order:
        sigma = scheduler.sigmas_interpol[scheduler.step_index].item()
    else:
        sigma = scheduler.sigmas[i].item()
    if kind == "flow":
        return 1 - sigma, sigma
    if kind in ("ve", "edm"):
        return 1.0, sigma
    alpha = 1 / (1 + sigma**2) ** 0.5
    return alpha, sigma * alpha


def network_output(net, scheduler, kind, x, level):
    """What the network of this scheduler would return for the noisy `x` at `level`."""
    x0, eps = net.halves(x, *level)
    if kind == "flow":
        return eps - x0
    if kind == "edm":
        d, sigma = scheduler.config.sigma_data, level[1]
        c_skip, c_out = d**2 / (sigma**2 + d**2), sigma * d / (sigma**2 + d**2) ** 0.5
        return (x0 - c_skip * x) / c_out
    return x0 if scheduler.config.get("prediction_type") == "sample" else eps


def run_scheduler(make, kind, net, noise, process, budget, draw):
    """A diffusers scheduler as its pipelines drive it; the noise of its steps comes from `draw()`."""
    fresh = make(process)
    for n in range(budget, 0, -1):
        scheduler = copy.deepcopy(fresh)
        scheduler.set_timesteps(n)
        if len(scheduler.timesteps) <= budget:
            break
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    if isinstance(scheduler, diffusers.DPMSolverSDEScheduler):
        scheduler.noise_sampler = brownian(draw)
    module = sys.modules[type(scheduler).__module__]
    kept, module.randn_tensor = getattr(module, "randn_tensor", None), lambda *_, **__: draw()
    try:
        alpha, sigma = scheduler_levels(scheduler, kind, 0, scheduler.timesteps[0])
        x = sigma * noise
        for i, t in enumerate(scheduler.timesteps):
            if hasattr(scheduler, "scale_model_input"):  # sets the step index; the exact denoiser takes x as it is
                scheduler.scale_model_input(x, t)
            level = scheduler_levels(scheduler, kind, i, t)
            out = network_output(net, scheduler, kind, x, level)
            x = scheduler.step(out, t, x).prev_sample.to(torch.float64)
    finally:
        module.randn_tensor = kept
    return x


def k_diffusion():
    """k-diffusion's `sampling.py`, without the image libraries that its package imports."""
    if "k_diffusion" not in sys.modules:
        folder = Path(importlib.util.find_spec("k_diffusion").submodule_search_locations[0])
        for name in ("k_diffusion", "k_diffusion.utils"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["k_diffusion"].__path__ = [str(folder)]
        utils = sys.modules["k_diffusion"].utils = sys.modules["k_diffusion.utils"]
        utils.append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]
    return importlib.import_module("k_diffusion.sampling")


def brownian(draw):
    """The noise sampler of one Brownian path: increments over a sub-interval and over the whole step are correlated."""
    seen = {}

    def sampler(sigma, sigma_next):
        a, b = float(sigma), float(sigma_next)
        if a in seen and seen[a][0] != b:
            middle, first = seen[a]
            w = (a - middle) / (a - b)
            return w**0.5 * first + (1 - w) ** 0.5 * draw()
        seen.clear()
        seen[a] = (b, draw())
        return seen[a][1]

    return sampler


def s_range(process):
    """k-diffusion's sigma_min and sigma_max for a process: ends of the table, EDM's, those of t = 0.999 and 0.001."""
    if process.name == "edm":
        return 0.002, process.s_max
    if process.name == "flow":
        return 1 / FLOW_S_MAX, FLOW_S_MAX
    return float(np.sqrt(1 / process.alphas_cumprod[0] - 1)), process.s_max


def k_sigmas(grid, n, process, s_min=None):
    k = k_diffusion()
    low, high = s_range(process)
    low = s_min or low
    if grid == "vp":
        return k.get_sigmas_vp(n).double()
    if grid == "model":
        log = torch.from_numpy(0.5 * np.log(1 / process.alphas_cumprod - 1))
        t = torch.linspace(len(log) - 1, 0, n, dtype=torch.float64)
        lower = t.floor().long()
        upper = t.ceil().long()
        return k.append_zero((log[lower] + t.frac() * (log[upper] - log[lower])).exp())
    if grid == "poly":
        return k.get_sigmas_polyexponential(n, low, high, rho=0.7).double()
    return {"karras": k.get_sigmas_karras, "exponential": k.get_sigmas_exponential}[grid](n, low, high).double()


def run_k(name, grid, keywords, net, noise, process, budget, draw, s_min=None):
    """A sampler of k-diffusion; methods of two calls a step make one on the step to sigma = 0."""
    k = k_diffusion()
    sampler = getattr(k, f"sample_{name}")
    model = lambda x, sigma: net.halves(x, 1.0, sigma[0].item())[0]
    keywords = dict(keywords, disable=True)
    if "noise_sampler" in inspect.signature(sampler).parameters:
        keywords["noise_sampler"] = brownian(draw)
    if name == "dpm_fast":
        low, high = s_range(process)
        return sampler(model, high * noise, s_min or low, high, budget, **keywords)
    twice = name in ("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")
    sigmas = k_sigmas(grid, (budget + 1) // 2 if twice else budget, process, s_min)
    return sampler(model, sigmas[0] * noise, sigmas, **keywords)


def no_noise():
    raise RuntimeError("a deterministic configuration drew noise")


def still(cls):
    """SASolver multiplies a draw by zero at tau = 0; nothing else that is deterministic may draw."""
    return (lambda: torch.zeros(())) if cls == "SASolver" else no_noise


GRIDS = {
    "default": {},
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading"},
    "linspace": {"timestep_spacing": "linspace"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "beta": {"use_beta_sigmas": True},
}
TABLES = ("vp", "cosine")


def table_peer(label, cls, grid, *, kind="vp", stochastic=False, **settings):
    """A diffusers scheduler on the process's own table of betas."""

    @cache
    def make(process):
        alphas_cumprod = np.append(1.0, process.alphas_cumprod)
        betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
        return getattr(diffusers, cls + "Scheduler")(trained_betas=betas, **settings, **GRIDS[grid])

    def run(net, noise, process, budget, draw):
        return run_scheduler(make, kind, net, noise, process, budget, draw if stochastic else still(cls))

    return Peer(f"diffusers {label} {grid}", run, ("vp",) if stochastic else TABLES, stochastic)


def plain_peer(label, cls, kind, *, stochastic=False, **settings):
    """A diffusers scheduler of flow matching or of EDM."""

    @cache
    def make(process):
        ends = {"sigma_max": process.s_max} if kind == "edm" else {}
        return getattr(diffusers, cls + "Scheduler")(**settings, **ends)

    def run(net, noise, process, budget, draw):
        return run_scheduler(make, kind, net, noise, process, budget, draw if stochastic else still(cls))

    return Peer(f"diffusers {label}", run, (kind,), stochastic)


def k_peer(label, name, grid, processes=(*TABLES, "edm", "flow"), stochastic=False, s_min=None, **keywords):
    """A sampler of k-diffusion on one of its grids."""

    def run(net, noise, process, budget, draw):
        drawn = draw if stochastic else lambda: torch.zeros(())  # at eta = 0 a draw is multiplied by zero
        return run_k(name, grid, keywords, net, noise, process, budget, drawn, s_min=s_min)

    suffix = f" from {s_min}" if s_min else ""
    return Peer(f"k-diffusion {label} {grid}".strip() + suffix, run, processes, stochastic)


def diffusers_on_tables():
    """The deterministic configurations on a table of betas."""
    clean = {"clip_sample": False}
    sample = {"prediction_type": "sample"}
    out = [table_peer("DDIM", "DDIM", g, kind="table", **clean) for g in ("leading", "trailing", "linspace")]
    out += [table_peer("PNDM", "PNDM", g, kind="table", skip_prk_steps=True) for g in ("leading", "linspace")]
    out += [
        table_peer("Euler", "EulerDiscrete", g, kind="ve") for g in ("linspace", "trailing", "karras", "exponential")
    ]
    for label, cls in (("Heun", "HeunDiscrete"), ("KDPM2", "KDPM2Discrete"), ("LMS", "LMSDiscrete")):
        out += [table_peer(label, cls, g, kind="ve") for g in ("default", "karras", "exponential")]
    dpm = "DPMSolverMultistep"
    for grid in ("default", "trailing", "karras", "exponential", "lu", "beta"):
        out.append(table_peer("DPM++2M", dpm, grid, **sample))
        out.append(table_peer("DPM++3M", dpm, grid, solver_order=3, **sample))
    out += [table_peer("DPM++2M heun", dpm, g, solver_type="heun", **sample) for g in ("karras", "lu")]
    out.append(table_peer("DPM++2M euler_at_final", dpm, "karras", euler_at_final=True, **sample))
    final = {"final_sigmas_type": "sigma_min"}
    noise = {"algorithm_type": "dpmsolver", **final, **sample}
    for order in (2, 3):
        out += [table_peer(f"DPM{order}M", dpm, g, solver_order=order, **noise) for g in ("karras", "exponential")]
        for grid in ("default", "karras", "exponential"):
            single = {"solver_order": order, "lower_order_final": True, **sample}
            out.append(table_peer(f"DPM++{order}S", "DPMSolverSinglestep", grid, **single))
            out.append(table_peer(f"DEIS-{order}", "DEISMultistep", grid, solver_order=order, **sample))
            whole = {"solver_order": order, "lower_order_final": False, **sample}
            out.append(table_peer(f"DEIS-{order} whole", "DEISMultistep", grid, **whole))
            unipc = {"solver_order": order, **sample}
            out.append(table_peer(f"UniPC-{order}", "UniPCMultistep", grid, **unipc))
            out.append(table_peer(f"UniPC-{order} bh1", "UniPCMultistep", grid, solver_type="bh1", **unipc))
            out.append(
                table_peer(f"UniPC-{order} bh1 sigma_min", "UniPCMultistep", grid, solver_type="bh1", **final, **unipc)
            )
            out.append(table_peer(f"UniPC-{order} sigma_min", "UniPCMultistep", grid, **final, **unipc))
    for order in (2, 3):
        tau = {"predictor_order": order, "corrector_order": order, "tau_func": lambda t: 0.0}
        out += [
            table_peer(f"SA-{order} tau=0", "SASolver", g, **tau, **sample)
            for g in ("default", "karras", "exponential")
        ]
    return out


def diffusers_elsewhere():
    """The deterministic configurations of flow matching and of EDM."""
    out = []
    for shift in (1.0, 3.0):
        out.append(plain_peer(f"FlowMatchEuler shift={shift:g}", "FlowMatchEulerDiscrete", "flow", shift=shift))
        out.append(plain_peer(f"FlowMatchHeun shift={shift:g}", "FlowMatchHeunDiscrete", "flow", shift=shift))
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
        for order in (2, 3):
            of = {"solver_order": order, **flow}
            out.append(plain_peer(f"DPM++{order}M flow shift={shift:g}", "DPMSolverMultistep", "flow", **of))
            out.append(plain_peer(f"UniPC-{order} flow shift={shift:g}", "UniPCMultistep", "flow", **of))
            out.append(plain_peer(f"DEIS-{order} flow shift={shift:g}", "DEISMultistep", "flow", **of))
            single = {"lower_order_final": True, **of}
            out.append(plain_peer(f"DPM++{order}S flow shift={shift:g}", "DPMSolverSinglestep", "flow", **single))
        sa = {"tau_func": lambda t: 0.0, **flow}
        out.append(plain_peer(f"SA-2 tau=0 flow shift={shift:g}", "SASolver", "flow", **sa))
    for grid in ("karras", "exponential"):
        own = {f"use_{grid}_sigmas": True}
        out.append(plain_peer(f"FlowMatchEuler {grid}", "FlowMatchEulerDiscrete", "flow", **own))
        edm = {"sigma_schedule": grid}
        out.append(plain_peer(f"EDMEuler {grid}", "EDMEuler", "edm", **edm))
        for order in (2, 3):
            out.append(
                plain_peer(f"EDM DPM++{order}M {grid}", "EDMDPMSolverMultistep", "edm", solver_order=order, **edm)
            )
        heun = {"solver_type": "heun", **edm}
        out.append(plain_peer(f"EDM DPM++2M heun {grid}", "EDMDPMSolverMultistep", "edm", **heun))
    return out


def k_diffusion_peers():
    """The deterministic configurations of k-diffusion, on every process."""
    methods = {
        "Euler": ("euler", {}),
        "Heun": ("heun", {}),
        "DPM2": ("dpm_2", {}),
        "LMS": ("lms", {}),
        "DPM++2S": ("dpmpp_2s_ancestral", {"eta": 0.0}),
        "DPM++2M": ("dpmpp_2m", {}),
        "DPM++2M SDE eta=0": ("dpmpp_2m_sde", {"eta": 0.0}),
        "DPM++3M SDE eta=0": ("dpmpp_3m_sde", {"eta": 0.0}),
    }
    out = [k_peer(label, name, g, **more) for label, (name, more) in methods.items() for g in ("karras", "exponential")]
    heun = {"eta": 0.0, "solver_type": "heun"}
    out.append(k_peer("DPM++2M SDE heun eta=0", "dpmpp_2m_sde", "karras", **heun))
    for label in ("DPM++2M", "DPM++3M SDE eta=0", "LMS"):
        name, more = methods[label]
        out.append(k_peer(label, name, "poly", **more))
        out.append(k_peer(label, name, "karras", s_min=0.03, **more))
        out.append(k_peer(label, name, "vp", ("vp",), **more))
        out.append(k_peer(label, name, "model", TABLES, **more))
    out += [k_peer("DPM-fast", "dpm_fast", "", s_min=s_min) for s_min in (None, 0.03)]
    return out


def deterministic() -> list[Peer]:
    """Every deterministic configuration; `processes` says where each runs."""
    return diffusers_on_tables() + diffusers_elsewhere() + k_diffusion_peers()


def stochastic() -> list[Peer]:
    """What draws noise, on VP-linear."""
    clean, sample = {"clip_sample": False}, {"prediction_type": "sample"}
    keep = {"stochastic": True}
    out = [table_peer("DDPM", "DDPM", g, kind="table", **clean, **keep) for g in ("leading", "trailing", "linspace")]
    out += [table_peer("Euler a", "EulerAncestralDiscrete", g, kind="ve", **keep) for g in ("linspace", "trailing")]
    out += [table_peer("KDPM2 a", "KDPM2AncestralDiscrete", g, kind="ve", **keep) for g in ("default", "karras")]
    sde = {"algorithm_type": "sde-dpmsolver++", **sample, **keep}
    for grid in ("default", "karras", "lu", "exponential"):
        out.append(table_peer("SDE-DPM++2M", "DPMSolverMultistep", grid, **sde))
        out.append(table_peer("SDE-DPM++2M heun", "DPMSolverMultistep", grid, solver_type="heun", **sde))
    out += [table_peer("DPM++SDE", "DPMSolverSDE", g, kind="ve", **keep) for g in ("default", "karras")]
    for order in (2, 3):
        sa = {"predictor_order": order, "corrector_order": order, **sample, **keep}
        out += [table_peer(f"SA-{order}", "SASolver", g, **sa) for g in ("default", "karras", "exponential")]
    methods = {
        "Euler a": ("euler_ancestral", {}),
        "DPM2 a": ("dpm_2_ancestral", {}),
        "DPM++2S a": ("dpmpp_2s_ancestral", {}),
        "DPM++SDE": ("dpmpp_sde", {}),
        "DPM++2M SDE": ("dpmpp_2m_sde", {}),
        "DPM++2M SDE heun": ("dpmpp_2m_sde", {"solver_type": "heun"}),
        "DPM++3M SDE": ("dpmpp_3m_sde", {}),
    }
    for label, (name, more) in methods.items():
        out += [k_peer(label, name, g, ("vp",), True, **more) for g in ("karras", "exponential")]
    return out
