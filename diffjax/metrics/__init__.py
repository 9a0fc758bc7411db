"""Sample quality: distances between sets of images or features, and the report on the digits.

Every function takes plain arrays and computes in float64 numpy; nothing here needs a model of the library.
"""

from diffjax.metrics.baselines import BASELINES
from diffjax.metrics.c2st import c2st
from diffjax.metrics.classifier import accuracy, class_tv, inception_score
from diffjax.metrics.frechet import frechet_distance, frechet_gaussian, moments
from diffjax.metrics.mmd import kid, median_gamma, mmd2
from diffjax.metrics.neighbours import closer_to_train, density_coverage, precision_recall
from diffjax.metrics.protocol import (
    Protocol,
    baseline_rows,
    digits_baselines,
    digits_protocol,
    digits_report,
    report,
)
from diffjax.metrics.table import table

__all__ = [
    "BASELINES",
    "Protocol",
    "accuracy",
    "baseline_rows",
    "c2st",
    "class_tv",
    "closer_to_train",
    "density_coverage",
    "digits_baselines",
    "digits_protocol",
    "digits_report",
    "frechet_distance",
    "frechet_gaussian",
    "inception_score",
    "kid",
    "median_gamma",
    "mmd2",
    "moments",
    "precision_recall",
    "report",
    "table",
]
