"""The perceptron on digits, trained in continuous time on [0.02, 0.98]: the base of the sweep in README.md.

Arguments: `smoke` (seconds), `steps`, `seed`, `split`, as in configs/digits_mlp.py.
"""

from configs.common import digits


def get_config(arg=None):
    config = digits(arg, model="mlp")
    config.schedule, config.head, config.weight = "cosine()", "v()", "simple()"
    # On both schedules these times cover every level of the sampling grid below: sigma / alpha from 0.05 to 20.
    config.time = "uniform(lo=0.02, hi=0.98)"
    config.sample.spacing = "karras(s_min=0.05, s_max=20.0)"
    config.model.time_scale = 1000.0
    # Adam does not see the scale of a weighting; clipping by the norm would.
    config.optim.clip = 0.0
    # Pictures while it trains would cost a sampler's compilation in every run.
    config.sample_every = 0
    return config
