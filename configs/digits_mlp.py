r"""Class-conditional EDM with a small MLP on scikit-learn's 8 x 8 digits.

    diffjax train --config=configs/digits_mlp.py --workdir=runs/digits_mlp
    diffjax eval --workdir=runs/digits_mlp

Variants after a colon: `:smoke` (a minute, most of it compilation; no quality), `:steps=400`, `:seed=1`, `:split=1`.

Cost: under 2 minutes on 2 CPU cores, 953 k parameters.
Expected: FD-relu 0.27, FD-tanh 0.15, C2ST 0.64, closer 0.72, accuracy 1.00 (seed and split 0);
the real training half itself, the floor, has FD-relu 0.09.
"""

from configs.common import digits


def get_config(arg=None):
    return digits(arg, model="mlp")
