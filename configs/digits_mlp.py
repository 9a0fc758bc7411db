r"""Class-conditional EDM with a small MLP on scikit-learn's 8 x 8 digits.

    diffjax train --config=configs/digits_mlp.py --workdir=runs/digits_mlp
    diffjax eval --workdir=runs/digits_mlp

Variants after a colon: `:smoke` (seconds, no quality), `:steps=400`, `:seed=1`, `:split=1`.

Cost: FILL_TIME on FILL_MACHINE.
Expected: FILL_NUMBERS, next to FILL_FLOOR for the real training half (the floor).
"""

from configs.common import digits


def get_config(arg=None):
    return digits(arg, model="mlp")
