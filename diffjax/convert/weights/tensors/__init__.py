"""Safetensors files and their tensors."""

from diffjax.convert.weights.tensors.dtypes import DTYPES
from diffjax.convert.weights.tensors.read import Tensor, bounds, parse_header, read_header
from diffjax.convert.weights.tensors.write import Source, write, writing

__all__ = ["DTYPES", "Source", "Tensor", "bounds", "parse_header", "read_header", "write", "writing"]
