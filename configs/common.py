"""What the configs share: reading the argument after the colon, as in `configs/digits.py:smoke,seed=1`."""

import ast
import difflib

from ml_collections import ConfigDict


def parse_arg(arg, **allowed):
    """The settings `allowed` with the values that `arg` gives them, as a `ConfigDict`.

    `"smoke,model=dit,steps=100"` sets `smoke=True`, `model="dit"`, `steps=100`. Values take the type of the defaults.
    """
    values = dict(allowed)
    for item in filter(None, (arg or "").split(",")):
        name, equals, text = item.partition("=")
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown config argument {name!r}; known: {', '.join(sorted(allowed))}{hint}")
        values[name] = _typed(name, text, allowed[name]) if equals else True
        if not equals and not isinstance(allowed[name], bool):
            raise ValueError(f"config argument {name!r} needs a value, such as {name}={allowed[name]}")
    return ConfigDict(values)


def _typed(name, text, default):
    if isinstance(default, str):
        return text
    literal = {"true": "True", "false": "False"}.get(text.lower(), text)
    try:
        value = ast.literal_eval(literal)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(f"config argument {name}={text}: expected a {type(default).__name__}, such as {default}")
    return value


# Network, optimiser and length of each digits run. The settings that all of them share are in `digits`.
DIGITS = {
    "unet": dict(
        batch_size=128,
        num_steps=1400,
        lr=4e-3,
        guidance=1.5,
        model=dict(name="unet", width=16, mults=(1, 2), blocks=1, attention=(4,), head_width=32, groups=8, dropout=0.2),
    ),
    "dit": dict(
        batch_size=96,
        num_steps=2000,
        lr=4e-3,
        guidance=1.3,
        model=dict(name="dit", patch=2, width=96, depth=4, heads=2, mlp_ratio=2.0, dropout=0.05, scan=False),
    ),
    "mlp": dict(
        batch_size=256,
        num_steps=3000,
        lr=2e-3,
        guidance=1.2,
        model=dict(name="mlp", width=192, depth=3, dropout=0.35),
    ),
}


def digits(arg, model):
    """A class-conditional EDM on scikit-learn's 8 x 8 digits with one of the networks of `DIGITS`.

    Arguments: `smoke` (a few seconds), `steps` (0 keeps the recipe's), `seed`, `split` (which halves of the data).
    """
    arg = parse_arg(arg, model=model, smoke=False, steps=0, seed=0, split=0)
    if arg.model not in DIGITS:
        raise ValueError(f"model={arg.model}: known networks: {', '.join(DIGITS)}")
    recipe = DIGITS[arg.model]

    config = ConfigDict()
    config.seed = arg.seed
    config.data = f"digits(split_seed={arg.split})"
    config.augment = recipe.get("augment", ())
    config.batch_size = recipe["batch_size"]
    config.num_steps = arg.steps or (60 if arg.smoke else recipe["num_steps"])

    # EDM (Karras et al. 2022, arXiv:2206.00364), the null class for guidance.
    config.schedule = "edm()"
    config.head = "edm(sigma_data=0.5)"
    config.time = "lognormal(mean=-1.2, std=1.2)"
    config.label_dropout = 0.1
    config.model = ConfigDict(recipe["model"] | {"time_scale": 1.0})  # EDM's time is log(sigma) / 4, within +-2

    config.optim = ConfigDict(dict(name="adam", lr=recipe["lr"], b2=0.99, clip=1.0, warmup=0 if arg.smoke else 50))
    config.optim.schedule = "flat_linear(flat=0.4, final=0.02)"
    config.ema = ("power(std=0.1)", "power(std=0.05)")

    config.log_every = 20 if arg.smoke else 100
    config.checkpoint_every = 30 if arg.smoke else 500
    config.sample_every = 0 if arg.smoke else 500

    config.sample = ConfigDict(dict(solver="dpmpp_2m()", steps=20, spacing="karras(s_max=20.0)"))
    config.sample.guidance, config.sample.interval = recipe["guidance"], (0.1, 1.0)
    if arg.smoke:
        config.batch_size = 32
        config.sample.steps = 5
        config.eval = ConfigDict(dict(num_samples=64))
    return config


def dit(arg, *, shape, sizes, batch, steps, remat=False):
    """A class-conditional DiT with patches of 2 on latents of `shape`, in bfloat16, with the recipe of Peebles & Xie.

    Arguments: `batch`, `steps`, `remat`, `seed`.
    """
    arg = parse_arg(arg, batch=batch, steps=steps, remat=remat, seed=0)
    config = ConfigDict()
    config.seed, config.batch_size, config.num_steps = arg.seed, arg.batch, arg.steps
    config.data = f"synthetic(shape={shape}, num_classes=1000)"
    config.schedule, config.head, config.time = "ddpm()", "eps", "discrete(num_steps=1000)"
    config.label_dropout = 0.1
    config.model = ConfigDict(dict(name="dit", patch=2, time_scale=1.0, dtype="bfloat16", remat=arg.remat, **sizes))
    config.optim = ConfigDict(dict(name="adam", lr=1e-4, b2=0.999, clip=0.0))
    config.ema = ("decay(0.9999)",)
    config.log_every, config.checkpoint_every = 100, 5000
    config.sample = ConfigDict(dict(solver="ddim()", steps=50, spacing="uniform()", guidance=1.5))
    return config
