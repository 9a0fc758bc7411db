"""Runs of PyTorch's optimisers on a small matrix, written as one file that the tests read.

    .venv-oracle/bin/python tests/parity/optimizers.py --out tests/parity/golden

A case holds the optimiser's arguments and the matrix [6, 4] after each of its steps. Needs torch, not jax.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

STEPS = 8
START = np.random.default_rng(3).normal(size=(6, 4))


def gradient(w, step, xp):
    """A gradient that depends on the matrix and on the step (from 0), the same in numpy, jax and torch."""
    return w - 0.3 + 0.5 * xp.sin(4 * w + 0.7 * step)


CASES = {
    "adamw": ("AdamW", dict(lr=0.05, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)),
    "sgd": ("SGD", dict(lr=0.05, momentum=0.9)),
    "adafactor": ("Adafactor", dict(lr=0.05, weight_decay=0.0)),
    "muon": ("Muon", dict(lr=0.05, momentum=0.95, nesterov=False, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")),
}


def run(name, settings):
    """The matrix after each step."""
    import torch

    # Muon's iteration would round to 8 bits, which hides an error of a percent. It writes to what this gives it.
    torch.Tensor.bfloat16 = lambda tensor: tensor.float().clone()
    w = torch.nn.Parameter(torch.from_numpy(START).float())
    optimizer = getattr(torch.optim, name)([w], **settings)
    states = []
    for step in range(STEPS):
        w.grad = gradient(w.detach(), step, torch)
        optimizer.step()
        states.append(w.detach().numpy().astype(np.float64).round(7).tolist())
    return states


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    folder = parser.parse_args().out
    import torch

    cases = {key: dict(torch=name, settings=kw, states=run(name, kw)) for key, (name, kw) in CASES.items()}
    text = json.dumps(dict(version=torch.__version__.split("+")[0], cases=cases))
    (folder / "optimizers.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
