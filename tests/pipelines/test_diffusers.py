"""Whole pipelines against diffusers' runs (`tests/parity/pipelines.py`): prompts to images, from the same folders.

Each is put together from parts, as a user would: `convert.load` for each network, `load_tokenizer`,
`convert.scheduler`, `guidance.cfg`, `sample`, and the VAE's decoder. `make parity` runs the live ones.
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import stable_diffusion

import diffjax as dj
from diffjax.convert import load, scheduler, start_scale
from diffjax.data.tokenizers import load_tokenizer
from diffjax.models.autoencoders import from_latents, posterior, to_latents
from diffjax.models.transformers import flux
from diffjax.pipelines import prompts
from diffjax.pipelines.prompts import TextEncoder

# One call of these networks differs by some 3e-7 of outputs of size 1. Guidance at 7.5 makes that 4e-6 at most, 5 steps
# add up parts of it, and the decoder halves its output of [-1, 1]: 1e-5 in all. The largest of 50 random runs had 5e-6.
TOLERANCE = 2e-5
PARITY = Path(__file__).parent.parent / "parity"
LIVE = os.environ.get("DIFFJAX_PARITY")
FOLDERS = sorted(Path(LIVE, "pipelines").glob("*")) if LIVE else []


def compiled(folder):
    """A network that is called once, as one program."""
    model, params = load(folder)
    return model._replace(apply=jax.jit(model.apply, static_argnames=("method", "skip"))), params


class Run:
    """A recorded run: its folder, what the pipeline was asked for, the noise that it drew, and its images."""

    def __init__(self, folder):
        self.folder, data = folder, np.load(folder / "run.npz")
        self.asked = json.loads(str(data["facts"])) | {k[3:]: data[k] for k in data.files if k.startswith("in/")}
        self.draws = [data[f"draw/{i}"] for i in range(sum(k.startswith("draw/") for k in data.files))]
        self.images, self.scale = data["images"], self.asked.get("guidance_scale", 1.0)

    def text(self, number=""):
        tokenizer, encoder = (self.folder / f"{name}{number}" for name in ("tokenizer", "text_encoder"))
        return TextEncoder(load_tokenizer(tokenizer), *compiled(encoder)) if encoder.is_dir() else None

    def conditions(self, encode, nothing=None):
        """Of the prompts, and of their negatives behind them where there is guidance."""
        cond = encode(self.asked["prompt"])
        if self.scale == 1:
            return cond
        texts = self.asked.get("negative_prompt", [""] * len(self.asked["prompt"]))
        return prompts.both(cond, nothing(cond) if nothing and "negative_prompt" not in self.asked else encode(texts))

    def sample(self, f, noise=(), **options):
        """The state at the end of the scheduler's steps, of a network `f(x, t)` with everything closed over."""
        folder, n = self.folder / "scheduler", self.asked["num_inference_steps"]
        solver, levels, head = scheduler(folder, n, **options)
        denoise = dj.denoiser(f, head)
        denoise = denoise if self.scale == 1 else dj.guidance.cfg(denoise, self.scale)
        x = jnp.asarray(self.draws[0])
        drawn = np.stack([*noise, *[np.zeros_like(self.draws[0])] * (n - len(noise))])
        start = start_scale(folder, levels) * x
        take = lambda i, j: jnp.asarray(drawn)[i].reshape(start.shape)
        return jax.jit(lambda x: dj.sample(solver, denoise, x, levels, noise=take))(start)

    def decoded(self, latents):
        model, params = compiled(self.folder / "vae")
        return model.apply(params, from_latents(model.config, latents), method="decode")


def twice(run, x):
    return x if run.scale == 1 else jnp.concatenate([x, x])


def sd(run):
    model, params = load(run.folder / "unet")
    encoder = run.text()
    given = run.conditions(lambda texts: prompts.sd_prompt(encoder, texts))
    return run.decoded(run.sample(lambda x, t: model.apply(params, x, t, **given), run.draws[1:]))


def sd_inpaint(run):
    model, params = load(run.folder / "unet")
    vae, weights = compiled(run.folder / "vae")
    encoder = run.text()
    given = run.conditions(lambda texts: prompts.sd_prompt(encoder, texts))
    mask, image = run.asked["mask_image"], 2 * run.asked["image"] - 1
    moments = vae.apply(weights, jnp.asarray(image * (mask < 0.5)), method="moments")
    spread = posterior(moments) + jnp.exp(0.5 * jnp.split(moments, 2, -1)[1]) * run.draws[1]
    seen = jnp.concatenate([jnp.asarray(mask[:, ::2, ::2]), to_latents(vae.config, spread)], axis=-1)
    f = lambda x, t: model.apply(params, jnp.concatenate([x, twice(run, seen)], axis=-1), t, **given)
    return run.decoded(run.sample(f, run.draws[2:]))


def sd_controlnet(run):
    (model, params), (control, weights) = (load(run.folder / name) for name in ("unet", "controlnet"))
    encoder = run.text()
    given = run.conditions(lambda texts: prompts.sd_prompt(encoder, texts))
    picture, scale = twice(run, jnp.asarray(run.asked["image"])), run.asked["controlnet_conditioning_scale"]

    def f(x, t):
        added = control.apply(weights, x, t, given["context"], picture, scale=scale)
        return model.apply(params, x, t, residuals=added.down, mid_residual=added.mid, **given)

    return run.decoded(run.sample(f, run.draws[1:]))


def sdxl(run):
    model, params = load(run.folder / "unet")
    encoders = run.text(), run.text("_2")
    given = run.conditions(lambda texts: prompts.sdxl_prompt(*encoders, texts), prompts.no_prompt)
    size, corner = (run.asked["height"], run.asked["width"]), tuple(run.asked["crops_coords_top_left"])
    sizes = dict(original=tuple(run.asked["original_size"]), corner=corner)
    given["time_ids"] = prompts.size_ids(len(given["context"]), size, **sizes)
    return run.decoded(run.sample(lambda x, t: model.apply(params, x, t, **given), run.draws[1:]))


def sd3(run):
    model, params = load(run.folder / "transformer")
    encoders = [run.text(number) for number in ("", "_2", "_3")]
    sizes = dict(width=model.config["joint_attention_dim"], length=run.asked["max_sequence_length"])
    given = run.conditions(lambda texts: prompts.sd3_prompt(*encoders, texts, **sizes))
    return run.decoded(run.sample(lambda x, t: model.apply(params, x, t, **given)))


def flux_dev(run):
    model, params = load(run.folder / "transformer")
    length, n = run.asked["max_sequence_length"], run.asked["num_inference_steps"]
    given = prompts.flux_prompt(run.text(), run.text("_2"), run.asked["prompt"], length=length)
    if model.config["guidance_embeds"]:
        given["guidance"] = jnp.full(len(given["context"]), run.scale)
    _, height, width, _ = run.draws[0].shape
    places, run.scale = flux.positions(height, width), 1.0  # the network was taught its guidance
    run.draws[0] = np.asarray(flux.pack(jnp.asarray(run.draws[0])))
    f = lambda x, t: model.apply(params, x, t / 1000, positions=places, **given)
    mu = prompts.flux_shift(len(places))
    tokens = run.sample(f, mu=mu, sigmas=np.linspace(1, 1 / n, n))
    return run.decoded(flux.unpack(tokens, height, width))


def pixels(run, *inputs, **options):
    model, params = load(run.folder / "unet")
    return run.sample(lambda x, t: model.apply(params, x, t, *inputs), run.draws[1:], **options)


def ddim(run):
    return pixels(run, eta=run.asked["eta"], use_clipped_model_output=run.asked["use_clipped_model_output"])


def consistency(run):
    return pixels(run, jnp.asarray(run.asked["class_labels"]), timesteps=run.asked["timesteps"])


def dit(run):
    model, params = load(run.folder / "transformer")
    labels = jnp.asarray(run.asked["class_labels"])
    labels = labels if run.scale == 1 else jnp.concatenate([labels, jnp.full_like(labels, 1000)])
    # The second half of the channels is a variance, which these schedulers do not use.
    return run.decoded(run.sample(lambda x, t: model.apply(params, x, t, labels)[..., :4]))


CASES = {
    "sd": sd, "sd_inpaint": sd_inpaint, "sd_controlnet": sd_controlnet, "sdxl": sdxl, "sd3": sd3, "flux": flux_dev,
    "ddpm": pixels, "ddim": ddim, "consistency": consistency, "dit": dit,
}  # fmt: skip


def check(folder):
    run = Run(folder)
    images = np.clip(np.asarray(CASES[folder.name.rpartition("-")[0]](run)) / 2 + 0.5, 0, 1)
    error = np.abs(images - run.images).max()
    print(f"{folder.name}: {error:.1e}")
    assert images.shape == run.images.shape and error < TOLERANCE


@pytest.mark.skipif(not LIVE, reason="`make parity` records random pipelines and sets DIFFJAX_PARITY")
def test_live_runs_are_of_every_pipeline():
    assert {folder.name.rpartition("-")[0] for folder in FOLDERS} == CASES.keys()


@pytest.mark.skipif(not LIVE, reason="`make parity` records random pipelines and sets DIFFJAX_PARITY")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_live_pipelines(folder):
    check(folder)


def test_stable_diffusion_draws_the_same_images(tmp_path):
    check(stable_diffusion(tmp_path / "sd-0"))
