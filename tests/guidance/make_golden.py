"""Writes golden_guiders.npz from diffusers' guiders and schedulers; needs torch and diffusers (0.42.1 wrote the file).

python tests/guidance/make_golden.py
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    PerturbedAttentionGuidance,
)
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

STEPS = 3


def main():
    rng = np.random.default_rng(0)
    draw = lambda: rng.normal(size=(STEPS, 2, 3, 4, 5)).round(3)
    data = {"cond": draw(), "uncond": draw(), "worse": draw()}
    cond, uncond, worse = (torch.tensor(data[k]) for k in ("cond", "uncond", "worse"))
    common = {"guidance_scale": 3.0, "start": 0.0, "stop": 1.0}

    def run(guider, *extra):
        out = []
        for step in range(STEPS):
            guider.set_state(step=step, num_inference_steps=STEPS, timestep=torch.tensor(0))
            out.append(guider.forward(cond[step], uncond[step], *(e[step] for e in extra)).pred.numpy())
        return np.stack(out)

    data["cfg"] = run(ClassifierFreeGuidance(**common))
    data["rescale"] = run(ClassifierFreeGuidance(guidance_rescale=0.7, **common))
    # The paper's formulation adds scale - 1 times the update to the conditional prediction.
    apg = {"eta": 0.25, "adaptive_projected_guidance_rescale": 5.0, "use_original_formulation": True}
    apg |= common | {"guidance_scale": common["guidance_scale"] - 1}
    data["apg"] = run(AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=None, **apg))
    guider = AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5, **apg)
    guider.momentum_buffer = MomentumBuffer(-0.5)
    data["apg_momentum"] = run(guider)
    data["zero_star"] = run(ClassifierFreeZeroStarGuidance(zero_init_steps=1, **common))
    pag = PerturbedAttentionGuidance(
        perturbed_guidance_scale=1.5,
        perturbed_guidance_layers=0,
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
        **common,
    )
    data["pag"] = run(pag, worse)
    scheduler = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=4.5)
    data["threshold"] = torch.stack([scheduler._threshold_sample(3 * c) for c in cond]).numpy()
    np.savez_compressed(Path(__file__).with_name("golden_guiders.npz"), **data)


if __name__ == "__main__":
    main()
