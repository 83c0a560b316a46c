"""A headless Chromium under Playwright, for tests of the web pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.chromium import EXECUTABLE

__all__ = ["AXE", "TIMEOUT_S", "open_browser", "open_page", "serious_violations"]

TIMEOUT_S = 60.0  # for every wait: the tests share two cores with what they test
AXE = Path(__file__).resolve().parents[1] / ".venv" / "node" / "node_modules" / "axe-core" / "axe.min.js"
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start Chromium; it ends with the block."""
    expect.set_options(timeout=TIMEOUT_S * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=EXECUTABLE, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(browser: Browser, **context: Any) -> Iterator[Page]:
    """Open a page with storage of its own; `context` goes to Playwright.

    Raises:
        AssertionError: at the end, if the page wrote an error or a warning to the console, or threw one. The browser's
            own lines about replies of the server that are not 2xx do not count.
    """
    complaints: list[str] = []
    opened = browser.new_context(**context)
    opened.set_default_timeout(TIMEOUT_S * 1000)
    page = opened.new_page()
    page.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    try:
        yield page
    finally:
        opened.close()
    assert [text for text in complaints if not text.startswith("Failed to load resource: the server responded")] == []


def serious_violations(page: Page) -> list[str]:
    """Return what axe finds that is serious or critical, as `rule: element`."""
    # Evaluated by the browser's debugger: the page's policy allows no further script.
    page.evaluate(AXE.read_text("utf-8"))
    found = page.evaluate("async () => (await axe.run()).violations")
    return [
        f"{rule['id']}: {node['html'][:120]}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]
