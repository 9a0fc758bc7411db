r"""Class-conditional EDM with a small U-Net on scikit-learn's 8 x 8 digits.

    diffjax train --config=configs/digits_unet.py --workdir=runs/digits_unet
    diffjax eval --workdir=runs/digits_unet

Variants after a colon: `:smoke` (a minute, most of it compilation; no quality), `:steps=400`, `:seed=1`, `:split=1`.

Cost: 192 s on 2 quiet CPU cores with a warm compile cache, about half a minute more without; 209 k parameters.
Expected: FD-relu 0.14, FD-tanh 0.15, C2ST 0.62, closer 0.60, accuracy 0.98 (means of seeds and splits 0, 1, 2);
the real training half itself, the floor, has FD-relu 0.09.
"""

from configs.common import digits


def get_config(arg=None):
    return digits(arg, model="unet")
