"""The web pages in a real browser against a live server with the built-in model."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.browser import AXE, open_browser, open_page, serious_violations
from tests.chromium import EXECUTABLE
from tests.live import BUILTIN_PATH, LiveServer
from tests.loras import write_adapter
from tests.tinymodels import tiny_model

pytestmark = pytest.mark.skipif(not EXECUTABLE, reason="Chromium is not installed; scripts/test installs it")

DATA = Path(__file__).resolve().parents[1] / "data"
SOURCE = DATA / "red_circle.png"
PROMPT = "a green circle on a blue background"
NODE = AXE.parents[1] / "node" / "bin" / "node"
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
# The browser shows no tool the parts of a form with files.
RECORD_FIELDS = """() => {
    window.sentFields = [];
    const append = FormData.prototype.append;
    FormData.prototype.append = function(name, ...rest) {
        window.sentFields.push(name);
        return append.call(this, name, ...rest);
    };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, server: LiveServer) -> Iterator[Page]:
    with open_page(browser, viewport={"width": 1280, "height": 900}) as page:
        page.goto(server.url + "/")
        expect(page.locator("#server")).to_have_text(re.compile("^Ready"))
        yield page


def load_picture(page: Page, path: Path = SOURCE) -> None:
    page.set_input_files("#file", path)
    expect(page.locator("#canvas")).to_be_visible()


def drag(page: Page, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drag over the canvas; points are parts of its width and height."""
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    (x0, y0), (x1, y1) = ((box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in (start, end))
    page.mouse.move(x0, y0)
    page.mouse.down()
    page.mouse.move(x1, y1, steps=8)
    page.mouse.up()


def send(page: Page, results: int = 1) -> None:
    page.click("#send")
    expect(page.locator("#strip li")).to_have_count(results)
    expect(page.locator("#progress")).to_be_hidden()
    expect(page.locator("#error")).to_be_hidden()


def shown_result(page: Page) -> Image.Image:
    with page.expect_download() as download:
        page.click("#download")
    return Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def test_newcomer_sees_a_sample_edit_after_one_click(page: Page) -> None:
    page.click("text=Make the circle green")
    expect(page.locator("#strip li")).to_have_count(1)
    expect(page.locator("#caption")).to_contain_text(f"{PROMPT} · 256x256 · seed 3")
    result = pixels(shown_result(page))
    red, green, blue = result[128, 128]
    assert green > red + 40
    assert green > blue + 40
    page.locator("#compare").fill("50")
    expect(page.locator("#split")).to_be_visible()


def test_painted_part_changes_and_all_else_stays(page: Page) -> None:
    load_picture(page)
    for start, end in (((0.45, 0.45), (0.55, 0.55)), ((0.45, 0.55), (0.55, 0.45))):
        drag(page, start, end)
    page.fill("#prompt", "a yellow star on a blue background")
    page.fill("#seed", "6")
    send(page)
    source, result = pixels(Image.open(SOURCE)), pixels(shown_result(page))
    changed = (source != result).any(axis=2)
    assert changed[118:138, 118:138].any()
    for part in (changed[:40], changed[-40:], changed[:, :40], changed[:, -40:]):
        assert not part.any()


def test_undo_redo_clear_invert_and_fill_change_the_mask(page: Page) -> None:
    load_picture(page)
    page.fill("#prompt", PROMPT)

    def mask() -> np.ndarray | None:
        page.click("[data-language=curl]")
        expect(page.locator("#announce")).to_contain_text(re.compile("Copied|code"))
        page.evaluate("() => { document.getElementById('announce').textContent = ''; }")
        if not page.locator("#mask-download").is_visible():
            return None
        with page.expect_download() as download:
            page.click("#mask-download")
        return np.asarray(Image.open(io.BytesIO(Path(download.value.path()).read_bytes())).convert("L"))

    page.click("#copy summary")
    assert mask() is None
    drag(page, (0.5, 0.5), (0.52, 0.5))
    painted = mask()
    assert painted is not None
    assert painted[128, 128] == 255
    assert painted[0, 0] == 0
    assert 0 < (painted > 0).mean() < 0.1
    page.click("#undo")
    assert mask() is None
    page.click("#redo")
    assert np.array_equal(mask(), painted)  # type: ignore[arg-type]
    page.click("#mask-invert")
    assert np.array_equal(mask(), 255 - painted)  # type: ignore[arg-type]
    page.click("[data-tool=eraser]")
    drag(page, (0.4, 0.2), (0.6, 0.2))
    erased = mask()
    assert erased is not None
    assert (erased < 255 - painted.astype(int)).any()
    page.click("#mask-fill")
    assert (mask() == 255).all()  # type: ignore[union-attr]
    page.click("#mask-clear")
    assert mask() is None
    page.set_input_files("#mask-file", DATA / "mask_alpha.png")
    loaded = mask()
    assert loaded is not None
    assert np.array_equal(loaded > 127, np.asarray(Image.open(DATA / "mask_white.png").convert("L")) > 127)


def test_outpainting_keeps_the_source_where_it_was(page: Page) -> None:
    load_picture(page)
    page.click("[data-tool=frame]")
    canvas = page.locator("#canvas").bounding_box()
    assert canvas is not None
    side = min(canvas["width"], canvas["height"]) * 0.8 / canvas["width"]
    drag(page, (0.5 + side / 2, 0.5), (0.5 + side / 2 + 0.1, 0.5))  # the right edge of the frame
    right = int(page.input_value("#margin-right"))
    assert 10 < right < 256
    page.fill("#margin-left", "32")
    page.press("#margin-left", "Tab")
    page.fill("#prompt", "a red circle on a blue background")
    send(page)
    result = shown_result(page)
    assert result.size == (256 + 32 + right, 256)
    assert np.array_equal(pixels(result)[:, 32 : 32 + 256], pixels(Image.open(SOURCE)))


def test_previews_come_before_the_picture_and_cancel_stops_the_job(page: Page, server: LiveServer) -> None:
    load_picture(page)
    page.fill("#prompt", PROMPT)
    page.click("#more summary")
    page.fill("[name=num_inference_steps]", "100")
    page.click("#send")
    expect(page.locator("#progress-text")).to_have_text(re.compile(r"step \d+ of \d+, [\d.]+ s left"))
    expect(page.locator("#view")).to_have_attribute("data-preview", "true")
    page.click("#cancel")
    expect(page.locator("#progress")).to_be_hidden()
    expect(page.locator("#canvas")).to_be_visible()
    expect(page.locator("#strip li")).to_have_count(0)
    for _ in range(100):
        model = server.fetch("/v1/models")[1]["data"][0]
        if not model["running"]:
            break
        page.wait_for_timeout(50)
    assert model["running"] == 0


def test_result_is_edited_again_used_as_mask_and_its_settings_return(page: Page) -> None:
    page.fill("#prompt", "a white square on a black background")
    page.fill("#seed", "5")
    send(page)
    page.reload()
    expect(page.locator("#strip li")).to_have_count(1)  # kept by the browser
    page.fill("#prompt", "something else")
    page.fill("#seed", "1")
    page.click("#strip button")
    page.click("#restore")
    assert page.input_value("#prompt") == "a white square on a black background"
    assert page.input_value("#seed") == "5"
    page.click("#use-input")
    expect(page.locator("#canvas")).to_be_visible()
    expect(page.locator("#found-settings")).to_be_visible()  # the server wrote them into the file
    page.fill("#prompt", "")
    page.click("#found-apply")
    assert page.input_value("#prompt") == "a white square on a black background"
    page.click("#strip button")
    page.click("#use-mask")
    expect(page.locator("#undo")).to_be_enabled()
    page.click("#strip button")
    page.click("#delete")
    expect(page.locator("#strip li")).to_have_count(0)


def test_error_is_shown_at_the_field_that_it_names(page: Page) -> None:
    page.fill("#prompt", PROMPT)
    page.fill("[name=n]", "99")
    page.click("#send")
    field = page.locator("[data-field=n]")
    expect(field.locator(".error")).to_contain_text("n is 99")
    expect(page.locator("[name=n]")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("[name=n]")).to_be_focused()
    page.fill("[name=n]", "2")
    expect(field.locator(".error")).to_have_count(0)
    send(page, results=2)


def test_snippets_run_as_pasted(page: Page, tmp_path: Path) -> None:
    load_picture(page)
    drag(page, (0.45, 0.45), (0.55, 0.55))
    page.fill("#prompt", 'it\'s a "green" circle; $HOME `x` \\ on a blue background')
    page.fill("#seed", "6")
    page.click("#copy summary")
    shutil.copy(SOURCE, tmp_path)
    code = {}
    for language, sign in (("curl", "curl"), ("python", "from openai"), ("node", 'from "openai"')):
        page.click(f"[data-language={language}]")
        expect(page.locator("#snippet")).to_contain_text(sign)
        code[language] = page.inner_text("#snippet")
    with page.expect_download() as download:
        page.click("#mask-download")
    download.value.save_as(tmp_path / "mask.png")
    (tmp_path / "run.py").write_text(code["python"])
    (tmp_path / "run.mjs").write_text(code["node"])
    (tmp_path / "node_modules").symlink_to(AXE.parents[1])
    results = []
    for command, name in (
        (["bash", "-c", code["curl"]], "result.png"),
        ([sys.executable, "run.py"], "result-0.png"),
        ([str(NODE), "run.mjs"], "result-0.png"),
    ):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=os.environ | {"HOME": "/"},
        )
        assert done.returncode == 0, done.stderr
        results.append((tmp_path / name).read_bytes())
        (tmp_path / name).unlink()
    assert results[0] == results[1] == results[2]


def test_keyboard_alone_paints_and_sends(page: Page) -> None:
    load_picture(page)
    page.locator("#canvas").focus()
    for key in ("ArrowRight", "ArrowDown", "]", "Enter", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    expect(page.locator("#undo")).to_be_enabled()
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    expect(page.locator("#undo")).to_be_disabled()
    page.keyboard.press("Control+Shift+z")
    page.keyboard.press("e")
    expect(page.locator("[data-tool=eraser]")).to_have_attribute("aria-checked", "true")
    page.locator("#prompt").focus()
    page.keyboard.type(PROMPT)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#strip li")).to_have_count(1)


def test_pasted_and_dropped_pictures_are_loaded(page: Page) -> None:
    transfer = """kind => fetch("/web/sample.png").then(reply => reply.blob()).then(blob => {
        const data = new DataTransfer();
        data.items.add(new File([blob], "dropped.png", {type: "image/png"}));
        const event = kind === "paste" ? new ClipboardEvent("paste", {clipboardData: data})
          : new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true});
        window.dispatchEvent(event);
    })"""
    for kind in ("drop", "paste"):
        page.evaluate(transfer, kind)
        expect(page.locator("#canvas")).to_be_visible()
        page.click("#remove")
        expect(page.locator("#drop")).to_be_visible()


def test_camera_takes_a_picture(page: Page) -> None:
    page.click("#camera-open")
    page.click("#camera-take")
    expect(page.locator("#canvas")).to_be_visible()


def test_camera_takes_no_picture_before_its_first_frame(page: Page) -> None:
    page.evaluate(
        "() => { HTMLMediaElement.prototype.play = () => new Promise(done => { window.firstFrame = done; }); }"
    )
    page.click("#camera-open")
    expect(page.locator("#camera-dialog")).to_be_visible()
    expect(page.locator("#camera-take")).to_be_disabled()
    page.evaluate("() => window.firstFrame()")
    expect(page.locator("#camera-take")).to_be_enabled()


def test_page_fits_a_phone_and_reads_well_to_a_screen_reader(browser: Browser, server: LiveServer) -> None:
    for scheme in ("light", "dark"):
        with open_page(browser, color_scheme=scheme, **PHONE) as page:
            page.goto(server.url + "/")
            expect(page.locator("#samples")).to_be_visible()
            assert serious_violations(page) == []
            load_picture(page)
            page.click("#more summary")
            page.click("#copy summary")
            page.click("[data-language=node]")
            expect(page.locator("#snippet")).to_be_visible()
            page.click("[data-tool=frame]")
            assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
            assert serious_violations(page) == []
            page.fill("#prompt", PROMPT)
            send(page)
            assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
            assert serious_violations(page) == []


def test_right_to_left_prompt_keeps_the_layout(page: Page) -> None:
    page.evaluate("() => { document.documentElement.dir = 'rtl'; }")
    page.fill("#prompt", "دائرة خضراء على خلفية زرقاء")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 1280
    send(page)


def test_status_page_shows_models_workers_and_errors(browser: Browser, server: LiveServer) -> None:
    with open_page(browser) as page:
        page.goto(server.url + "/status")
        expect(page.locator("#server")).to_contain_text("Ready")
        expect(page.locator("#models tr")).to_have_count(1)
        expect(page.locator("#workers tr")).to_have_count(1)
        expect(page.locator("#no-errors")).to_be_visible()
        expect(page.locator("#plot-queued path")).to_have_attribute("d", re.compile("^M"))
        image = {"image": SOURCE.read_bytes()}
        made = httpx.post(f"{server.url}/v1/images/edits", data={"prompt": PROMPT}, files=image, timeout=60)
        assert made.status_code == 200
        cells = page.locator("#models tr td")
        for column, name in ((7, "step time"), (8, "rows in a call"), (9, "memory")):
            expect(cells.nth(column), name).to_have_text(re.compile(r"^[1-9][0-9.]*$|^0\.[0-9]*[1-9]$"))
        expect(page.locator("#now-memory")).to_have_text(re.compile("^[1-9][0-9]* MiB"))
        assert serious_violations(page) == []


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of a model with an adapter and of one that takes references; each denoises one picture at a time."""
    folder = tmp_path_factory.mktemp("small")
    adapter = write_adapter(folder / "watercolour.safetensors", 0)
    config = folder / "c.toml"
    narrow = "streams = 1\nthreads = 1\nmax_batch = 1\n"
    config.write_text(
        f"[[model]]\nname = 'sd15'\npath = '{BUILTIN_PATH}'\n{narrow}[[model.lora]]\npath = '{adapter}'\n"
        f"[[model]]\nname = 'klein'\npath = '{tiny_model('klein')}'\n{narrow}"
    )
    with LiveServer(
        "--config", str(config), "--default_model", "sd15", "--ready_models", "all", spool=folder
    ) as server:
        yield server


def test_adapters_and_references_of_a_model_are_offered(browser: Browser, small: LiveServer) -> None:
    with open_page(browser) as page:
        page.goto(small.url + "/")
        expect(page.locator("#model option")).to_have_text(["sd15", "klein", "watercolour (adapter of sd15)"])
        others = [DATA / "mask_alpha.png", DATA / "mask_white.png"]
        page.set_input_files("#file", [SOURCE, *others])
        expect(page.locator("#references")).to_have_text(
            re.compile("^Not sent, .*one picture: mask_alpha.png, mask_white")
        )
        page.fill("#prompt", PROMPT)
        page.select_option("#model", "watercolour")
        send(page)
        expect(page.locator("#caption")).to_contain_text("sd15 with watercolour")
        page.click("#view-back")
        page.select_option("#model", "klein")
        expect(page.locator("#references")).to_have_text("Sent as references too: mask_alpha.png, mask_white.png.")
        expect(page.locator("[data-field=strength]")).to_be_hidden()
        page.click("#more summary")
        page.fill("[name=num_inference_steps]", "2")
        page.evaluate(RECORD_FIELDS)
        send(page, results=2)
        assert page.evaluate("() => window.sentFields").count("image[]") == 3


def test_place_in_the_queue_is_shown(browser: Browser, small: LiveServer) -> None:
    body = json.dumps({"model": "sd15", "prompt": PROMPT, "num_inference_steps": 100, "n": 10})
    with open_page(browser) as page, contextlib.ExitStack() as others:
        page.goto(small.url + "/")
        expect(page.locator("#server")).to_have_text(re.compile("^Ready"))
        page.fill("#prompt", PROMPT)
        for _ in range(6):  # they run for minutes, until their connections are closed
            connection = others.enter_context(contextlib.closing(http.client.HTTPConnection("127.0.0.1", small.port)))
            connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        expect(page.locator("#server")).to_have_text(re.compile("waiting"))
        page.click("#send")
        expect(page.locator("#progress-text")).to_have_text(
            re.compile(r"^Waiting: \d+ before this one|^Next in the queue")
        )
        page.click("#cancel")
        expect(page.locator("#progress")).to_be_hidden()
    for _ in range(600):
        status = small.fetch("/v1/models/sd15")[1]
        if not status["running"] and not status["queued"]:
            break
        time.sleep(0.1)
    assert (status["running"], status["queued"]) == (0, 0)


def test_requests_of_the_edit_guide_are_served(small: LiveServer, tmp_path: Path) -> None:
    guide = (DATA.parents[1] / "docs" / "editing.md").read_text("utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for name in ("person.png", "hat.png"):
        shutil.copy(SOURCE, tmp_path / name)
    for block in blocks:
        command = block.strip().replace("http://127.0.0.1:8000", small.url).replace("curl", "curl --max-time 60", 1)
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert '"b64_json"' in done.stdout, done.stdout[:500] + done.stderr


def test_view_is_zoomed_and_moved_and_seeds_are_drawn_and_kept(page: Page) -> None:
    load_picture(page)

    def painted(x: float, y: float) -> tuple[int, int]:
        """Return the middle of what one dab paints at this place of the canvas, in the picture's pixels."""
        drag(page, (x, y), (x + 0.001, y))
        page.click("[data-language=curl]")
        with page.expect_download() as download:
            page.click("#mask-download")
        mask = np.asarray(Image.open(io.BytesIO(Path(download.value.path()).read_bytes())).convert("L"))
        page.click("#mask-clear")
        rows, columns = np.nonzero(mask)
        return round(float(columns.mean())), round(float(rows.mean()))

    page.click("#copy summary")
    centre, off = painted(0.5, 0.5), painted(0.5, 0.6)
    for _ in range(3):
        page.click("#zoom-in")
    assert painted(0.5, 0.5) == pytest.approx(centre, abs=2), "the middle stays"
    zoomed = painted(0.5, 0.6)
    assert zoomed[1] - centre[1] == pytest.approx((off[1] - centre[1]) / 1.25**3, abs=3)
    page.click("[data-tool=pan]")
    drag(page, (0.5, 0.5), (0.5, 0.6))
    page.click("[data-tool=brush]")
    assert painted(0.5, 0.6) == pytest.approx(centre, abs=3), "the picture moves with the pointer"
    page.click("#zoom-fit")
    assert painted(0.5, 0.6) == pytest.approx(off, abs=2)
    page.click("#dice")
    drawn = page.input_value("#seed")
    assert drawn.isdigit()
    page.click("#dice")
    assert page.input_value("#seed") != drawn
    page.fill("#prompt", PROMPT)
    send(page)
    kept = page.input_value("#seed")
    page.fill("#seed", "")
    page.click("#lock")
    assert page.input_value("#seed") == kept
    expect(page.locator("#lock")).to_have_attribute("aria-pressed", "true")
    page.click("#view-back")
    send(page, results=2)
    expect(page.locator("#caption")).to_contain_text(f"seed {kept}")


def test_keys_are_asked_for(browser: Browser, tmp_path: Path) -> None:
    environment = {"OVSERVE_API_KEY": "sk-page", "OVSERVE_ADMIN_KEY": "adm-page"}
    with LiveServer(spool=tmp_path, environment=environment) as keyed, open_page(browser) as page:
        page.goto(keyed.url + "/")
        expect(page.locator("#server")).to_have_text("API key required")
        page.click("#key-open")
        page.fill("#key", "sk-page")
        page.click("#key-dialog button")
        expect(page.locator("#server")).to_have_text(re.compile("^Ready"))
        page.fill("#prompt", PROMPT)
        send(page)
        page.goto(keyed.url + "/status")
        expect(page.locator("#server")).to_have_text("Admin key required")
        page.fill("#key", "adm-page")
        page.click("#key-form button")
        expect(page.locator("#models tr")).to_have_count(1)
