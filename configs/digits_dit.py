r"""Class-conditional EDM with a small DiT on scikit-learn's 8 x 8 digits.

    diffjax train --config=configs/digits_dit.py --workdir=runs/digits_dit
    diffjax eval --workdir=runs/digits_dit

Variants after a colon: `:smoke` (a minute, most of it compilation; no quality), `:steps=400`, `:seed=1`, `:split=1`.

Cost: 7 minutes on 2 busy CPU cores, 576 k parameters.
Expected: FD-relu 0.14, FD-tanh 0.17, C2ST 0.63, closer 0.59, accuracy 0.98 (seed and split 0);
the real training half itself, the floor, has FD-relu 0.09.
"""

from configs.common import digits


def get_config(arg=None):
    return digits(arg, model="dit")
