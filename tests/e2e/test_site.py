"""The documentation as a site: mkdocs builds it with warnings as errors, and its pages load nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Links that a reader may follow; a browser loads only what these attributes of these elements name.
LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(https?:[^\" >]*)|<link\b[^>]*\bhref=\"?(https?:[^\" >]*)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return directory


def test_every_page_is_in_the_site(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").glob("*.md")}
    missing = [page for page in pages - {Path("package.html")} if not (site / page).is_file()]
    assert missing == []
    assert "image-edit server" in (site / "index.html").read_text("utf-8")
    assert "Unreleased" in (site / "changelog.html").read_text("utf-8")


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        found = [match for match in LOADED.findall(path.read_text("utf-8")) if any(match)]
        assert found == [], path.name
