"""Models and samplers of other libraries, read from their own files."""

from diffjax.convert.scheduler import scheduler, start_scale

__all__ = ["scheduler", "start_scale"]
