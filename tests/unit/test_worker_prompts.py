"""Prompts against the windows of the text encoders."""

from __future__ import annotations

import dataclasses

import pytest

from ovserve.engines.protocol import truncate_to_window
from ovserve.errors import PromptTooLong
from ovserve.worker.prompts import fit_prompt
from tests.preparing import PROFILE, WIDE, WordCounter, prepared, rejected, request


def test_prompt_over_the_window_is_rejected_with_both_numbers() -> None:
    rejected(PromptTooLong, "prompt", "42 tokens", "reads at most 32", task="generation", prompt="word " * 40)
    rejected(PromptTooLong, "negative_prompt", "42 tokens", task="generation", negative_prompt="word " * 40)


@pytest.mark.parametrize("name", ["prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3"])
def test_prompts_of_further_encoders_are_counted_if_the_model_has_them(name: str) -> None:
    three = dataclasses.replace(WIDE, text_encoders=3)
    rejected(PromptTooLong, name, f"{name}: 42 tokens", profile=three, task="generation", **{name: "word " * 40})
    assert prepared(three, task="generation", **{name: "word"})
    assert prepared(WIDE, task="generation", **{name: "word " * 40})


@pytest.mark.parametrize(
    ("family", "encoders", "name", "others"),
    [
        ("sd3", 3, "prompt", {"prompt_3": "word"}),
        ("sd3", 3, "negative_prompt", {"negative_prompt_3": "word"}),
        ("sd3", 3, "prompt_2", {}),
        ("sd3", 3, "negative_prompt_2", {}),
        ("flux", 2, "prompt", {"prompt_2": "word"}),
    ],
)
def test_texts_read_only_by_clip_get_clips_window_and_others_t5s(
    family: str, encoders: int, name: str, others: dict[str, str]
) -> None:
    profile = dataclasses.replace(WIDE, family=family, text_encoders=encoders, prompt_tokens=256)
    long = {"task": "generation", **others, name: "word " * 40}
    rejected(PromptTooLong, name, f"{name}: 82 tokens", "reads at most 77", profile=profile, **long)
    assert prepared(profile, **(long | {name: "word " * 37}))
    by_t5 = "prompt_3" if family == "sd3" else "prompt_2"
    assert prepared(profile, task="generation", prompt="word " * 200).text_tokens == 202
    assert prepared(profile, task="generation", **{by_t5: "word " * 200})
    rejected(PromptTooLong, by_t5, f"{by_t5}: 302 tokens", profile=profile, task="generation", **{by_t5: "word " * 300})


def test_prompt_read_only_by_clip_is_cut_to_its_window() -> None:
    profile = dataclasses.replace(WIDE, family="flux", text_encoders=2, prompt_tokens=512)
    found = prepared(profile, task="generation", prompt="word " * 40, prompt_2="word", truncate_prompt=True)
    assert found.revised_prompt == " ".join(["word"] * 37)
    assert found.text_tokens == 76


def test_text_longer_than_clips_window_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    profile = dataclasses.replace(WIDE, family="sd3", text_encoders=3, prompt_tokens=256)
    with caplog.at_level("INFO"):
        prepared(profile, task="generation", prompt="word " * 37)
        assert not caplog.records
        prepared(profile, task="generation", prompt="word " * 38)
    assert [record.message for record in caplog.records] == [
        "the text is longer than CLIP's window: CLIP reads its beginning, T5 reads all of it"
    ]


def test_truncate_prompt_cuts_and_reports_the_prompt() -> None:
    found = prepared(task="generation", prompt="word " * 40, truncate_prompt=True)
    assert found.prompt == found.revised_prompt == " ".join(["word"] * 30)
    assert found.text_tokens == 32
    assert prepared(task="generation", truncate_prompt=True).revised_prompt == ""


def test_negative_prompt_without_effect_is_dropped() -> None:
    assert prepared(task="generation", negative_prompt="dog").work("j", 0).negative_prompt == "dog"
    assert prepared(task="generation", negative_prompt="dog", guidance_scale=1.0).work("j", 0).negative_prompt == ""
    flux = dataclasses.replace(WIDE, takes_negative_prompt=False)
    assert prepared(flux, task="generation", negative_prompt="dog").work("j", 0).negative_prompt == ""


class Speller(WordCounter):
    """An engine that knows some words and spells out all others."""

    known = frozenset(["a", "red", "star", "on", "blue", "background", ",", "4k", "please"])

    def count_tokens(self, prompt: str, *, clip: bool = False) -> int:
        words = prompt.replace(",", " , ").lower().split()
        return 2 + sum(1 if word in self.known else len(word) for word in words)

    def cut_prompt(self, prompt: str, *, clip: bool = False) -> str:
        return truncate_to_window(prompt, self.count_tokens, PROFILE.prompt_tokens)


@pytest.mark.parametrize(
    ("prompt", "used"),
    [
        ("a Red star on a blue background", "a Red star on a blue background"),
        ("A vibrant red star, hyper-detailed x, on a blue background, 4k", "A red star, on a blue background, 4k"),
        ("a minimalist, centered red star " + "on a blue background, " * 9, None),
        ("extraordinary", "extraordinary"),
        ("猫 \U0001f600", "猫 \U0001f600"),
    ],
)
def test_model_that_drops_unknown_words_keeps_those_it_knows(prompt: str, used: str | None) -> None:
    engine, profile = Speller(PROFILE), dataclasses.replace(PROFILE, drops_unknown_words=True)
    text, count = fit_prompt(request(task="generation", prompt=prompt, truncate_prompt=True), profile, engine)  # type: ignore[arg-type]
    assert count <= PROFILE.prompt_tokens
    assert used in (None, text)
    assert text.startswith(prompt.split(maxsplit=1)[0])
    as_sent = request(task="generation", prompt="a vibrant star")
    assert fit_prompt(as_sent, profile, engine)[0] == "a vibrant star"  # type: ignore[arg-type]
