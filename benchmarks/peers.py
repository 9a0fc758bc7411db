"""diffusers' schedulers and k-diffusion's samplers on exact denoisers; runs where PyTorch is, without jax or diffjax.

    .venv-oracle/bin/python benchmarks/peers.py     # writes benchmarks/results/nfe_vs_error_peers.json

`nfe_vs_error.py` starts it when it finds such an environment. The network that a peer calls is the exact denoiser at
the level of the peer's own sigmas, rather than at the rounded timestep that a real network would be given. NFE is a
budget: a two-call method takes as many steps as fit.
"""

import argparse
import json
import os
import platform
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import peer_samplers  # noqa: E402
import targets  # noqa: E402
import torch  # noqa: E402

BUDGETS = (5, 8, 10, 15, 20, 30, 50)
LAW_TARGETS, LAW_BUDGETS = ("ring8",), (10, 20, 50)
RESULTS = Path(__file__).parent / "results" / "nfe_vs_error_peers.json"


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
    peers = {peer.name: peer for peer in peer_samplers.deterministic()}
    for line in sys.stdin.buffer:
        job = json.loads(line)
        noise = torch.from_numpy(receive(job["shape"]))
        peer, net = peers[job["peer"]], Remote()
        if "edm" in peer.processes:
            process = targets.Process("edm", job["s_max"])
        else:
            s = np.geomspace(job["s_min"], job["s_max"], 1000)
            process = targets.Process("vp", job["s_max"], 1 / (1 + s**2))
        x = peer.run(net, noise, process, job["nfe"], peer_samplers.no_noise)
        send({"calls": net.calls}, x.numpy())


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


def measure(names, kept):
    """`{target: {process: {peer: {nfe: [rmse, median, flips, calls]}}}}`; what is in `kept` is not measured again."""
    peers = peer_samplers.deterministic()
    rows = {}
    for target in (targets.TARGETS[name]() for name in names):
        net, noise = Exact(target), torch.from_numpy(targets.unit_noise(target))
        for process in (make() for make in targets.PROCESSES.values()):
            exact = targets.ends(target, process)
            cell = rows.setdefault(target.name, {}).setdefault(process.name, {})
            for peer in peers:
                if process.name in peer.processes:
                    known = kept.get(target.name, {}).get(process.name, {}).get(peer.name)
                    cell[peer.name] = known or row(peer, net, target, process, noise, exact)
            print(f"{target.name} {process.name}: {len(cell)} peers, {time.process_time():.0f} s", flush=True)
    return rows


def measure_stochastic():
    """On VP: `{peer: {nfe: [kl, calls]}}` on gauss16 and `{target: {peer: {nfe: [spread, weights]}}}`."""
    gauss, process, kl, law = targets.gauss16(), targets.vp(), {}, {}
    for peer in peer_samplers.stochastic():
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
            x = peer.run(net, noise, process, budget, peer_samplers.no_noise).numpy()
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
    parser.add_argument("--missing", action="store_true", help="only configurations that the file does not have")
    parser.add_argument("--no-stochastic", dest="stochastic", action="store_false")
    parser.add_argument("--serve", action="store_true", help="sample from the denoiser of the parent process")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if arguments.serve:
        return serve()
    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    rows = kept.get("rows", {}) | measure(arguments.targets, kept.get("rows", {}) if arguments.missing else {})
    kl, law = measure_stochastic() if arguments.stochastic else (kept.get("kl", {}), kept.get("law", {}))
    report = {
        "command": "python benchmarks/peers.py",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, one thread",
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
