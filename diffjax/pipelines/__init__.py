"""From a trained run to images and to numbers: samplers, `diffjax sample`, `diffjax eval`."""

from diffjax.pipelines.sampler import Cost, Settings, make_sampler

__all__ = ["Cost", "Settings", "make_sampler"]
