#!/usr/bin/env python3
"""Take the screenshots of the web pages in docs/pictures: three widths, light and dark.

    scripts/make_screenshots.py

Starts a server with the built-in model. Needs the packages of scripts/test, and Chromium.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.browser import open_browser, open_page  # noqa: E402  importable only after the line above
from tests.live import LiveServer  # noqa: E402

FOLDER = ROOT / "docs" / "pictures"
WIDTHS = {"phone": (390, 844), "tablet": (820, 1180), "desktop": (1280, 860)}
COLOURS = 128  # of the palette: the pages are flat


def main() -> None:
    """Write every screenshot."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as spool, LiveServer(spool=Path(spool)) as server, open_browser() as browser:
        for name, (width, height) in WIDTHS.items():
            for scheme in ("light", "dark"):
                size = {"width": width, "height": height}
                with open_page(browser, viewport=size, color_scheme=scheme) as page:
                    show_edit(page, server.url)
                    save(page, f"page-{name}-{scheme}")
        with open_page(browser, viewport={"width": 1280, "height": 860}, color_scheme="light") as page:
            show_mask(page, server.url)
            save(page, "page-mask")
            with load(server.url):
                show_status(page, server.url)
                save(page, "status")


def show_edit(page: Page, url: str) -> None:
    """Make two sample edits and show the first, half compared with its source."""
    page.goto(url + "/")
    expect(page.locator("#server")).to_have_text(re.compile("^Ready"))
    for number, label in enumerate(("Draw two hearts", "Replace it by a star", "Make the circle green"), 1):
        page.click(f"text={label}")
        expect(page.locator("#strip li")).to_have_count(number)
        expect(page.locator("#progress")).to_be_hidden()
        page.click("#view-back")
        if page.locator("#remove").is_visible():
            page.click("#remove")
    page.click("#strip li:first-child button")
    page.locator("#compare").fill("50")
    page.evaluate("() => scrollTo(0, 0)")


def show_mask(page: Page, url: str) -> None:
    """Load the sample picture, paint on it and extend it."""
    page.goto(url + "/")
    page.set_input_files("#file", ROOT / "tests" / "data" / "red_circle.png")
    page.fill("#prompt", "a yellow star on a blue background")
    page.click("[data-tool=frame]")
    page.fill("#margin-right", "96")
    page.press("#margin-right", "Tab")
    page.click("[data-tool=brush]")
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] * 0.42, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y - 40)
    page.mouse.down()
    for point in ((x + 40, y - 40), (x - 40, y + 10), (x + 40, y + 50)):
        page.mouse.move(*point, steps=6)
    page.mouse.up()


@contextmanager
def load(url: str) -> Iterator[None]:
    """Keep the server busy with two clients."""
    is_over = threading.Event()
    body = json.dumps({"prompt": "a green circle on a blue background"}).encode()

    def client() -> None:
        while not is_over.wait(random.random()):
            request = urllib.request.Request(f"{url}/v1/images/generations", body, {"content-type": "application/json"})
            urllib.request.urlopen(request, timeout=60).close()

    threads = [threading.Thread(target=client) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def show_status(page: Page, url: str) -> None:
    """Wait until the plots have some points."""
    page.goto(url + "/status")
    expect(page.locator("#workers tr")).to_have_count(1)
    expect(page.locator("#plot-rate path")).to_have_attribute("d", re.compile("(L[^L]*){20}"), timeout=120_000)


def save(page: Page, name: str) -> None:
    """Write what the window shows as a small PNG."""
    path = FOLDER / f"{name}.png"
    page.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
