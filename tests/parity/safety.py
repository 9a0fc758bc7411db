"""Decisions of diffusers' safety checkers near their thresholds, written as a file that the tests read.

    .venv-oracle/bin/python tests/parity/safety.py --out tests/parity/golden/safety.npz

The vision tower is replaced by embeddings that are given; thresholds lie around the cosines by steps as fine as the
rounding to thousandths that comes before the decision. Needs torch, diffusers and transformers, not jax.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.deepfloyd_if.safety_checker import IFSafetyChecker
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from transformers import CLIPConfig

WIDTH, COUNT = 4, 80
VISION = dict(
    hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=4, patch_size=4,
    projection_dim=WIDTH,
)  # fmt: skip
# Of a cosine above its threshold: rounded to thousandths above zero or not.
STEPS = (-0.02, -0.0106, -0.0104, -0.0096, -0.0094, -0.0006, -0.0004, 0.0, 0.0004, 0.0006)


class Given(torch.nn.Module):
    """In the place of a vision tower: its output is its input."""

    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, x):
        return (x,) * (self.index + 1)


def concepts(rng) -> dict[str, np.ndarray]:
    names = ("embeds", "concepts", "special", "thresholds", "special_thresholds", "nsfw")
    out: dict[str, list] = {name: [] for name in names}
    module = StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION, projection_dim=WIDTH)).eval()
    module.vision_model, module.visual_projection = Given(1), torch.nn.Identity()
    for _ in range(COUNT):
        embeds, rows, special = (np.float32(rng.standard_normal((count, WIDTH))) for count in (2, 17, 3))
        module.concept_embeds.data, module.special_care_embeds.data = torch.from_numpy(rows), torch.from_numpy(special)
        near, near_special = (
            cosine_distance(torch.from_numpy(embeds), torch.from_numpy(a)).numpy()[0] for a in (rows, special)
        )
        # One concept of the first image lies near its threshold, the others and the second image where they may.
        steps = np.where(np.arange(17) == rng.integers(17), rng.choice(STEPS), -0.5)
        thresholds = np.float32(near - steps)
        special_thresholds = np.float32(near_special - rng.choice((-0.5, *STEPS), 3))
        module.concept_embeds_weights.data = torch.from_numpy(thresholds)
        module.special_care_embeds_weights.data = torch.from_numpy(special_thresholds)
        flags = module(torch.from_numpy(embeds), np.ones((2, 1)))[1]
        row = (embeds, rows, special, thresholds, special_thresholds, flags)
        for name, value in zip(out, row, strict=True):
            out[name].append(value)
    return {f"concepts/{name}": np.stack(value) for name, value in out.items()}


def heads(rng) -> dict[str, np.ndarray]:
    """The first channel is the number of one head, the second that of the other."""
    module = IFSafetyChecker(CLIPConfig(vision_config=VISION)).eval()
    module.vision_model = Given(0)
    embeds = np.float32(rng.choice([0.4999999, 0.5, 0.50000006, -1.0, 0.7, 0.69999999], (30, WIDTH)))
    for head, i in ((module.p_head, 0), (module.w_head, 1)):
        head.weight.data, head.bias.data = torch.eye(WIDTH)[i : i + 1], torch.zeros(1)
    out = {"embeds": embeds[:, :2]}
    for name, given in (("default", {}), ("other", dict(p_threshold=0.7, w_threshold=-1.0))):
        said = module(torch.from_numpy(embeds), np.ones((30, 1)), **given)
        out |= {f"{name}/{what}": value for what, value in zip(("images", "nsfw", "watermark"), said, strict=True)}
    return {f"heads/{name}": np.asarray(value) for name, value in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    rng = np.random.Generator(np.random.Philox(key=1))
    np.savez_compressed(parser.parse_args().out, **concepts(rng), **heads(rng))


if __name__ == "__main__":
    main()
