"""Data sets, augmentation and the input pipeline."""

from diffjax.data.errors import Unreadable, UnreadableError, WorkerError
from diffjax.data.facts import facts_of, without_items
from diffjax.data.latents import latents
from diffjax.data.mixture import mix, mixture
from diffjax.data.pipeline import AUGMENTS, BatchIterator, batches
from diffjax.data.prompts import parse_prompt, prompt_chunks, weigh_states, weighted_tokens
from diffjax.data.readers import array_record, folder, tar, tfds
from diffjax.data.sources import ArraySource, Dataset, Pixels, arrays, digits, npz
from diffjax.data.synthetic import synthetic
from diffjax.data.tokenizers import Tokenizer, Tokens, load_tokenizer

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
    "Tokenizer",
    "Tokens",
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
    "load_tokenizer",
    "mix",
    "mixture",
    "npz",
    "parse_prompt",
    "prompt_chunks",
    "synthetic",
    "tar",
    "tfds",
    "weigh_states",
    "weighted_tokens",
    "without_items",
]
