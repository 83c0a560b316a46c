"""How prompts are truncated to a window."""

from __future__ import annotations

import pytest

from ovserve.engines.protocol import truncate_to_window


@pytest.mark.parametrize(("window", "cut"), [(0, ""), (1, "a"), (2, "a  b"), (3, "a  b\tc"), (9, "a  b\tc")])
def test_prompt_is_cut_after_the_last_word_that_fits(window: int, cut: str) -> None:
    assert truncate_to_window("a  b\tc ", lambda text: len(text.split()), window) == cut


@pytest.mark.parametrize(
    ("prompt", "window", "cut"),
    [
        ("一个红色的圆圈", 4, "一个红色"),  # a language without spaces
        ("a,b,c,d", 4, "a,b,"),
        ("ab cdefghij", 10, "ab cdefghi"),  # the first word alone leaves most of the window unused
        ("abcdefg hijk", 10, "abcdefg"),
        ("e\u0301e\u0301e\u0301", 3, "e\u0301"),  # never between a letter and its accent
        ("\U0001f468\u200d\U0001f469x", 2, ""),  # nor inside a joined character
    ],
)
def test_prompt_without_spaces_is_cut_inside_a_word(prompt: str, window: int, cut: str) -> None:
    assert truncate_to_window(prompt, len, window) == cut
