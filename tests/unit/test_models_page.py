"""The figures of docs/models.md: made from the committed results, or by the page's own rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "models.md").read_text("utf-8")
LIMIT = ROOT / "benchmarks" / "results" / "2026-11-23-21ca294015-dirty-limit-full-size.json"
TEXT_TOKENS, PATCH_PX = 512, 16


def rows_of(section: str) -> list[list[str]]:
    """Return the cells of each line of the first table in a section, without its two head lines."""
    lines = PAGE.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0].splitlines()
    table = [line for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def measured_rate() -> float:
    series = json.loads(LIMIT.read_text("utf-8"))["series"]
    [rate] = [found for found in series if found["name"] == "rate of operations"]
    return float(rate["values"][0])


@pytest.mark.parametrize("row", rows_of("Memory and time"), ids=lambda row: row[0])
def test_estimates_follow_the_rule_of_the_page(row: list[str]) -> None:
    denoiser, text, fp16, int8, _steps, small, large = (float(cell) for cell in row[1:])
    assert fp16 == pytest.approx((denoiser + text) * 2e9 / 2**30, abs=0.06)
    assert int8 == pytest.approx((denoiser + text) * 1e9 / 2**30, abs=0.06)
    for shown, side in ((small, 512), (large, 1024)):
        tokens = (side // PATCH_PX) ** 2 + TEXT_TOKENS
        assert shown == pytest.approx(2 * denoiser * 1e9 * tokens / measured_rate(), abs=0.6)


@pytest.mark.parametrize(("engine", "shown"), [("genai", "5.3 GiB"), ("stepwise", "5.4 GiB")])
def test_measured_memory_is_that_of_the_results(engine: str, shown: str) -> None:
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    section = page.split("## Full-size Stable Diffusion 1.5", 1)[1]
    line = next(line for line in section.splitlines() if line.startswith(f"| ovserve {engine} | 1 | 256 | 4 |"))
    mebibytes = float(line.rsplit("|", 2)[1].split()[0])
    assert f"{mebibytes / 1024:.1f} GiB" == shown
    assert shown in PAGE
