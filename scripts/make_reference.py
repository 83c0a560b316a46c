#!/usr/bin/env python3
"""Write docs/reference.md from the tables in the code: options, request fields, paths, errors, metrics.

The test suite fails if the page differs from the output of this script.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.metrics import MetricWrapperBase

from ovserve.api.parameters.fields import EXCLUSIONS, FIELDS
from ovserve.api.routes import ROUTES
from ovserve.api.sdapi.fields import FIELDS as SDAPI_FIELDS
from ovserve.api.sdapi.fields import IMG2IMG, TXT2IMG
from ovserve.cli.commands import COMMANDS
from ovserve.errors import ApiError
from ovserve.metrics import WATCHED, Metrics
from ovserve.models.classes import CLASSES, ENGINES
from ovserve.models.families import CLASSIFIER_FREE, FAMILIES
from ovserve.settings.options import ModelSettings, Settings, options_of
from ovserve.settings.sources import ENVIRONMENT_PREFIX

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _options(table: type) -> Iterator[str]:
    yield "| option | default | unit | description |"
    yield "|---|---|---|---|"
    for name, (entry, option) in options_of(table).items():
        aliases = "".join(f", `{alias}`" for alias in option.aliases)
        shown = str(entry.default).lower() if isinstance(entry.default, bool) else entry.default
        default = "" if shown in (None, "", ()) else f"`{shown}`"
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
    if high is None or high >= 1e15:  # the limit of the number's type, which is no useful information
        return f"{low:g} or more"
    return f"{low:g} to {high:g}"


def _fields() -> Iterator[str]:
    yield "| field | type | range | default | edits | generations | variations | description |"
    yield "|---|---|---|---|---|---|---|---|"
    for field in FIELDS.values():
        if not field.served:
            continue
        extent = ", ".join(f"`{choice}`" for choice in field.choices) or _range(field.low, field.high)
        takes = " | ".join(
            "yes" if endpoint in field.endpoints else "" for endpoint in ("edit", "generation", "variation")
        )
        text = field.text + (f" Needs {field.needs}." if field.needs else "")
        yield f"| `{field.name}` | {field.kind} | {extent} | {field.shown_default} | {takes} | {_cell(text)} |"


def _sdapi_fields() -> Iterator[str]:
    yield "| field | type | txt2img | img2img | here | becomes | description |"
    yield "|---|---|---|---|---|---|---|"
    for field in SDAPI_FIELDS.values():
        takes = " | ".join("yes" if endpoint in field.endpoints else "" for endpoint in (TXT2IMG, IMG2IMG))
        fills = ", ".join(f"`{name}`" for name in field.fills.split(", ") if name)
        yield f"| `{field.name}` | {field.kind} | {takes} | {field.use} | {fills} | {_cell(field.text)} |"


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
        text = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].partition(": ")[2]
        retry = (
            "yes"
            if kind.should_retry or (kind.should_retry is None and kind.status in (408, 429, 500, 503, 504))
            else "no"
        )
        rows[kind.status, str(kind.code)] = (
            f"| {kind.status} | `{kind.code}` | `{kind.type}` | {_cell(text)} | {retry} |"
        )
    yield from (rows[key] for key in sorted(rows))


def _metrics() -> Iterator[str]:
    metrics: Any = Metrics()
    yield "| metric | labels | description |"
    yield "|---|---|---|"
    for _, family in sorted(vars(metrics).items()):
        if isinstance(family, MetricWrapperBase):
            described = family.describe()[0]
            suffix = "_total" if described.type == "counter" else ""
            yield f"| `{described.name}{suffix}` | {', '.join(family._labelnames)} | {_cell(described.documentation)} |"
    for name, watched in WATCHED.items():
        yield f"| `{name}` | {', '.join(watched.labels)} | {_cell(watched.text)} |"


def _classes() -> Iterator[str]:
    yield "| class | family | genai | stepwise | references | strength | negative prompt | window |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, row in CLASSES.items():
        traits = FAMILIES[row.family]
        serving = [found for engine in ENGINES if (found := row.serving(engine)) is not None]
        if not serving:
            continue
        tasks = [", ".join(sorted(found.tasks)) if (found := row.serving(engine)) else "" for engine in ENGINES]
        references = " / ".join(str(found.references) for found in serving) if traits.edits_by_reference else ""
        negative = traits.guidance == CLASSIFIER_FREE and any(found.negative_prompt for found in serving)
        window = traits.t5.tokens if traits.t5 else traits.window
        cells = [
            f"`{name}`",
            row.family,
            *tasks,
            references,
            "" if traits.edits_by_reference else "yes",
            "yes" if negative else "",
            str(window or "the encoder's"),
        ]
        yield f"| {' | '.join(cells)} |"


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
    """Return the whole page."""
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
        "Each option is a flag (`--port 0`; with underscores or hyphens), an environment variable",
        f"(`{ENVIRONMENT_PREFIX}PORT`) or a line in the TOML file that `--config` (`OVSERVE_CONFIG`) names. A flag",
        "overrides the environment, and the environment overrides the file. An empty variable counts as not set.",
        "",
        *_options(Settings),
        "",
        "## Options of a model",
        "",
        "These are lines of a `[[model]]` table. As flags or in the environment they describe the only model.",
        "",
        *_options(ModelSettings),
        "",
        "LoRA adapters are inner tables, as many as there are adapters: `[[model.lora]]` with `alias` (the file's name",
        "without its ending, if left out), `path` (a `.safetensors` file) and `alpha` (1; from -100 to 100), and",
        "`[[model.composite]]` with `alias` and `components`, a table of weights by adapter or a list of adapters.",
        "",
        "## Pipeline classes",
        "",
        "The class is `_class_name` in `model_index.json`; others are refused. A model has these tasks as far as its",
        "directory has the components; a UNet with nine channels only inpaints. `references`: the most images",
        "of one edit that are references, by engine. The window is in tokens, those of a chat template included.",
        "",
        *_classes(),
        "",
        "## Request fields",
        "",
        "For a field that takes a list, `image`, `image[]` and `image[0]` are the same name. An empty value, `null`",
        "and an absent field mean the same. A field may be repeated with an equal value. An unknown name is answered",
        "with 400 `unknown_parameter`, which suggests the nearest known name, or ignored (option `unknown_fields`).",
        "",
        *_fields(),
        "",
        "Fields that clients may know, but that are answered with 400 `unsupported_parameter`: "
        + ", ".join(f"`{field.name}`" for field in unsupported)
        + ".",
        "",
        "Combinations that are rejected:",
        "",
        *(f"- {rule.first_value} with {rule.second_value}" for rule in EXCLUSIONS),
        "",
        "## Request fields of AUTOMATIC1111's API",
        "",
        "`/sdapi/v1/txt2img` and `/sdapi/v1/img2img` take JSON. A field becomes a request field of the table above,",
        "with the same limits. A field that is left out has the default of the other routes, not AUTOMATIC1111's,",
        "except for `seed` and the fields of masks. Numbers may be sent as text. `here` says what happens to a field:",
        "",
        "- used: it becomes the field in the next column.",
        "- ignored: it changes nothing. If its value asks for something, the reply lists it in `ignored` of `info`, as",
        "  it lists every unknown field.",
        "- refused: 422, unless its value asks for nothing.",
        "- no effect: it is not listed either.",
        "",
        *_sdapi_fields(),
        "",
        'Errors on these paths are `{"error", "detail", "body", "errors"}`; `detail` is the message. Where the table',
        'of errors below has 400, these paths answer 422, and `detail` is a list of `{"type", "loc", "msg"}`: `type`',
        "is the code in that table, and `loc` the field. An unknown sampler or model and a missing image get 404.",
        "",
        "## Paths",
        "",
        "Rows marked yes are served under `/v3`, `/v1`, `/v3/v1`, `/openai/v1`, `/api/v1` and `/engines/v1`, and",
        "without a prefix; the paths of images and models also under `/openai`. Doubled slashes count as one. HEAD is",
        "answered like GET, OPTIONS with Allow and the CORS fields.",
        "",
        "| method | path | prefixes | description |",
        "|---|---|---|---|",
        *(f"| {row.method} | `{row.path}` | {'yes' if row.prefixed else ''} | {_cell(row.text)} |" for row in ROUTES),
        "",
        "## Errors",
        "",
        'Every error is `{"error": {"message", "type", "param", "code"}}` with the header field `x-request-id`;',
        "`param` names the wrong field. Official clients retry 408, 409, 429 and every 5xx twice unless",
        "`x-should-retry` is false.",
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
