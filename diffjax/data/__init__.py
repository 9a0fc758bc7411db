"""Data sets, augmentation and the input pipeline."""

from diffjax.data.errors import Unreadable, UnreadableError, WorkerError
from diffjax.data.facts import facts_of, without_items
from diffjax.data.latents import latents
from diffjax.data.mixture import mix, mixture
from diffjax.data.pipeline import AUGMENTS, BatchIterator, batches
from diffjax.data.readers import array_record, folder, tar, tfds
from diffjax.data.sources import ArraySource, Dataset, Pixels, arrays, digits, npz
from diffjax.data.synthetic import synthetic

SOURCES = {
    "array_record": array_record,
    "digits": digits,
    "folder": folder,
    "latents": latents,
    "mixture": mixture,
    "npz": npz,
    "synthetic": synthetic,
    "tar": tar,
    "tfds": tfds,
}

__all__ = [
    "AUGMENTS",
    "SOURCES",
    "ArraySource",
    "BatchIterator",
    "Dataset",
    "Pixels",
    "Unreadable",
    "UnreadableError",
    "WorkerError",
    "array_record",
    "arrays",
    "batches",
    "digits",
    "facts_of",
    "folder",
    "latents",
    "mix",
    "mixture",
    "npz",
    "synthetic",
    "tar",
    "tfds",
    "without_items",
]
