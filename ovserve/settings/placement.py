"""The model option `placement`: what a node of a cluster must have free for one worker."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Placement", "parse_placement"]

_ENTRY = re.compile(r"([A-Za-z][A-Za-z0-9_.:-]{0,99})=([0-9]+(?:\.([0-9]+))?)(KiB|MiB|GiB|TiB)?")
_DECIMALS = 4  # of a number; Ray refuses to create an actor that asks for a finer part of a resource
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_MOST = 1e6  # of a resource; far above any machine


@dataclass(frozen=True, slots=True)
class Placement:
    """What one worker takes of a node.

    Attributes:
        cpus: processors.
        memory_bytes: memory; 0: not asked for.
        resources: custom resources by name, as the nodes declare them.
    """

    cpus: float = 1.0
    memory_bytes: int = 0
    resources: Mapping[str, float] = field(default_factory=dict)


def parse_placement(text: str) -> Placement:
    """Parse `cpus=4,memory=8GiB,ovserve_gpu=1`; what is left out has its default. Raises ValueError."""
    cpus, memory, resources = 1.0, 0, {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        match = _ENTRY.fullmatch(entry)
        if match is None or (match[4] and match[1] != "memory"):
            raise ValueError(f"{entry[:60]!r} is not NAME=NUMBER, such as cpus=4, memory=8GiB or ovserve_gpu=1")
        name, number = match[1], float(match[2]) * _UNITS.get(match[4] or "", 1)
        if name != "memory" and len((match[3] or "").rstrip("0")) > _DECIMALS:
            raise ValueError(f"{name} is {match[2][:60]}; Ray counts resources with at most {_DECIMALS} decimals")
        if name != "memory" and number > _MOST:
            raise ValueError(f"{name} is {match[2]}; at most {_MOST:g} is allowed")
        if name == "cpus":
            cpus = number
        elif name == "memory":
            memory = int(number)
        elif name in ("CPU", "GPU", "object_store_memory"):
            raise ValueError(f"{name} is a resource of Ray itself; use cpus, memory or a custom resource")
        else:
            resources[name] = number
    return Placement(cpus, memory, resources)
