"""The fuzzers: replay the committed corpus, then run each fuzzer on it for a bounded time.

A longer run: `python -m tests.fuzz.fuzz multipart -max_total_time=3600 FOLDER tests/fuzz/corpus/multipart`. New inputs
are saved in FOLDER. Add an input that failed to the corpus that covers the broken rule, together with the fix.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).parent / "corpus"
SECONDS, HEAVY_SECONDS = 3, 300


@pytest.mark.parametrize("target", TARGETS)
def test_corpus_passes(target: str) -> None:
    files = sorted((CORPUS / target).iterdir())
    assert len(files) > 50
    for file in files:
        TARGETS[target](file.read_bytes())


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="atheris has no build for this Python yet")
@pytest.mark.parametrize("seconds", [SECONDS, pytest.param(HEAVY_SECONDS, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("target", TARGETS)
def test_fuzzing_finds_nothing_new(target: str, seconds: int, tmp_path: Path) -> None:
    found = tmp_path / "found"
    found.mkdir()
    limits = [f"-max_total_time={seconds}", "-timeout=20", "-max_len=2048", "-rss_limit_mb=0"]
    command = [sys.executable, "-m", "tests.fuzz.fuzz", target, *limits, f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [*command, str(found), str(CORPUS / target)], cwd=ROOT, capture_output=True, timeout=seconds + 190, check=False
    )
    report = done.stderr.decode(errors="replace")
    failures = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert done.returncode == 0, f"{failures}\n{report[-4000:]}"
    assert "Done " in report, report[-4000:]
