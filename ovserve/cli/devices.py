"""`ovserve devices`: show the devices that OpenVINO sees, and which one `device = auto` chooses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ovserve.cli.arguments import ArgumentParser, report_error
from ovserve.cli.commands import ExitCode

__all__ = ["run"]

_DESCRIPTION = """Show the devices that OpenVINO sees on this machine, with their memory and the properties that matter
for the model option `device`."""
_MIB = 1 << 20


def run(arguments: Sequence[str]) -> int:
    """Print the devices; return the exit code."""
    parser = ArgumentParser("devices", _DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    values = parser.parse(arguments)
    try:
        # Imported here: the other subcommands load neither OpenVINO nor its threads.
        from ovserve.engines.devices import device_report  # noqa: PLC0415

        report = device_report()
    except (ImportError, RuntimeError) as error:
        return report_error(f"OpenVINO cannot be used: {error}", ExitCode.MODELS_FAILED)
    print(json.dumps(report, indent=1) if values["json"] else "\n".join(_lines(report)))
    return ExitCode.OK


def _lines(report: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for device, properties in report.items():
        yield f"{device}: {properties.get('name', '')}"
        for title, value in properties.items():
            if title == "name":
                continue
            if title.endswith("_bytes"):
                title, value = title.removesuffix("_bytes"), f"{value // _MIB} MiB"  # noqa: PLW2901
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            yield f"  {title}: {shown}"
