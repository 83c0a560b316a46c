#!/usr/bin/env python3
"""Write docs/reference.md from the tables in the code: options, request fields, paths, errors, metrics.

`scripts/make_reference.py` writes the page; the test suite fails when page and code differ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ovserve.api.parameters.fields import EXCLUSIONS, FIELDS
from ovserve.api.routes import ROUTES
from ovserve.cli.commands import COMMANDS
from ovserve.errors import ApiError
from ovserve.metrics import WATCHED, Metrics
from ovserve.settings.options import ModelSettings, Settings, options_of
from ovserve.settings.sources import ENVIRONMENT_PREFIX

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _options(table: type) -> Iterator[str]:
    yield "| option | default | unit | what it does |"
    yield "|---|---|---|---|"
    for name, (entry, option) in options_of(table).items():
        aliases = "".join(f", `{alias}`" for alias in option.aliases)
        default = "" if entry.default in (None, "") else f"`{entry.default}`"
        bounds = [
            f"at least {option.low:g}" if option.low is not None else "",
            f"at most {option.high:g}" if option.high is not None else "",
        ]
        text = option.text
        if option.choices:
            text += f" One of {', '.join(f'`{choice}`' for choice in option.choices)}."
        elif any(bounds):
            text += f" ({', '.join(filter(None, bounds))})"
        if option.reason:
            text += f" Why: {option.reason}."
        yield f"| `{name}`{aliases} | {default} | {option.unit} | {_cell(text)} |"


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return ""
    if high is None or high >= 1e15:  # what the number's own type ends at, which tells nobody anything
        return f"{low:g} or more"
    return f"{low:g} to {high:g}"


def _fields() -> Iterator[str]:
    yield "| field | type | range | default | edits | generations | variations | what it does |"
    yield "|---|---|---|---|---|---|---|---|"
    for field in FIELDS.values():
        if not field.served:
            continue
        extent = ", ".join(f"`{choice}`" for choice in field.choices) or _range(field.low, field.high)
        takes = " | ".join(
            "yes" if endpoint in field.endpoints else "" for endpoint in ("edit", "generation", "variation")
        )
        text = (
            field.text
            + (f" Same as `{field.same_as}`." if field.same_as else "")
            + (f" Needs {field.needs}." if field.needs else "")
        )
        yield f"| `{field.name}` | {field.kind} | {extent} | {field.default} | {takes} | {_cell(text)} |"


def _kinds(root: type[ApiError]) -> Iterator[type[ApiError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _kinds(kind)


def _errors() -> Iterator[str]:
    yield "| status | code | type | when | clients may retry |"
    yield "|---|---|---|---|---|"
    rows: dict[tuple[int, str], str] = {}
    for kind in _kinds(ApiError):
        if kind is ApiError:
            continue
        told = (kind.__doc__ or "").partition(": ")[2]
        retry = (
            "yes"
            if kind.should_retry or (kind.should_retry is None and kind.status in (408, 429, 500, 503, 504))
            else "no"
        )
        rows[kind.status, str(kind.code)] = (
            f"| {kind.status} | `{kind.code}` | `{kind.type}` | {_cell(told)} | {retry} |"
        )
    yield from (rows[key] for key in sorted(rows))


def _metrics() -> Iterator[str]:
    metrics: Any = Metrics()
    yield "| metric | labels | what it counts |"
    yield "|---|---|---|"
    for name, family in sorted(vars(metrics).items()):
        if name != "registry":
            described = family.describe()[0]
            suffix = "_total" if described.type == "counter" else ""
            yield f"| `{described.name}{suffix}` | {', '.join(family._labelnames)} | {_cell(described.documentation)} |"
    for name, watched in WATCHED.items():
        yield f"| `{name}` | {', '.join(watched.labels)} | {_cell(watched.text)} |"


def _commands() -> Iterator[str]:
    yield "| command | what it does | exit codes |"
    yield "|---|---|---|"
    for command in COMMANDS.values():
        yield f"| `ovserve {command.name}` | {command.text} | {', '.join(f'{code:d}' for code in command.exit_codes)} |"
    yield ""
    yield "| exit code | meaning |"
    yield "|---|---|"
    codes = sorted({code for command in COMMANDS.values() for code in command.exit_codes})
    yield from (f"| {code:d} | {code.text} |" for code in codes)


def make_reference() -> str:
    """The whole page."""
    unsupported = [field for field in FIELDS.values() if not field.served]
    lines = [
        "# Reference",
        "",
        "Made by `scripts/make_reference.py` from the tables in the code; do not edit.",
        "",
        "## Commands",
        "",
        "`python -m ovserve` runs the same commands. Without a command's name the arguments belong to `serve`.",
        "",
        *_commands(),
        "",
        "## Options of the server",
        "",
        f"Each is a flag (`--port`, `--port 0`; underscores or hyphens), an environment variable (`{ENVIRONMENT_PREFIX}PORT`) or a line",
        "in the TOML file that `--config` (`OVSERVE_CONFIG`) names. A flag wins over the environment, that over the file. A variable that",
        "is set and empty gives nothing: the file or the default holds.",
        "",
        *_options(Settings),
        "",
        "## Options of a model",
        "",
        "Lines of a `[[model]]` table; as flags or in the environment they describe the only model.",
        "",
        *_options(ModelSettings),
        "",
        "## Request fields",
        "",
        "`x`, `x[]` and `image[0]` are one name where a list is taken. An empty value, `null` and an absent field mean the same. A value",
        "may come twice when it is equal. Unknown names get 400 `unknown_parameter` with the nearest known one.",
        "",
        *_fields(),
        "",
        "Fields that clients know and no model supports; they get 400 `unsupported_parameter`: "
        + ", ".join(f"`{field.name}`" for field in unsupported)
        + ".",
        "",
        "These cannot be combined:",
        "",
        *(f"- {rule.first_value} with {rule.second_value}" for rule in EXCLUSIONS),
        "",
        "## Paths",
        "",
        "Rows marked yes are served under `/v3`, `/v1`, `/v3/v1`, `/openai/v1` and bare. HEAD is answered as GET, OPTIONS with Allow and CORS fields.",
        "",
        "| method | path | prefixes | what it is |",
        "|---|---|---|---|",
        *(f"| {row.method} | `{row.path}` | {'yes' if row.prefixed else ''} | {_cell(row.text)} |" for row in ROUTES),
        "",
        "## Errors",
        "",
        'Every error is `{"error": {"message", "type", "param", "code"}}` with an `x-request-id` field; `param` names the field at fault.',
        "Official clients retry 408, 409, 429 and every 5xx twice unless `x-should-retry` says no.",
        "",
        *_errors(),
        "",
        "## Metrics",
        "",
        *_metrics(),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(make_reference(), "utf-8")
    sys.stdout.write(f"wrote {PAGE.name}\n")
