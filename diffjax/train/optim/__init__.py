"""Optimisers, learning rates and averages of the parameters."""

from diffjax.train.optim import snapshots
from diffjax.train.optim.ema import EMAS, Ema
from diffjax.train.optim.mup import with_base
from diffjax.train.optim.optimizers import OPTIMIZERS, build_optimizer
from diffjax.train.optim.rates import LR_SCHEDULES, build_lr
from diffjax.train.optim.schedule_free import evaluation_params
from diffjax.train.optim.settings import DEFAULTS

__all__ = [
    "DEFAULTS",
    "EMAS",
    "LR_SCHEDULES",
    "OPTIMIZERS",
    "Ema",
    "build_lr",
    "build_optimizer",
    "evaluation_params",
    "snapshots",
    "with_base",
]
