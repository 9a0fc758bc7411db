"""Guidance away from a worse model: autoguidance and perturbed attention."""

from __future__ import annotations

from diffjax.core.types import Denoiser
from diffjax.guidance.blend import Scale, call, extrapolate, like, scale_at, split


def autoguidance(denoise: Denoiser, weak: Denoiser, scale: Scale) -> Denoiser:
    """Autoguidance, `weak + scale (main - weak)` (Karras et al. 2024, arXiv:2406.02507, section 4).

    Classifier-free guidance's line with a smaller or less trained model of the same condition in place of the
    unconditional one. Scale 1 is `denoise` bit for bit.

    Args:
      denoise: the model.
      weak: the worse one, same condition; both are called with [B, ...].
      scale: a number, an array [B], or a function of the level.

    Raises:
      ValueError: when called, for a scale of another shape.
    """

    def guided(x, level):
        return extrapolate(denoise(x, level), (scale_at("autoguidance", scale, x, level) - 1, weak(x, level)))

    return like(guided, denoise, weak)


def perturbed(denoise_pair: Denoiser, worse: Denoiser, cfg_scale: Scale, scale: Scale) -> Denoiser:
    """CFG plus guidance away from a damaged network: `cfg + scale (cond - worse)`.

    Perturbed-attention guidance (Ahn et al. 2024, arXiv:2403.17377), where `worse` has identity self-attention maps;
    smoothed-energy guidance (Hong 2024, arXiv:2408.00760), where they are blurred; skip-layer guidance, where layers
    are left out. Without CFG use `autoguidance(cond, worse, 1 + scale)`, which saves the unconditional call.

    Args:
      denoise_pair: as in `cfg`, [2B, ...].
      worse: the damaged network with the condition, [B, ...].
      cfg_scale: as in `cfg`; 1 is none.
      scale: as in these papers; 0 is none. A number, an array [B], or a function of the level, both.

    Raises:
      ValueError: when called, for a scale of another shape.
    """

    def guided(x, level):
        cond, uncond = split(call(denoise_pair, x, level, 2), 2)
        w, s = (scale_at("perturbed", a, x, level) for a in (cfg_scale, scale))
        return extrapolate(cond, (w - 1, uncond), (s, worse(x, level)))

    return like(guided, denoise_pair, worse)
