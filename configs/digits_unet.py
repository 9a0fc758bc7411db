r"""Class-conditional EDM with a small U-Net on scikit-learn's 8 x 8 digits.

    diffjax train --config=configs/digits_unet.py --workdir=runs/digits_unet
    diffjax eval --workdir=runs/digits_unet

Variants after a colon: `:smoke` (seconds, no quality), `:steps=400`, `:seed=1`, `:split=1`.

Cost: FILL_TIME on FILL_MACHINE.
Expected: FILL_NUMBERS, next to FILL_FLOOR for the real training half (the floor).
"""

from configs.common import digits


def get_config(arg=None):
    return digits(arg, model="unet")
