"""Guidance: functions from a denoiser to a denoiser."""

from diffjax.guidance.cfg import cfg, clip_x0, interval

__all__ = ["cfg", "clip_x0", "interval"]
