"""U-ViT in PyTorch: what the published class computes (baofff/U-ViT, `libs/uvit.py` and `libs/uvit_t2i.py`), under its
names. No package has it, so it is restated here."""

import json
import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width, heads, bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        # The columns of the product: first q, k or v, then the head, then its channels.
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads, hidden, bias, skip=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, bias)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class UViT(nn.Module):
    def __init__(self, **config):
        super().__init__()
        self.config = config
        c = {
            "img_size": 224, "patch_size": 16, "in_chans": 3, "embed_dim": 768, "depth": 12, "num_heads": 12,
            "mlp_ratio": 4.0, "qkv_bias": False, "mlp_time_embed": False, "num_classes": -1, "conv": True,
            "skip": True, "clip_dim": None, "num_clip_token": 77,
        } | config  # fmt: skip
        self.patch, self.channels, width = c["patch_size"], c["in_chans"], c["embed_dim"]
        sizes = width, c["num_heads"], int(width * c["mlp_ratio"]), c["qkv_bias"]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(self.channels, width, self.patch, stride=self.patch)})
        self.time_embed = nn.Identity()
        if c["mlp_time_embed"]:
            self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.extras = 1
        if c["num_classes"] > 0:
            self.label_emb = nn.Embedding(c["num_classes"], width)
            self.extras += 1
        if c["clip_dim"] is not None:
            self.context_embed = nn.Linear(c["clip_dim"], width)
            self.extras += c["num_clip_token"]
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + (c["img_size"] // self.patch) ** 2, width))
        half = c["depth"] // 2
        self.in_blocks = nn.ModuleList(Block(*sizes) for _ in range(half))
        self.mid_block = Block(*sizes)
        self.out_blocks = nn.ModuleList(Block(*sizes, skip=c["skip"]) for _ in range(half))
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, self.patch**2 * self.channels)
        self.final_layer = nn.Conv2d(self.channels, self.channels, 3, padding=1) if c["conv"] else nn.Identity()

    @property
    def dtype(self):
        return self.pos_embed.dtype

    def forward(self, x, t, y=None, context=None):
        patches = self.patch_embed["proj"](x)
        side = patches.shape[-1]
        tokens = [self.time_embed(self.waves(t).to(self.dtype)).unsqueeze(1)]
        if y is not None:
            tokens.insert(0, self.label_emb(y).unsqueeze(1))
        if context is not None:
            tokens.append(self.context_embed(context))
        h = torch.cat([*tokens, patches.flatten(2).transpose(1, 2)], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            h = block(h)
            skips.append(h)
        h = self.mid_block(h)
        for block in self.out_blocks:
            h = block(h, skips.pop())
        h = self.decoder_pred(self.norm(h))[:, self.extras :]
        # Pixels of a patch row by row, channels last.
        h = h.reshape(len(h), side, side, self.patch, self.patch, self.channels).permute(0, 5, 1, 3, 2, 4)
        return self.final_layer(h.reshape(len(h), self.channels, side * self.patch, side * self.patch))

    def waves(self, t):
        width = self.pos_embed.shape[-1]
        half = width // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half)
        phases = t[:, None].float() * frequencies
        return F.pad(torch.cat([phases.cos(), phases.sin()], dim=-1), (0, width % 2))

    def save_pretrained(self, folder):
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"_class_name": "UViT", **self.config}))
        save_file(self.state_dict(), folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
