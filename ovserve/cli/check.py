"""`ovserve check`: read the configuration as `serve` does, start nothing, and print what would be served."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence

from ovserve.cli.arguments import report_error
from ovserve.cli.commands import ExitCode
from ovserve.cli.serve import parse_arguments
from ovserve.errors import StartupError
from ovserve.models.catalog import Catalog
from ovserve.models.weights import estimated_bytes, weights_bytes
from ovserve.server import check_settings
from ovserve.settings.options import ModelSettings, Settings

__all__ = ["run"]

_DESCRIPTION = """Read the configuration and the directory of each model, start nothing, and print what `ovserve serve`
would serve with the same options, variables and file. It does not load a model, open a device or bind the port. Run it
before a reload or a restart."""


def run(arguments: Sequence[str]) -> int:
    """Print what would be served, or one line with the first error; return the exit code."""
    try:
        settings = parse_arguments(arguments, os.environ, "check", _DESCRIPTION)
        catalog, keys = check_settings(settings)
    except StartupError as error:
        return report_error(str(error), ExitCode.USAGE)
    print("\n".join(_lines(settings, catalog, keys)))
    return ExitCode.OK


def _lines(settings: Settings, catalog: Catalog, keys: int) -> Iterator[str]:
    yield f"configuration is valid: host {settings.host}, port {settings.port}, {keys} API keys"
    for ignored in settings.ignored:
        yield f"without effect: {ignored}"
    for pending in dict.fromkeys(catalog.pending.values()):
        yield f"model {pending.name}: to be pulled from {pending.repository} at {pending.revision}"
    for name, model in catalog.models.items():
        profile, limits = model.profile, model.limits
        default = " (default)" if name == settings.default_model else ""
        yield f"model {name}{default}: {profile.family} from {profile.directory}"
        yield f"  device {limits.device}, engine {limits.engine}, replicas {_replicas(limits)}"
        kept = "for ever" if math.isinf(limits.kept_s) else f"for {limits.kept_s:g} s without a job"
        pinned = ", pinned" if limits.is_pinned else ""
        if profile.plan is not None:
            yield f"  measured plan: {profile.plan}"
        yield f"  load {limits.load}, stays {kept}{pinned}, priority {limits.priority}"
        weights, expected = weights_bytes(profile.directory), estimated_bytes(profile.directory)
        yield f"  weights {weights >> 20} MiB, estimated memory of one worker {expected >> 20} MiB"
    if settings.memory_budget_bytes:
        yield f"memory budget {settings.memory_budget_bytes >> 20} MiB"


def _replicas(model: ModelSettings) -> str:
    return str(model.replicas) if model.replicas else f"auto, {model.min_replicas} to {model.max_replicas}"
