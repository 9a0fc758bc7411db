"""A run of the official DiT, restated for PyTorch, written as a small file that the tests read.

    .venv-oracle/bin/python tests/parity/official_dit.py --out tests/parity/golden/official_dit.npz
    .venv-oracle/bin/python tests/parity/official_dit.py --out FOLDER --seed 7 --count 5        random ones

The weights are drawn from their names (`networks.weight`), those of random runs are saved beside them. The output
of diffusers' class with the same weights is recorded beside it. Needs torch and diffusers, not jax.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import networks
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

TINY = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=5)


class Time(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        frequencies = torch.exp(-np.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        phase = t[:, None].float() * frequencies
        return self.mlp(torch.cat([phase.cos(), phase.sin()], -1).to(self.mlp[0].weight.dtype))


class Labels(nn.Module):
    def __init__(self, count, width):
        super().__init__()
        self.embedding_table = nn.Embedding(count + 1, width)


class Patches(nn.Module):
    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulated(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def modulation(width, parts):
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class Block(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.attn, self.mlp = Attention(width, heads), Perceptron(width, hidden)
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x, c):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate[:, None] * self.attn(modulated(x, shift, scale))
        return x + gate_mlp[:, None] * self.mlp(modulated(x, shift_mlp, scale_mlp))


class Final(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.linear, self.adaLN_modulation = nn.Linear(width, outputs), modulation(width, 2)

    def forward(self, x, c):
        return self.linear(modulated(x, *self.adaLN_modulation(c).chunk(2, 1)))


class DiT(nn.Module):
    def __init__(
        self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes, mlp_ratio=4.0,
        learn_sigma=True,
    ):  # fmt: skip
        super().__init__()
        self.patch, self.side, self.out = patch_size, input_size // patch_size, in_channels * (1 + learn_sigma)
        self.x_embedder = Patches(in_channels, hidden_size, patch_size)
        self.t_embedder, self.y_embedder = Time(hidden_size), Labels(num_classes, hidden_size)
        self.pos_embed = nn.Parameter(self.positions(hidden_size), requires_grad=False)
        hidden = int(hidden_size * mlp_ratio)
        self.blocks = nn.ModuleList([Block(hidden_size, num_heads, hidden) for _ in range(depth)])
        self.final_layer = Final(hidden_size, patch_size**2 * self.out)

    def positions(self, width):
        """Columns in the first half of the channels, rows in the second; sines first in each."""
        axis = np.arange(self.side, dtype=np.float32)
        columns, rows = np.meshgrid(axis, axis)
        omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
        waves = []
        for grid in (columns, rows):
            phase = np.einsum("m,d->md", grid.reshape(-1), omega)
            waves += [np.sin(phase), np.cos(phase)]
        return torch.from_numpy(np.concatenate(waves, axis=1)).float()[None]

    def forward(self, x, t, y):
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).unflatten(1, (self.side, self.side)).unflatten(-1, (self.patch, self.patch, -1))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # [B, C, H, W]


def run(name, settings, seed=None):
    """The module and arrays of one run, with gradients for every parameter."""
    torch.manual_seed(seed or 0)
    module = DiT(**settings)
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            drawn = torch.from_numpy(networks.weight(key, tuple(parameter.shape)))
            parameter.data = drawn if seed is None else parameter.data + 0.05 * torch.randn_like(parameter)
    size, channels, classes = (settings[key] for key in ("input_size", "in_channels", "num_classes"))
    specs = {"x": ("normal", (2, size, size, channels)), "t": ("times", 2), "y": ("integers", (2,), classes + 1)}
    given = {key: networks.draw(name, key, spec) for key, spec in specs.items()}
    x, t, y = (torch.from_numpy(value) for value in given.values())
    out = networks.nhwc(module(networks.nchw(x), t, y.long()))
    probe = torch.from_numpy(networks.draw(name, "probe", ("normal", tuple(out.shape))))
    (out * probe).sum().backward()
    arrays = {f"in/{key}": value for key, value in given.items()} | {"out": out.detach().numpy(), "probe": probe}
    if settings.get("mlp_ratio", 4.0) == 4.0:  # diffusers has no other
        other = networks.nhwc(diffusers_of(module, settings)(networks.nchw(x), t, y.long()).sample.detach())
        # The same operations, but for the products of queries, keys and values, which are one here.
        assert (other - out).abs().max() < 1e-5
        arrays["diffusers"] = other.numpy()
    gradients = {f"gradient/{key}": p.grad.numpy() for key, p in module.named_parameters() if p.requires_grad}
    module.zero_grad()
    (networks.nhwc(module.double()(networks.nchw(x.double()), t, y.long())) * probe).sum().backward()
    wide = {f"gradient/{key}": p.grad.numpy() for key, p in module.named_parameters() if p.requires_grad}
    lost = {f"rounding/{key.partition('/')[2]}": np.abs(wide[key] - v).max() for key, v in gradients.items()}
    return module.float(), arrays | {k: np.float32(v) for k, v in wide.items()} | lost | {"facts": json.dumps(settings)}


def diffusers_of(module, settings):
    """The same network as diffusers has it, whose frequencies of the time end elsewhere if one lets them."""
    import diffusers

    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=settings["num_heads"], attention_head_dim=settings["hidden_size"] // settings["num_heads"],
        in_channels=settings["in_channels"], out_channels=module.out, num_layers=settings["depth"], norm_eps=1e-6,
        sample_size=settings["input_size"], patch_size=settings["patch_size"], norm_num_groups=1,
        num_embeds_ada_norm=settings["num_classes"],
    ).eval()  # fmt: skip
    state, ours = theirs.state_dict(), module.state_dict()
    ends = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1"}
    ends["proj_out_2"] = "final_layer.linear"
    for i, block in enumerate(theirs.transformer_blocks):
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        a, b = f"transformer_blocks.{i}", f"blocks.{i}"
        ends |= {f"{a}.norm1.linear": f"{b}.adaLN_modulation.1", f"{a}.attn1.to_out.0": f"{b}.attn.proj"}
        ends |= {f"{a}.ff.net.0.proj": f"{b}.mlp.fc1", f"{a}.ff.net.2": f"{b}.mlp.fc2"}
        emb = f"{a}.norm1.emb"
        ends |= {f"{emb}.timestep_embedder.linear_{j}": f"t_embedder.mlp.{2 * j - 2}" for j in (1, 2)}
        state[f"{emb}.class_embedder.embedding_table.weight"] = ours["y_embedder.embedding_table.weight"]
        for kind in ("weight", "bias"):
            parts = ours[f"{b}.attn.qkv.{kind}"].chunk(3)
            state |= {f"{a}.attn1.to_{c}.{kind}": part for c, part in zip("qkv", parts, strict=True)}
    state |= {f"{a}.{kind}": ours[f"{b}.{kind}"] for a, b in ends.items() for kind in ("weight", "bias")}
    theirs.load_state_dict(state)
    return theirs


def random_settings(rng):
    heads = int(rng.integers(1, 4))
    return dict(
        input_size=int(rng.choice([4, 8])), patch_size=int(rng.choice([2, 4])), in_channels=int(rng.integers(1, 5)),
        hidden_size=heads * int(rng.choice([4, 8])), depth=int(rng.integers(1, 4)), num_heads=heads,
        num_classes=int(rng.integers(1, 6)), mlp_ratio=float(rng.choice([2.0, 4.0])),
        learn_sigma=bool(rng.integers(2)),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a file, or a folder for random runs")
    parser.add_argument("--count", type=int, default=0, help="random runs; 0 for the committed one")
    parser.add_argument("--seed", type=int, default=0, help="of the random runs")
    arguments = parser.parse_args()
    if not arguments.count:
        _, arrays = run("official_dit", TINY)
        np.savez_compressed(arguments.out, **arrays)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    rng = networks.generator(f"official_dit/{arguments.seed}")
    for i in range(arguments.count):
        module, arrays = run(f"official-{i}", random_settings(rng), arguments.seed + i + 1)
        np.savez(arguments.out / f"{i}.npz", **arrays)
        save_file(module.state_dict(), arguments.out / f"{i}.safetensors")


if __name__ == "__main__":
    main()
