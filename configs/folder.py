r"""Diffusion on a folder of images of your own: EDM with a small U-Net.

    diffjax train --config=configs/folder.py:path=faces,size=24 --workdir=runs/faces
    diffjax sample --workdir=runs/faces --num=16

`path` holds image files, all alike or one folder for each class (`cats/a.jpg`, `dogs/b.png`); docs/data.md says what
else it may hold. Images are resized and cropped to `size` x `size` pixels, a multiple of 8, and mirrored at random.

Other settings after the colon: `:steps=8000` (default 3000), `:batch=64`, `:width=64` (channels), `:flip=False` (where
left and right differ, as in text), `:grey` (one channel), `:labels=False` (folders are no classes), `:seed=1`, and
`:smoke` (a minute, most of it compilation; no quality).

Cost: with `size=24,grey,width=16,batch=16` 358 k parameters and 0.15 s of CPU time a step, half a minute to two to
compile. Width and batch of 32 cost about eight times as much: for a GPU.
Expected: with these, and scikit-image's 100 faces of 25 x 25 pixels (`lfw_subset`), rough faces after 500 steps. A
folder of a hundred images is soon known by heart: look at the closest training images of `diffjax eval`, and stop
earlier or gather more.
"""

from ml_collections import ConfigDict

from configs.common import parse_arg


def get_config(arg=None):
    settings = dict(path="", size=64, steps=0, batch=32, width=32, flip=True, grey=False)
    settings |= dict(labels=True, seed=0, smoke=False)
    arg = parse_arg(arg, **settings)
    if not arg.path:
        raise ValueError("say where the images are: --config=configs/folder.py:path=FOLDER,size=64")
    if arg.size % 8 or arg.size < 8:
        raise ValueError(f"size={arg.size}: expected a multiple of 8, such as 24, 32 or 64")

    config = ConfigDict()
    config.seed = arg.seed
    data = f"path={arg.path!r}, size={arg.size}, flip={arg.flip}, channels={1 if arg.grey else 3}"
    config.data = f"folder({data}{'' if arg.labels else ', labels=False'})"
    config.input = ConfigDict(dict(threads=2))  # Decodes the next images while the network learns from these.
    config.batch_size = arg.batch
    config.num_steps = arg.steps or (20 if arg.smoke else 3000)

    # EDM (Karras et al. 2022, arXiv:2206.00364).
    config.schedule = "edm()"
    config.head = "edm(sigma_data=0.5)"
    config.time = "lognormal(mean=-1.2, std=1.2)"
    config.label_dropout = 0.1
    config.model = ConfigDict(
        dict(name="unet", width=arg.width, blocks=1, head_width=16, groups=8, dropout=0.1, time_scale=1.0)
    )
    config.model.mults, config.model.attention = levels(arg.size)

    config.optim = ConfigDict(dict(name="adam", lr=1e-3, b2=0.99, clip=1.0, warmup=min(100, config.num_steps // 10)))
    config.optim.schedule = "flat_linear(flat=0.5, final=0.02)"
    config.ema = ("power(std=0.1)", "power(std=0.05)")

    config.log_every = 10 if arg.smoke else 50
    config.checkpoint_every = 20 if arg.smoke else 250
    config.sample = ConfigDict(dict(solver="dpmpp_2m()", steps=5 if arg.smoke else 20, spacing="karras(s_max=80.0)"))
    return config


def levels(size):
    """Factors of the width of each level of the U-Net, and the heights that get attention.

    Down to 8 pixels or fewer, or an odd number; attention at 16 pixels and below.
    """
    sides = [size]
    while sides[-1] > 8 and sides[-1] % 2 == 0 and len(sides) < 5:
        sides.append(sides[-1] // 2)
    return (1, *[2] * (len(sides) - 1)), tuple(side for side in sides[1:] if side <= 16)
