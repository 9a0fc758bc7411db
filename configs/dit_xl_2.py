r"""DiT-XL/2 on the 32 x 32 x 4 latents of 256 x 256 ImageNet: Peebles & Xie 2023, arXiv:2212.09748.

    diffjax inspect --config=configs/dit_xl_2.py --mesh="data=8" --accelerator=h200
    diffjax train --config=configs/dit_xl_2.py --config.data="latents(path='...')" --workdir=runs/dit_xl_2

The published recipe: AdamW at 1e-4 without decay or warm-up, batch 256, EMA 0.9999, DDPM's linear betas, labels dropped
at 0.1, 400 k steps in the tables and 7 M for the best FID (9.62, and 2.27 with guidance 1.5). It departs in two places:
the variance is not learned (theirs is, with the hybrid loss of arXiv:2102.09672), and the network computes in bfloat16.

Variants after a colon: `:batch=512`, `:remat` (recomputes every block in the backward pass), `:steps=7000000`.

Cost: 675 M parameters, 118.6 G multiply-adds a forward pass and image, 0.71 TFLOP a training image, 182 TFLOP a step of
batch 256. The data are noise of the shape of the latents until `config.data` names real ones.
"""

from configs.common import dit


def get_config(arg=None):
    return dit(arg, shape=(32, 32, 4), batch=256, steps=400_000, sizes=dict(width=1152, depth=28, heads=16))
