r"""Further training of a published network on your own data: a `UNet2DModel` or a `DiTTransformer2DModel`.

    diffjax train --config=configs/tune.py:path=ddpm/unet --workdir=runs/tuned --config.data='folder(path="faces")'
    diffjax convert runs/tuned tuned     # a folder that diffusers reads

`path` is the checkpoint's folder, with its `config.json` and its weights; sizes of images, channels and classes of the
data must be the network's. The last row of its table of labels is that of no class. A network with twice the channels
at its end, as DiT, learns the variance as well. NCSN++ and others that are told noise levels need another config.

The noise and the kind of output are those of the checkpoint's `scheduler/scheduler_config.json`, beside its folder or
in it; without such a file DDPM's of 1000 steps and the noise, or `:noise=scaled_linear`, a schedule's name.

A DiT works on latents, at the scale that `to_latents` gives: encode with it and read them with `std=0`, as
docs/init_from.md shows; without that, `latents()` scales each channel to a standard deviation of 0.5.

    diffjax latents --data='folder(path="faces", size=256)' --encode=my_vae:encode --out=latents/faces
    diffjax train --config=configs/tune.py:path=dit/transformer --workdir=runs/dit \
        --config.data='latents("latents/faces", std=0)'

Other settings after the colon: `:lr=1e-5`, `:steps=10000` (default 1000), `:batch=64`, `:seed=1`, `:smoke` (a few
steps; no quality).

Cost: that of the network. Expected: a start at the checkpoint's own loss, which falls from there.
"""

import json
from pathlib import Path

from ml_collections import ConfigDict

from configs.common import parse_arg

# What scheduler files call the tables and the outputs that configs have.
BETAS = {
    "linear": "ddpm", "scaled_linear": "scaled_linear", "sigmoid": "sigmoid", "squaredcos_cap_v2": "squared_cosine",
}  # fmt: skip
HEADS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def get_config(arg=None):
    arg = parse_arg(arg, path="", noise="", lr=1e-5, steps=0, batch=32, seed=0, smoke=False)
    file = Path(arg.path, "config.json")
    if not arg.path or not file.is_file():
        raise ValueError(f"path={arg.path}: expected the folder of a checkpoint, with a config.json: path=FOLDER")
    network = json.loads(file.read_text())

    if (kind := network.get("_class_name")) not in ("UNet2DModel", "DiTTransformer2DModel"):
        raise ValueError(f"path={arg.path}: no config trains a {kind}: write a loop of your own, see docs/init_from.md")
    if network.get("time_embedding_type") == "fourier":
        raise ValueError(f"path={arg.path}: it is told noise levels, not times in steps: write a config of its own")

    config = ConfigDict()
    config.seed, config.batch_size = arg.seed, arg.batch
    config.num_steps = arg.steps or (4 if arg.smoke else 1000)
    config.data = "digits()"
    config.init_from = arg.path

    config.schedule, config.head, config.time = learnt(arg.path, arg.noise)
    if kind == "UNet2DModel":
        network.setdefault("num_class_embeds", None)  # what is left out has no labels
    config.label_dropout = 0.0 if network.get("num_class_embeds", True) is None else 0.1
    if network.get("out_channels") == 2 * network.get("in_channels", 0):
        config.loss = ConfigDict(dict(variance="learned_range()"))
    config.model = ConfigDict(dict(name="checkpoint", network=network, time_scale=1.0))

    config.optim = ConfigDict(dict(name="adam", lr=arg.lr, clip=1.0))
    config.ema = ("decay(0.999)",)
    config.log_every = 1 if arg.smoke else 50
    config.checkpoint_every = config.num_steps if arg.smoke else 500
    config.sample = ConfigDict(dict(solver="ddim()", steps=50, spacing="uniform()"))
    return config


def learnt(path, noise):
    """Schedule, head and times that it was trained with; without a file those of Ho et al. 2020, arXiv:2006.11239."""
    beside = (Path(path, *folder, "scheduler_config.json") for folder in (("..", "scheduler"), ()))
    file = next((file for file in beside if file.is_file()), None)
    if file is None:
        return f"{noise or 'ddpm'}()", "eps", "discrete(num_steps=1000)"
    told = {"prediction_type": "epsilon"} | json.loads(file.read_text())
    known = {"beta_schedule": BETAS, "prediction_type": HEADS}
    known |= {"trained_betas": (None,), "use_flow_sigmas": (None, False)}
    for name, values in known.items():
        if told.get(name) not in values:
            listed = ", ".join(map(str, values))
            raise ValueError(f"{file}: {name}={told.get(name)}: this config has {listed}: write a config of its own")
    table, steps = BETAS[told["beta_schedule"]], f"num_steps={told.get('num_train_timesteps', 1000)}"
    if noise not in ("", table):
        raise ValueError(f"noise={noise}: {file} says {table}: leave noise out (--config.schedule changes it)")
    ends = {"start": "beta_start", "end": "beta_end"} if table != "squared_cosine" else {}
    if missing := [name for name in ends.values() if name not in told]:
        raise ValueError(f"{file}: {' and '.join(missing)} of its beta_schedule is missing: add what was trained with")
    rest = [f"{name}={told[key]}" for name, key in ends.items()]
    rest += ["rescale=True"] if told.get("rescale_betas_zero_snr") else []
    return f"{table}({', '.join([steps, *rest])})", HEADS[told["prediction_type"]], f"discrete({steps})"
