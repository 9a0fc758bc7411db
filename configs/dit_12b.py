r"""A class-conditional DiT of 12 B parameters on 64 x 64 x 16 latents: what 256 TPU v5p would train.

    diffjax inspect --config=configs/dit_12b.py --mesh="data=4,fsdp=64,tensor=1" --accelerator=tpu_v5p
    diffjax train --config=configs/dit_12b.py --config.data="latents(path='...')" \
        --config.mesh="data=4,fsdp=64,tensor=1" --workdir=runs/dit_12b

The blocks of Peebles & Xie 2023 (arXiv:2212.09748) at width 4096, depth 40 and 32 heads, 1024 tokens, trained as flow
matching with logit-normal times (Esser et al. 2024, arXiv:2403.03206). No quality is claimed: nobody trained it; it is
the size of the largest open image models, for plans (docs/plan.md).

Variants after a colon: `:batch=2048`, `:remat=False` (keeps all activations), `:steps=1000000`.

Cost: 12.1 B parameters, 16.9 TFLOP a forward pass and image. The data are noise of the shape of the latents until
`config.data` names real ones.
"""

from configs.common import dit


def get_config(arg=None):
    config = dit(
        arg, shape=(64, 64, 16), batch=1024, steps=500_000, remat=True, sizes=dict(width=4096, depth=40, heads=32)
    )
    config.sharding = "rules"
    config.schedule, config.head, config.time = "flow()", "flow", "logit_normal()"
    config.model.time_scale = 1000.0
    config.optim.b2, config.optim.clip, config.optim.warmup = 0.95, 1.0, 2000
    return config
