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


def call(kind, module, given):
    """The output of diffusers or transformers, images as `[B, H, W, C]`."""
    nchw, nhwc = (lambda a: a.permute(0, 3, 1, 2)), (lambda a: a.permute(0, 2, 3, 1))
    if kind == "CLIPTextModel":
        return module(given["ids"].long()).last_hidden_state
    if kind == "AutoencoderKL":
        return nhwc(module.decode(nchw(given["z"])).sample)
    x, t = nchw(given["x"]), given["t"].long()
    if kind == "DiTTransformer2DModel":
        return nhwc(module(x, t, given["y"].long()).sample)
    return nhwc(module(x, t, *([given["context"]] if "context" in given else [])).sample)


class Network:
    """A module, its inputs, and the two things that are timed."""

    def __init__(self, job):
        arrays = np.load(f"{job['folder']}/inputs.npz")
        self.kind, self.module = job["kind"], build(job["kind"], job["config"])
        self.given = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        self.module.save_pretrained(f"{job['folder']}/network")
        with torch.no_grad():
            output = call(self.kind, self.module, self.given)
        np.save(f"{job['folder']}/output.npy", output.numpy())
        self.probe = torch.from_numpy(np.random.default_rng(1).standard_normal(tuple(output.shape), np.float32))
        self.params = list(self.module.parameters())
        self.channels_last = self.kind in IMAGES and self.faster_so()

    def faster_so(self):
        times = []
        for memory_format in (torch.contiguous_format, torch.channels_last):
            self.module.to(memory_format=memory_format)
            self.time("both", 1)
            times.append(self.time("both", 3))
        if times[1] >= times[0]:
            self.module.to(memory_format=torch.contiguous_format)
        return times[1] < times[0]

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
            answer = {"torch": torch.__version__, "channels_last": network.channels_last}
        else:
            answer = {"ms": network.time(job["what"], job["steps"])}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
