"""The documentation matches the code: options, fields, routes, errors, links."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovserve.api.parameters.fields import FIELDS
from ovserve.cli.modelserver import read_command_line
from ovserve.errors import ApiError
from ovserve.settings.options import ModelSettings, Settings, options_of

ROOT = Path(__file__).parents[2]
RETRIED_STATUSES = (408, 429, 500, 503, 504)  # by OpenAI's clients, of those that this server sends
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def reference() -> str:
    """Return the reference page that scripts/make_reference.py generates."""
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "scripts" / "make_reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.make_reference())


def _tree(root: type[ApiError]) -> Iterator[type[ApiError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


def test_reference_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "reference.md").read_text("utf-8")
    assert page == reference(), "run scripts/make_reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_named_in_pages_exist(page: Path) -> None:
    known = {
        key
        for table in (Settings, ModelSettings)
        for name, (_, option) in options_of(table).items()
        for key in (name, *option.aliases)
    }
    known |= {"config", "version", "help"}
    for command in (ROOT / "ovserve" / "cli").glob("*.py"):  # flags of the other commands
        known |= set(re.findall(r'"(?:--)?([a-z_]+)"', command.read_text("utf-8")))
    for name in re.findall(r"`--([a-z_-]+)", page.read_text("utf-8")):
        assert name.replace("-", "_") in known, f"{page.name}: --{name}"
    for name in re.findall(r"OVSERVE_([A-Z_]+)", page.read_text("utf-8")):
        assert name.lower() in known | {"name"}, f"{page.name}: OVSERVE_{name}"


def test_scripts_named_in_the_readme_exist() -> None:
    for name in re.findall(r"scripts/[a-z_.]+", (ROOT / "README.md").read_text("utf-8")):
        assert (ROOT / name.rstrip(".")).exists(), name


def test_edit_guide_lists_the_prompts_of_its_sheets() -> None:
    script = (ROOT / "scripts" / "make_sheets.py").read_text("utf-8")
    prompts = re.findall(r'"((?:[a-z]+ )+background)"', script)
    page = (ROOT / "docs" / "editing.md").read_text("utf-8")
    listed = re.findall(r"`((?:[a-z]+ )+background)`", page)
    assert listed == prompts


def rows(page: str, columns: int) -> list[list[str]]:
    """Return the rows of all tables with so many columns, without their heads."""
    found: list[list[str]] = []
    previous = ""
    for line in (ROOT / "docs" / page).read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and previous.startswith("|") and not line.startswith("|-") and len(cells) == columns:
            found.append(cells)
        previous = line
    return found


def test_error_page_has_every_code_and_says_what_to_do() -> None:
    kinds = [kind for kind in _tree(ApiError) if kind.code is not None]
    expected = {
        (str(kind.status), f"`{kind.code}`"): kind.should_retry
        or (kind.should_retry is None and kind.status in RETRIED_STATUSES)
        for kind in kinds
    }
    listed = rows("errors.md", 5)
    assert sorted((status, code) for status, code, *_ in listed) == sorted(expected)
    for status, code, meaning, action, again in listed:
        assert again == ("yes" if expected[status, code] else "no"), code
        assert min(len(meaning), len(action)) > 5, code


def test_moving_page_says_what_each_flag_of_the_model_server_does() -> None:
    numbers = ("rest_workers", "num_streams", "max_num_images_per_prompt", "max_num_inference_steps")
    named = {name for table in (Settings, ModelSettings) for name in options_of(table)} | {"config"}
    switches = ("pull", "configure", "overwrite_models", "metrics_enable")
    for flag, here, _ in rows("moving.md", 3):
        if not flag.startswith("`--"):
            continue
        name = flag.strip("`-")
        arguments = [f"--{name}"] if name in switches else [f"--{name}={4 if name in numbers else 'image_generation'}"]
        context = {
            "pull": ["--source_model=a/b"],
            "overwrite_models": ["--source_model=a/b"],
            "weight_format": ["--source_model=a/b"],
            "extra_quantization_params": ["--source_model=a/b"],
            "configure": ["--model_path=/m"],
            "metrics_list": ["--metrics_enable"],
        }.get(name, [])
        read = read_command_line([*context, *arguments])
        is_ignored = any(line.startswith(f"--{name}:") for line in read.ignored)
        assert is_ignored == (here == "no effect"), flag
        if re.fullmatch("`[a-z_]+`", here):
            assert here.strip("`") in named, f"{flag}: {here}"


def test_moving_page_has_every_field_of_the_model_server() -> None:
    vectors = json.loads((ROOT / "tests" / "data" / "model-server.json").read_text("utf-8"))
    sent = {part["name"] for vector in vectors["vectors"] for part in vector.get("multipart", []) if "name" in part}
    sent |= {name for vector in vectors["vectors"] for name in (vector.get("json") or {})}
    listed = {name for row in rows("moving.md", 3) for name in re.findall("`([a-z_0-9]+)`", row[0])}
    fields = {name for name in sent if name in FIELDS and FIELDS[name].served}
    assert fields - listed == set()
    assert {name for name in listed if name not in FIELDS} == set()
