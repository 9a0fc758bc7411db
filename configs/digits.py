r"""Class-conditional diffusion on scikit-learn's 8 x 8 digits: EDM with a small U-Net, the default of `make run`.

    diffjax train --config=configs/digits.py --workdir=runs/digits
    diffjax eval --workdir=runs/digits

Variants after a colon: `:smoke` (seconds, no quality), `:model=dit`, `:steps=400`, `:seed=1`, `:split=1`.

Cost: FILL_TIME on FILL_MACHINE.
Expected: FILL_NUMBERS, next to FILL_FLOOR for the real training half (the floor).
"""

from configs.common import digits


def get_config(arg=None):
    return digits(arg, model="unet")
