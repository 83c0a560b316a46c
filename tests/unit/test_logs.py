"""Log records are one line each and can be parsed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from ovserve.logs import configure_logs, fields

log = logging.getLogger("ovserve.test")


@pytest.fixture(autouse=True)
def _restore_handlers() -> Iterator[None]:
    root = logging.getLogger("ovserve")
    kept = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.level, root.propagate = kept


def test_value_of_several_words_is_one_token(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", "text")
    log.info("loaded", extra=fields(model="m", why="it is quick", path='a="b"', note="", count=3, name="a\nb"))
    line = capsys.readouterr().err
    assert line.endswith(r''' model=m why="it is quick" path="a=\"b\"" note="" count=3 name="a\nb"''' + "\n")
    assert line.count("\n") == 1


def test_json_line_has_the_fields_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", "json")
    log.warning("refused", extra=fields(status=400, why="a\nb"))
    entry = json.loads(capsys.readouterr().err)
    assert (entry["level"], entry["message"], entry["status"], entry["why"]) == ("warning", "refused", 400, "a\nb")
