"""EDM2UNet: the semantics of NVIDIA's training/networks_edm2.py, restated for PyTorch."""

from networks import Case, nchw, nhwc

KIND = "EDM2UNet"


def _case(batch=2, size=8, **config):
    classes = config["label_dim"]
    inputs = {"x": ("normal", (batch, size, size, config["img_channels"])), "t": ("normal", (batch,))}
    inputs |= {"y": ("integers", (batch,), classes + 1)} if classes else {}
    return Case(KIND, config, inputs, gradients=True)


CASES = {
    "edm2": _case(
        img_resolution=8, img_channels=2, label_dim=3, model_channels=16, channel_mult=[1, 2], num_blocks=1,
        attn_resolutions=[4], channels_per_head=8, logvar_channels=8,
    ),
}  # fmt: skip


def build(case):
    return statement()(**case.config)


def statement():
    """The class, made here so that the import needs no torch."""
    import json

    import torch
    from safetensors.torch import save_file
    from torch import nn
    from torch.nn import functional as F

    def rms_scaled(x, dims):
        rms = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
        count = x.numel() / rms.numel()
        return x / (1e-4 + rms / count**0.5).to(x.dtype)

    def silu(x):
        return F.silu(x) / 0.596

    def blend(a, b, t):
        return torch.lerp(a, b, t) / ((1 - t) ** 2 + t**2) ** 0.5

    class Waves(nn.Module):
        def __init__(self, count):
            super().__init__()
            self.register_buffer("freqs", 2 * torch.pi * torch.randn(count))
            self.register_buffer("phases", 2 * torch.pi * torch.rand(count))

        def forward(self, t):
            phase = torch.outer(t.float(), self.freqs.float()) + self.phases.float()
            return (phase.cos() * 2**0.5).to(t.dtype)

    class Layer(nn.Module):
        def __init__(self, ins, outs, *window):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(outs, ins, *window))

        def forward(self, x, gain=1.0):
            w = rms_scaled(self.weight.float(), tuple(range(1, self.weight.ndim)))
            w = (w * (gain / w[0].numel() ** 0.5)).to(x.dtype)
            return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)

    class Block(nn.Module):
        def __init__(self, ins, outs, emb, c, flavor, mode="keep", attention=False):
            super().__init__()
            # Away from the zero that a new network has.
            self.emb_gain = nn.Parameter(torch.randn([]))
            self.conv_res0 = Layer(outs if flavor == "enc" else ins, outs, 3, 3)
            self.emb_linear = Layer(emb, outs)
            self.conv_res1 = Layer(outs, outs, 3, 3)
            self.conv_skip = Layer(ins, outs, 1, 1) if ins != outs else None
            self.heads = outs // c["channels_per_head"] if attention else 0
            if self.heads:
                self.attn_qkv, self.attn_proj = Layer(outs, 3 * outs, 1, 1), Layer(outs, outs, 1, 1)
            self.c, self.flavor, self.mode = c, flavor, mode

        def resample(self, x):
            f = torch.tensor(self.c["resample_filter"], dtype=torch.float32)
            f = torch.outer(f / f.sum(), f / f.sum()).to(x.dtype).repeat(x.shape[1], 1, 1, 1)
            given = dict(groups=x.shape[1], stride=2, padding=(f.shape[-1] - 1) // 2)
            if self.mode == "down":
                return F.conv2d(x, f, **given)
            return F.conv_transpose2d(x, 4 * f, **given) if self.mode == "up" else x

        def forward(self, x, emb):
            x = self.resample(x)
            if self.flavor == "enc":
                x = x if self.conv_skip is None else self.conv_skip(x)
                x = rms_scaled(x, (1,))
            scale = self.emb_linear(emb, self.emb_gain) + 1
            h = silu(self.conv_res0(silu(x)) * scale[:, :, None, None].to(x.dtype))
            h = self.conv_res1(h)
            if self.flavor == "dec" and self.conv_skip is not None:
                x = self.conv_skip(x)
            x = blend(x, h, self.c["res_balance"])
            if self.heads:
                qkv = self.attn_qkv(x).flatten(2).unflatten(1, (self.heads, -1, 3))
                q, k, v = rms_scaled(qkv, (2,)).unbind(3)
                weights = (q.transpose(2, 3) @ k / q.shape[2] ** 0.5).softmax(-1)
                mixed = (v @ weights.transpose(2, 3)).reshape(x.shape)
                x = blend(x, self.attn_proj(mixed), self.c["attn_balance"])
            limit = self.c["clip_act"]
            return x if limit is None else x.clamp(-limit, limit)

    defaults = dict(
        model_channels=192, channel_mult=[1, 2, 3, 4], channel_mult_noise=None, channel_mult_emb=None, num_blocks=3,
        attn_resolutions=[16, 8], label_balance=0.5, concat_balance=0.5, resample_filter=[1, 1], channels_per_head=64,
        dropout=0, res_balance=0.3, attn_balance=0.3, clip_act=256, logvar_channels=128,
    )  # fmt: skip

    class EDM2UNet(nn.Module):
        def __init__(self, **config):
            super().__init__()
            self.config = c = defaults | config
            widths = [c["model_channels"] * mult for mult in c["channel_mult"]]
            noise, emb = (
                c["model_channels"] * c[name] if c[name] is not None else width
                for name, width in (("channel_mult_noise", widths[0]), ("channel_mult_emb", max(widths)))
            )
            self.out_gain = nn.Parameter(torch.ones([]))
            self.emb_fourier, self.emb_noise = Waves(noise), Layer(noise, emb)
            self.emb_label = Layer(c["label_dim"], emb) if c["label_dim"] else None
            self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
            now, skips = c["img_channels"] + 1, []
            for level, width in enumerate(widths):
                res = c["img_resolution"] >> level
                if level:
                    self.enc[f"{res}x{res}_down"] = Block(now, now, emb, c, "enc", "down")
                else:
                    self.enc[f"{res}x{res}_conv"] = Layer(now, width, 3, 3)
                    now = width
                skips.append(now)
                for i in range(c["num_blocks"]):
                    attention = res in c["attn_resolutions"]
                    self.enc[f"{res}x{res}_block{i}"] = Block(now, width, emb, c, "enc", "keep", attention)
                    now = width
                    skips.append(now)
            for level in reversed(range(len(widths))):
                res, width = c["img_resolution"] >> level, widths[level]
                if level == len(widths) - 1:
                    self.dec[f"{res}x{res}_in0"] = Block(now, now, emb, c, "dec", "keep", True)
                    self.dec[f"{res}x{res}_in1"] = Block(now, now, emb, c, "dec")
                else:
                    self.dec[f"{res}x{res}_up"] = Block(now, now, emb, c, "dec", "up")
                for i in range(c["num_blocks"] + 1):
                    attention = res in c["attn_resolutions"]
                    self.dec[f"{res}x{res}_block{i}"] = Block(
                        now + skips.pop(), width, emb, c, "dec", "keep", attention
                    )
                    now = width
            self.out_conv = Layer(now, c["img_channels"], 3, 3)
            if c["logvar_channels"]:
                self.logvar_fourier = Waves(c["logvar_channels"])
                self.logvar_linear = Layer(c["logvar_channels"], 1)

        def forward(self, x, t, labels):
            c = self.config
            emb = self.emb_noise(self.emb_fourier(t))
            if self.emb_label is not None:
                emb = blend(emb, self.emb_label(labels * c["label_dim"] ** 0.5), c["label_balance"])
            emb = silu(emb)
            x, skips = torch.cat([x, torch.ones_like(x[:, :1])], 1), []
            for name, part in self.enc.items():
                x = part(x) if name.endswith("conv") else part(x, emb)
                skips.append(x)
            t = c["concat_balance"]
            for name, part in self.dec.items():
                if "block" in name:
                    y = skips.pop()
                    both = ((x.shape[1] + y.shape[1]) / ((1 - t) ** 2 + t**2)) ** 0.5
                    shares = both * (1 - t) / x.shape[1] ** 0.5, both * t / y.shape[1] ** 0.5
                    x = torch.cat([shares[0] * x, shares[1] * y], 1)
                x = part(x, emb)
            return self.out_conv(x, self.out_gain)

        def logvar(self, t):
            return self.logvar_linear(self.logvar_fourier(t))[:, 0]

        def save_pretrained(self, folder):
            folder.mkdir(parents=True)
            save_file(self.state_dict(), folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
            (folder / "config.json").write_text(json.dumps({"_class_name": KIND, **self.config}))

    return EDM2UNet


def theirs(module, given):
    import torch

    classes, t = module.config["label_dim"], given["t"]
    labels = None
    if classes:
        # One class more for no class, whose row is zero.
        labels = torch.nn.functional.one_hot(given["y"].long(), classes + 1)[:, :classes].to(t.dtype)
    out = {"out": nhwc(module(nchw(given["x"]), t, labels))}
    return out | ({"logvar": module.logvar(t)} if module.config["logvar_channels"] else {})


def ours(model, params, given):
    out = {"out": model.apply(params, given["x"], given["t"], given.get("y"))}
    if model.config.get("logvar_channels", 128):
        out["logvar"] = model.apply(params, given["t"], method="logvar")
    return out


def random_case(rng):
    size = int(rng.choice([8, 16]))
    one = lambda *values: values[rng.integers(len(values))]
    return _case(
        size=size,
        img_resolution=size,
        img_channels=int(rng.integers(1, 5)),
        label_dim=int(rng.choice([0, 5])),
        model_channels=one(8, 16),
        channel_mult=one([1, 2], [1, 2, 3], [2], [1, 1, 2]),
        channel_mult_noise=one(None, 1, 2),
        channel_mult_emb=one(None, 3),
        num_blocks=int(rng.integers(1, 3)),
        attn_resolutions=one([], [8], [4, 8]),
        label_balance=one(0.5, 0.3),
        concat_balance=one(0.5, 0.4),
        resample_filter=one([1, 1], [1, 3, 3, 1], [1, 2]),
        channels_per_head=one(4, 8, 64),
        dropout=one(0, 0.1),
        res_balance=one(0.3, 0.5),
        attn_balance=one(0.3, 0.4),
        clip_act=one(256, None, 0.5),
        logvar_channels=one(128, 16, 0),
    )
