"""The DiT on digits in 800 updates: the base of the sweep over widths in README.md.

Arguments: `smoke` (seconds), `steps`, `seed`, `split`, as in configs/digits_dit.py.
"""

from configs.common import digits


def get_config(arg=None):
    given = arg or ""
    config = digits(given if "steps=" in given or "smoke" in given else f"steps=800,{given}", model="dit")
    # Pictures while it trains would cost a sampler's compilation in every run.
    config.sample_every = 0
    return config
