"""Optimisers, learning rates and averages of the parameters."""

from diffjax.train.optim.ema import EMAS, Ema
from diffjax.train.optim.optimizers import DEFAULTS, LR_SCHEDULES, OPTIMIZERS, build_lr, build_optimizer

__all__ = ["DEFAULTS", "EMAS", "LR_SCHEDULES", "OPTIMIZERS", "Ema", "build_lr", "build_optimizer"]
