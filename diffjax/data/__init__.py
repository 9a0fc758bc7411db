"""Data sets, augmentation and the input pipeline."""

from diffjax.data.pipeline import AUGMENTS, batches
from diffjax.data.sources import ArraySource, Dataset, Pixels, arrays, digits, npz
from diffjax.data.synthetic import synthetic

SOURCES = {"digits": digits, "npz": npz, "synthetic": synthetic}

__all__ = ["AUGMENTS", "SOURCES", "ArraySource", "Dataset", "Pixels", "arrays", "batches", "digits", "npz", "synthetic"]
