"""The documentation matches the code: options, fields, routes, errors, links."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from ovserve.settings.options import ModelSettings, Settings, options_of

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def reference() -> str:
    """Return the reference page that scripts/make_reference.py generates."""
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "scripts" / "make_reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.make_reference())


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


def test_gallery_lists_the_prompts_of_its_sheets() -> None:
    script = (ROOT / "scripts" / "make_sheets.py").read_text("utf-8")
    prompts = re.findall(r'"((?:[a-z]+ )+background)"', script)
    page = (ROOT / "docs" / "gallery.md").read_text("utf-8")
    listed = re.findall(r"`((?:[a-z]+ )+background)`", page)
    assert listed == prompts
