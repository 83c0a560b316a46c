"""Corpus of malformed bodies: each one is refused with the error of the rule that it breaks."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ovserve.errors import ApiError
from ovserve.front.forms.form import read_form
from ovserve.wire.local.spool import Spool
from tests.bodies import MemoryBody, settings

FOLDER = Path(__file__).parent / "corpus" / "forms"
NAMES = sorted(path.stem for path in FOLDER.glob("*.body"))
MOST_CASES_OF_A_RULE = 5  # more cases of one rule would not test more rules


def expected(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return found


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spool]:
    spool = Spool(tmp_path_factory.mktemp("spool"), 1 << 28)
    yield spool
    spool.close()


def test_corpus_covers_many_rules(capsys: pytest.CaptureFixture[str]) -> None:
    rules = defaultdict(list)
    for name in NAMES:
        rules[expected(name)["rule"]].append(name)
    with capsys.disabled():
        print(f"\n{len(NAMES)} malformed bodies, {len(rules)} rules")
        for rule, names in sorted(rules.items()):
            print(f"  {rule}: {', '.join(names)}")
    assert len(NAMES) >= 120
    assert max(len(names) for names in rules.values()) <= MOST_CASES_OF_A_RULE
    assert {path.stem for path in FOLDER.glob("*.json")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_bodies_are_refused_in_every_split(name: str, spool: Spool) -> None:
    case = expected(name)
    data = (FOLDER / f"{name}.body").read_bytes()
    dice = random.Random(name)
    options = settings(**case.get("settings", {}))
    seen = set()
    for sizes in ([], [1] * len(data), [dice.randint(1, 9) for _ in data], [dice.randint(1, 90) for _ in data]):
        for announced in (True, False):
            with pytest.raises(ApiError) as caught:
                read_form(MemoryBody(data, sizes, announced=announced), case["content_type"], spool, options)
            seen.add((type(caught.value).__name__, caught.value.status, caught.value.message))
            assert spool.used_bytes == 0
    ((error, status, message),) = seen
    assert (error, status) == (case["error"], case["status"]), message
    assert case["says"] in message
