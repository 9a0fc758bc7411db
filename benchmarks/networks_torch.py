"""PyTorch's half of `networks.py`: classes of diffusers and transformers, forward and backward; no jax here.

`networks.py` starts it and speaks to it in lines of JSON: a folder with inputs and a class to build, whose weights and
output it leaves there, then numbers of steps to time.
"""

import json
import statistics
import sys
import time

import diffusers
import numpy as np
import torch
import transformers

# A result in either memory format is the same; the faster one is measured.
IMAGES = ("UNet2DModel", "UNet2DConditionModel", "AutoencoderKL")
FORMATS = (torch.contiguous_format, torch.channels_last)


def build(kind, config):
    """A module with its own initial weights, and noise on top: what starts at zero would hide what is behind it."""
    torch.manual_seed(0)
    if hasattr(diffusers, kind):
        module = getattr(diffusers, kind)(**config)
    else:
        cls = getattr(transformers, kind)
        module = cls(cls.config_class(**config))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return module.eval()


def inputs_of(path):
    """The arrays of a file as PyTorch takes them: images `[B, C, H, W]`, whole numbers of 64 bits."""
    arrays = np.load(path)
    images = lambda a: a.permute(0, 3, 1, 2) if a.ndim == 4 else a
    tensors = {name: images(torch.from_numpy(arrays[name])).contiguous() for name in arrays.files}
    return {name: a if a.is_floating_point() else a.long() for name, a in tensors.items()}


def call(kind, module, given):
    """The output of diffusers or transformers, images as `[B, H, W, C]`."""
    nhwc = lambda a: a.permute(0, 2, 3, 1)
    if kind == "CLIPTextModel":
        return module(given["ids"]).last_hidden_state
    if kind == "AutoencoderKL":
        return nhwc(module.decode(given["z"]).sample)
    return nhwc(module(given["x"], given["t"], *(given[name] for name in ("y", "context") if name in given)).sample)


class Network:
    """A module, its inputs, and the two things that are timed."""

    def __init__(self, job):
        self.kind, self.module = job["kind"], build(job["kind"], job["config"])
        self.given = inputs_of(f"{job['folder']}/inputs.npz")
        self.module.save_pretrained(f"{job['folder']}/network")
        with torch.no_grad():
            output = call(self.kind, self.module, self.given)
        np.save(f"{job['folder']}/output.npy", output.numpy())
        self.probe = torch.from_numpy(np.random.default_rng(1).standard_normal(tuple(output.shape), np.float32))
        self.params = list(self.module.parameters())
        self.norm = float(torch.sqrt(sum(g.square().sum() for g in self.both() if g is not None)))
        self.ms = {str(f): self.timed_in(f) for f in FORMATS} if self.kind in IMAGES else {}
        self.format = min(FORMATS, key=lambda f: self.ms.get(str(f), 0.0))
        self.turn(self.format)

    def turn(self, memory_format):
        """Weights and images into a memory format."""
        self.module.to(memory_format=memory_format)
        images = lambda a: a.contiguous(memory_format=memory_format) if a.ndim == 4 else a
        self.given = {name: images(a) for name, a in self.given.items()}

    def timed_in(self, memory_format):
        """Milliseconds of forward and backward."""
        self.turn(memory_format)
        self.time("both", 1)
        return self.time("both", 3)

    def forward(self):
        with torch.no_grad():
            return call(self.kind, self.module, self.given)

    def both(self):
        loss = (call(self.kind, self.module, self.given) * self.probe).sum()
        # An autoencoder's encoder has no part in this.
        return torch.autograd.grad(loss, self.params, allow_unused=True)

    def time(self, what, steps):
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            getattr(self, what)()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)


def main():
    torch.set_num_threads(int(sys.argv[1]))
    network, out = None, sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        job = json.loads(line)
        if "folder" in job:
            network = Network(job)
            answer = {"torch": torch.__version__, "format": str(network.format), "norm": network.norm}
        else:
            answer = {"ms": network.time(job["what"], job["steps"])}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
