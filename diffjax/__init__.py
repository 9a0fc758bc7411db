"""Diffusion models in JAX.

    from diffjax import FLOW, Flow, denoiser, heun, sample, uniform
    levels = uniform(Flow(), 40)
    x0 = sample(heun(), denoiser(f, FLOW), noise, levels, key)

`import diffjax` loads jax and numpy alone. Networks are in `diffjax.models`, the trainer in `diffjax.train`.
"""

from diffjax import core, guidance, sampling
from diffjax.core import *  # noqa: F403
from diffjax.guidance import *  # noqa: F403
from diffjax.sampling import *  # noqa: F403

__version__ = "0.1.0"
__all__ = ["__version__", *core.__all__, *guidance.__all__, *sampling.__all__]
