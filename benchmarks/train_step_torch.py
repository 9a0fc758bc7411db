"""PyTorch's half of `train_step.py`: the same networks, written for PyTorch; runs where PyTorch is, without jax.

`train_step.py` starts it and speaks to it in lines of JSON: a job with a file of parameters, then numbers of steps to
time. Linear layers, convolutions (channels last), normalisations and attention are PyTorch's own fused ones.
"""

import json
import math
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F


class Net:
    """Parameters under the names of diffjax, in the layouts of PyTorch, and the two networks as functions of them."""

    def __init__(self, arrays, model, shape):
        self.model, self.shape, self.p = model, shape, {}
        for name, array in arrays.items():
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            # One parameter a block: the gradient of a slice of a stack would be a stack of zeros.
            first, _, rest = name.partition("/")
            parts = {f"blocks/{i}/{rest}": t for i, t in enumerate(tensor)} if first == "blocks" else {name: tensor}
            for key, part in parts.items():
                self.p[key] = torch.nn.Parameter(self.converted(key, part))
        if model["name"] == "dit":
            self.places = self.positions(*(side // model["patch"] for side in shape[:2]), model["width"])

    @staticmethod
    def converted(name, tensor):
        if not name.endswith("kernel"):
            return tensor.clone()
        if tensor.ndim == 4:
            return tensor.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
        return tensor.T.contiguous()

    def linear(self, name, x):
        return F.linear(x, self.p[name + "/kernel"], self.p[name + "/bias"])

    def cond(self, t, y, waves):
        half = waves // 2
        phase = 1000 * t[:, None] * torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device) / half)
        h = self.linear("cond/hidden", torch.cat([phase.cos(), phase.sin()], -1))
        h = self.linear("cond/out", F.silu(h)) + F.embedding(y, self.p["cond/label/embedding"])
        return F.silu(h)

    def attention(self, name, x, heads):
        b, t, c = x.shape
        qkv = self.linear(name + "/qkv", x).view(b, t, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.linear(name + "/out", mixed.transpose(1, 2).reshape(b, t, c))

    def dit(self, x, t, y):
        m, (b, h, w, c) = self.model, x.shape
        patch, width, heads = m["patch"], m["width"], m["heads"]
        rows, columns = h // patch, w // patch
        cond = self.cond(t, y, 256)
        tokens = x.reshape(b, rows, patch, columns, patch, c).permute(0, 1, 3, 2, 4, 5).reshape(b, rows * columns, -1)
        z = self.linear("inp", tokens) + self.places
        norm = lambda z, shift, scale: F.layer_norm(z, (width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        for block in (f"blocks/{i}" for i in range(m["depth"])):
            shift, scale, gate = self.linear(block + "/modulation", cond).chunk(3, -1)
            z = z + gate[:, None] * self.attention(block + "/attention", norm(z, shift, scale), heads)
            shift, scale, gate = self.linear(block + "/mlp/modulation", cond).chunk(3, -1)
            hidden = F.gelu(self.linear(block + "/mlp/up", norm(z, shift, scale)), approximate="tanh")
            z = z + gate[:, None] * self.linear(block + "/mlp/down", hidden)
        shift, scale = self.linear("modulation", cond).chunk(2, -1)
        out = self.linear("out", norm(z, shift, scale))
        return out.reshape(b, rows, columns, patch, patch, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)

    @staticmethod
    def positions(rows, columns, dim):
        f = 10_000.0 ** (-torch.arange(dim // 4) / (dim / 4))
        r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        phases = [c.reshape(-1, 1) * f, r.reshape(-1, 1) * f]
        return torch.cat([wave(phase) for phase in phases for wave in (torch.sin, torch.cos)], 1)

    def conv(self, name, x):
        w = self.p[name + "/kernel"]
        return F.conv2d(x, w, self.p[name + "/bias"], padding=w.shape[-1] // 2)

    def group_norm(self, name, x):
        return F.group_norm(x, self.model["groups"], self.p[name + "/scale"], self.p[name + "/bias"], eps=1e-5)

    def resblock(self, name, x, cond, resample):
        h = resample(F.silu(self.group_norm(name + "/norm1", x)))
        h = self.conv(name + "/conv1", h)
        scale, shift = (a[..., None, None] for a in self.linear(name + "/film", cond).chunk(2, -1))
        h = self.conv(name + "/conv2", F.silu(self.group_norm(name + "/norm2", h) * (1 + scale) + shift))
        x = resample(x)
        return h + (self.conv(name + "/skip", x) if name + "/skip/kernel" in self.p else x)

    def pixels(self, name, x):
        b, c, h, w = x.shape
        tokens = self.group_norm(name + "/norm", x).flatten(2).transpose(1, 2)
        out = self.attention(name + "/attention", tokens, c // self.model["head_width"])
        return x + out.transpose(1, 2).reshape(b, c, h, w)

    def unet(self, x, t, y):
        m, size = self.model, x.shape[1]
        cond, count = self.cond(t, y, m["width"]), len(m["mults"])
        same, down = lambda a: a, lambda a: F.avg_pool2d(a, 2)
        up = lambda a: F.interpolate(a, scale_factor=2, mode="nearest")
        name = lambda part, i, rest: f"{part}/{size >> i}x{size >> i}_{rest}"
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        h = self.conv("inp", x)
        skips = [h]
        for i in range(count):
            if i:
                h = self.resblock(name("enc", i, "down"), h, cond, down)
                skips.append(h)
            for j in range(m["blocks"]):
                h = self.resblock(name("enc", i, f"block{j}"), h, cond, same)
                if size >> i in m["attention"]:
                    h = self.pixels(name("enc", i, f"attention{j}"), h)
                skips.append(h)
        h = self.resblock("mid/block0", h, cond, same)
        h = self.resblock("mid/block1", self.pixels("mid/attention", h), cond, same)
        for i in reversed(range(count)):
            for j in range(m["blocks"] + 1):
                h = self.resblock(name("dec", i, f"block{j}"), torch.cat([h, skips.pop()], 1), cond, same)
                if size >> i in m["attention"]:
                    h = self.pixels(name("dec", i, f"attention{j}"), h)
            if i:
                h = self.resblock(name("dec", i, "up"), h, cond, up)
        return self.conv("out", F.silu(self.group_norm("norm", h))).permute(0, 2, 3, 1)

    def __call__(self, x, t, y):
        return getattr(self, self.model["name"])(x, t, y)


class Training:
    """Flow matching with AdamW and an average of the parameters: the step of the config in `train_step.py`."""

    def __init__(self, job):
        arrays = np.load(job["file"])
        held = {name[6:]: arrays[name] for name in arrays.files if name.startswith("param:")}
        self.net = Net(held, job["model"], tuple(job["shape"][1:]))
        self.image, self.label = torch.from_numpy(arrays["image"]), torch.from_numpy(arrays["label"]).long()
        self.fixed = [torch.from_numpy(arrays[name]) for name in ("x", "t")]
        self.params = list(self.net.p.values())
        self.average = [p.detach().clone() for p in self.params]
        self.null, self.drop = job["num_classes"], job["label_dropout"]
        self.optimizer = torch.optim.AdamW(
            self.params, lr=job["lr"], betas=(job["b1"], job["b2"]), eps=job["eps"], weight_decay=job["weight_decay"],
            fused=True,
        )  # fmt: skip

    def output(self):
        """The network's output on the batch that both sides know."""
        with torch.no_grad():
            return self.net(self.fixed[0], self.fixed[1], self.label).numpy()

    def step(self):
        x0, n = self.image, len(self.image)
        t, eps = torch.rand(n), torch.randn_like(x0)
        y = torch.where(torch.rand(n) < self.drop, self.null, self.label)
        at = t[:, None, None, None]
        loss = F.mse_loss(self.net((1 - at) * x0 + at * eps, t, y), eps - x0)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.params, 1e-4)
        return loss


def main():
    torch.set_num_threads(int(sys.argv[1]))
    training = None
    for line in sys.stdin:
        job = json.loads(line)
        if "file" in job:
            training = Training(job)
            np.save(job["output"], training.output())
            answer = {"parameters": sum(p.numel() for p in training.params), "torch": torch.__version__}
        else:
            times = []
            for _ in range(job["steps"]):
                start = time.perf_counter()
                training.step()
                times.append(1e3 * (time.perf_counter() - start))
            answer = {"ms": statistics.median(times)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
