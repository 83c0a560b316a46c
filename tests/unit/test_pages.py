"""The static files of the web pages, and the document of the status page."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from ovserve.api.pages import EDITOR_PAGE, STATUS_PAGE, page_file
from ovserve.api.routes import match_route
from ovserve.api.status import ERRORS_KEPT, LastErrors, status_document
from ovserve.dispatch.model_queue import ModelStatus
from ovserve.dispatch.statuses import WorkerStatus
from ovserve.errors import InternalError, InvalidValue, NotFound, QueueFull

WEB = files("ovserve.web")
TEXTS = {
    entry.name: entry.read_text("utf-8")
    for entry in WEB.iterdir()
    if entry.name.endswith((".html", ".js", ".css", ".json"))
}


def test_policy_allows_only_files_of_this_server() -> None:
    for name in (EDITOR_PAGE, STATUS_PAGE):
        policy = page_file(name).headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy


@pytest.mark.parametrize("name", sorted(name for name in TEXTS if name.endswith(".html")))
def test_pages_have_no_inline_code_and_load_nothing_from_elsewhere(name: str) -> None:
    text = TEXTS[name]
    assert "<style" not in text
    assert not re.search(r"<script(?![^>]*\bsrc=)", text)
    assert not re.search(r"\s(?:style|on[a-z]+)=", text)
    links = re.findall(r"(?:src|href)=\"([^\"]*)\"", text)
    assert links
    for link in links:
        assert link.startswith(("/", "#")), link
        if link.startswith("/"):
            assert match_route("GET", link).route is not None
        if link.startswith("/web/"):
            page_file(link.removeprefix("/web/"))


@pytest.mark.parametrize("name", sorted(name for name in TEXTS if name.endswith((".js", ".css", ".json"))))
def test_scripts_and_styles_name_only_files_that_exist(name: str) -> None:
    for found in re.findall(r"\"(?:\./|/web/)([\w.-]+)\"", TEXTS[name]):
        page_file(found)
    assert "://" not in re.sub(r"(?m)^\s*//.*$", "", TEXTS[name])


def test_scripts_use_only_elements_that_the_pages_have() -> None:
    elements = {name for text in TEXTS.values() for name in re.findall(r"\sid=\"([\w-]+)\"", text)}
    for name, text in TEXTS.items():
        if name.endswith(".js"):
            assert set(re.findall(r"\bat\(\"([\w-]+)\"\)", text)) <= elements, name


def test_file_that_the_client_has_is_not_sent_again() -> None:
    first = page_file("app.js")
    assert first.media_type.startswith("text/javascript")
    again = page_file("app.js", first.headers["etag"])
    assert (again.status, again.content) == (304, b"")
    assert page_file("app.js", '"another"').status == 200


@pytest.mark.parametrize("name", ["", "missing.js", "../settings/options.py", "__init__.py", ".", "a" * 10_000])
def test_only_files_of_the_pages_are_served(name: str) -> None:
    with pytest.raises(NotFound) as found:
        page_file(name)
    assert len(str(found.value)) < 300


def test_status_keeps_the_newest_errors_of_the_server() -> None:
    errors = LastErrors()
    errors.note(InvalidValue("the client's", param="n"), request_id="r", path="/images/edits")
    errors.note(QueueFull("the client's", retry_after_s=1), request_id="r", path="/images/edits")
    assert errors.newest() == []
    for number in range(ERRORS_KEPT + 5):
        errors.note(InternalError(f"error {number} " + "x" * 1000), request_id=f"r{number}", path="/images/edits")
    newest = errors.newest()
    assert len(newest) == ERRORS_KEPT
    assert newest[0]["request"] == f"r{ERRORS_KEPT + 4}"
    assert (newest[0]["status"], newest[0]["path"]) == (500, "/images/edits")
    assert len(newest[0]["message"]) <= 500


def test_status_document_has_models_and_workers() -> None:
    model = ModelStatus(
        "m", ready=True, reason="", failed=False, workers=1, queued=2, running=1, capacity=4, job_s=0.123456
    )
    worker = WorkerStatus("m/0#1", "m", "denoise", 0.2, is_ready=True, jobs=1, capacity=4, jobs_done=7)
    known = {"counts": {"m": {"calls": 4, "rows": 9, "call_us": 250_400}}, "memory_bytes": {"m": 1 << 20}}
    document = status_document(
        {"m": model}, [worker], LastErrors(), **known, started_at=0, is_ready=True, is_draining=False
    )
    shown = document["models"][0]
    assert (shown["calls"], shown["rows"], shown["call_s"], shown["memory_bytes"]) == (4, 9, 0.25, 1 << 20)
    assert document["models"][0]["job_s"] == 0.123
    assert document["models"][0]["ready"] is True
    assert document["workers"] == [
        {"name": "m/0#1", "model": "m", "phase": "denoise", "silent_s": 0.2, "ready": True, "jobs": 1, "capacity": 4,
         "jobs_done": 7}
    ]  # fmt: skip
