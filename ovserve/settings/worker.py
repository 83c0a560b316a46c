"""The settings that a worker process gets: only what it reads, and no secret."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ovserve.settings.options import Settings

__all__ = ["WorkerSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """The options of `Settings` with the same names. A change of one of them needs new workers."""

    log_level: str
    log_format: str
    hang_limit_s: float
    max_image_pixels: int
    max_image_side_px: int
    max_prepared_bytes: int
    decode_cpu_limit_s: float
    decode_memory_limit_bytes: int
    cache_bytes: int
    node: str = ""  # of a cluster; set there, for the log

    @classmethod
    def of(cls, settings: Settings) -> WorkerSettings:
        """Return the part of the server's settings that workers get."""
        names = (field.name for field in dataclasses.fields(cls) if field.name != "node")
        return cls(**{name: getattr(settings, name) for name in names})
