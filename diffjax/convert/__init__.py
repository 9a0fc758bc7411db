"""Models and samplers of other libraries, read from their own files."""

from diffjax.convert.scheduler import scheduler

__all__ = ["scheduler"]
