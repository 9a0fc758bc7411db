"""diffusers' schedulers and k-diffusion's samplers on exact denoisers; runs where PyTorch is, without jax or diffjax.

    .venv-oracle/bin/python benchmarks/peers.py     # writes benchmarks/results/nfe_vs_error_peers.json

`nfe_vs_error.py` starts it when it finds such an environment. Each peer runs in its own coordinates and on its own
grids; the network it calls is the exact denoiser, evaluated at the level of the peer's own sigmas rather than at the
rounded timestep that a real network would be given. NFE is a budget: a two-call method takes as many steps as fit.
"""

import argparse
import copy
import importlib.util
import inspect
import json
import os
import platform
import sys
import time
import types
import warnings
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import targets  # noqa: E402
import torch  # noqa: E402

BUDGETS = (5, 8, 10, 15, 20, 30, 50)
LAW_TARGETS, LAW_BUDGETS = ("ring8",), (10, 20, 50)
RESULTS = Path(__file__).parent / "results" / "nfe_vs_error_peers.json"
FLOW_S_MAX = 999.0  # t = 0.999, where diffusers' flow sigmas start too: k-diffusion's sigma is infinite at t = 1


class Exact:
    """The denoiser of a `targets.Target` in torch float64: `halves` as there, and the number of its calls."""

    def __init__(self, target):
        variances, bases = target.eigen
        k, d = target.means.shape
        tensor = lambda a: torch.from_numpy(np.ascontiguousarray(a))
        self.variances, self.log_weights, self.means = map(tensor, (variances, np.log(target.weights), target.means))
        self.flat = tensor(bases.transpose(1, 0, 2).reshape(d, k * d))
        self.back = tensor(bases.transpose(0, 2, 1).reshape(k * d, d))
        self.centres = tensor(np.einsum("kd,kde->ke", target.means, bases))
        self.calls = 0

    def halves(self, x, alpha, sigma):
        self.calls += 1
        x = x.to(torch.float64)
        z = (x @ self.flat).reshape(len(x), *self.means.shape) - alpha * self.centres
        variance = alpha**2 * self.variances + sigma**2
        scaled = z / variance
        weight = torch.softmax(self.log_weights - 0.5 * ((z * scaled).sum(-1) + variance.log().sum(-1)), -1)
        scaled *= weight[..., None] * (alpha * self.variances)
        x0 = weight @ self.means + scaled.flatten(1) @ self.back
        return x0, (x - alpha * x0) / sigma


class Remote:
    """A denoiser in another process: asks for `D(y, s)` on stdout, reads the answer on stdin; `halves` as `Exact`."""

    def __init__(self):
        self.calls = 0

    def halves(self, x, alpha, sigma):
        self.calls += 1
        x = x.to(torch.float64)
        send({"s": sigma / alpha}, (x / alpha).numpy())
        x0 = torch.from_numpy(receive(x.shape))
        return x0, (x - alpha * x0) / sigma


def send(message: dict, array):
    sys.stdout.buffer.write(json.dumps(message).encode() + b"\n" + np.ascontiguousarray(array, np.float64).tobytes())
    sys.stdout.buffer.flush()


def receive(shape):
    data = sys.stdin.buffer.read(8 * int(np.prod(shape)))
    return np.frombuffer(data, np.float64).reshape(tuple(shape)).copy()


def serve():
    """Runs peers on the parent's denoiser: a line `{peer, nfe, shape, s_min, s_max}` and unit noise in, samples out."""
    peers = {peer.name: peer for peer in diffusers_on_tables() + diffusers_elsewhere() + k_diffusion_peers()}
    for line in sys.stdin.buffer:
        job = json.loads(line)
        noise = torch.from_numpy(receive(job["shape"]))
        peer, net = peers[job["peer"]], Remote()
        if "edm" in peer.processes:
            process = targets.Process("edm", job["s_max"])
        else:
            s = np.geomspace(job["s_min"], job["s_max"], 1000)
            process = targets.Process("vp", job["s_max"], 1 / (1 + s**2))
        x = peer.run(net, noise, process, job["nfe"], no_noise)
        send({"calls": net.calls}, x.numpy())


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
    out += [table_peer(f"DPM{order}M", dpm, "karras", solver_order=order, **noise) for order in (2, 3)]
    for order in (2, 3):
        for grid in ("default", "karras", "exponential"):
            single = {"solver_order": order, "lower_order_final": True, **sample}
            out.append(table_peer(f"DPM++{order}S", "DPMSolverSinglestep", grid, **single))
            out.append(table_peer(f"DEIS-{order}", "DEISMultistep", grid, solver_order=order, **sample))
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


def stochastic_peers():
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


def gaussian_kl(peer, target, process, budget):
    """Nats per dimension from the sampler's law to the data's, on a Gaussian with a diagonal covariance; and the calls.

    The run is affine in the start and in every draw, and acts on each coordinate by itself. Row 0 has none of them,
    row 1 the start, row 2 + j draw j: their differences are the impulse responses, and no Monte Carlo is needed.
    """
    net, drawn = Exact(target), [0]

    def draw():
        drawn[0] += 1
        out = torch.zeros(rows, target.dim, dtype=torch.float64)
        if rows > 1:
            out[1 + drawn[0]] = 1.0
        return out

    rows = 1
    peer.run(net, torch.zeros(1, target.dim, dtype=torch.float64), process, budget, draw)
    rows, drawn[0], net.calls = 2 + drawn[0], 0, 0
    start = torch.zeros(rows, target.dim, dtype=torch.float64)
    start[1] = 1.0
    x = peer.run(net, start, process, budget, draw).numpy()
    ratio = np.sum((x[1:] - x[0]) ** 2, 0) / np.diag(target.covs[0])
    kl = 0.5 * (ratio - 1 - np.log(ratio) + (x[0] - target.means[0]) ** 2 / np.diag(target.covs[0]))
    return float(np.mean(kl)), net.calls


def laws(peer, target, process, budget, n=4096):
    """`[spread, weights]` of `targets.law` for a sampler that draws noise."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(n, target.dim, dtype=torch.float64, generator=generator)
    x = peer.run(Exact(target), draw(), process, budget, draw).numpy()
    return [short(value) for value in targets.law(target, x).values()]


def short(value):
    return float(f"{value:.4g}") if np.isfinite(value) else None


def measure(names):
    """`{target: {process: {peer: {nfe: [rmse, median, flips, calls]}}}}`."""
    peers = diffusers_on_tables() + diffusers_elsewhere() + k_diffusion_peers()
    rows = {}
    for target in (targets.TARGETS[name]() for name in names):
        net, noise = Exact(target), torch.from_numpy(targets.unit_noise(target))
        for process in (make() for make in targets.PROCESSES.values()):
            exact = targets.ends(target, process)
            cell = rows.setdefault(target.name, {}).setdefault(process.name, {})
            for peer in peers:
                if process.name in peer.processes:
                    cell[peer.name] = row(peer, net, target, process, noise, exact)
            print(f"{target.name} {process.name}: {len(cell)} peers, {time.process_time():.0f} s", flush=True)
    return rows


def measure_stochastic():
    """On VP: `{peer: {nfe: [kl, calls]}}` on gauss16 and `{target: {peer: {nfe: [spread, weights]}}}`."""
    gauss, process, kl, law = targets.gauss16(), targets.vp(), {}, {}
    for peer in stochastic_peers():
        for budget in BUDGETS:
            value, calls = gaussian_kl(peer, gauss, process, budget)
            kl.setdefault(peer.name, {})[budget] = [short(value), calls]
        for name in LAW_TARGETS:
            drawn = {budget: laws(peer, targets.TARGETS[name](), process, budget) for budget in LAW_BUDGETS}
            law.setdefault(name, {})[peer.name] = drawn
    return kl, law


def row(peer, net, target, process, noise, exact):
    out = {}
    for budget in BUDGETS:
        net.calls = 0
        try:
            x = peer.run(net, noise, process, budget, no_noise).numpy()
        except (IndexError, ValueError, RuntimeError, AssertionError, AttributeError, TypeError) as error:
            out[budget] = [None, None, None, f"{type(error).__name__}: {error}"[:80]]
            continue
        found = targets.errors(target, x, exact)
        out[budget] = [short(found[key]) for key in ("rmse", "median", "flips")] + [net.calls]
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--targets", nargs="*", default=list(targets.TARGETS), help="only these; other rows are kept")
    parser.add_argument("--no-stochastic", dest="stochastic", action="store_false")
    parser.add_argument("--serve", action="store_true", help="sample from the denoiser of the parent process")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if arguments.serve:
        return serve()
    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    rows = kept.get("rows", {}) | measure(arguments.targets)
    kl, law = measure_stochastic() if arguments.stochastic else (kept.get("kl", {}), kept.get("law", {}))
    report = {
        "command": "python benchmarks/peers.py",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, one thread, {time.process_time():.0f} s of it",
        "versions": {name: metadata.version(name) for name in ("diffusers", "k-diffusion", "torch")},
        "targets": {name: make().digest for name, make in targets.TARGETS.items()},
        "columns": ["rmse", "median", "flips", "calls"],
        "rows": {name: rows[name] for name in targets.TARGETS if name in rows},
        "kl": kl,
        "law_columns": ["spread", "weights"],
        "law": law,
    }
    targets.dump(report, arguments.out)


if __name__ == "__main__":
    main()
