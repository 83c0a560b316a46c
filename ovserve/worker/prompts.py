"""Checks a request's prompts against the windows of the model's text encoders."""

from __future__ import annotations

import logging
import re

from ovserve.engines.protocol import CLIP_WINDOW, Engine, clip_only_fields, has_t5
from ovserve.errors import PromptTooLong
from ovserve.logs import fields
from ovserve.models.profile import ModelProfile
from ovserve.wire.request import ImageRequest

__all__ = ["fit_prompt"]

MAX_PIECES = 2000  # words of a prompt that are examined; a window has fewer than 100 tokens
_PIECE = re.compile(r"[^\W_]+|,")
_SINGLE = frozenset("aAiI,")  # every letter has a token, but only these are words

log = logging.getLogger(__name__)


def fit_prompt(request: ImageRequest, profile: ModelProfile, engine: Engine) -> tuple[str, int]:
    """Return the prompt to use, cut if the request asks for that, and its number of tokens.

    Raises:
        PromptTooLong: a text is longer than the window of every encoder that reads it.
    """
    by_clip = clip_only_fields(profile, request)
    names = ["prompt", "negative_prompt"]
    for encoder in range(2, profile.text_encoders + 1):
        names += [f"prompt_{encoder}", f"negative_prompt_{encoder}"]
    texts = {name: text for name in names if (text := str(getattr(request, name, ""))) or name == "prompt"}
    if request.truncate_prompt and profile.drops_unknown_words:
        texts["prompt"] = _without_unknown_words(request.prompt, engine)
    counts = {name: engine.count_tokens(text, clip=name in by_clip) for name, text in texts.items()}
    windows = {name: CLIP_WINDOW if name in by_clip else profile.prompt_tokens for name in texts}
    if counts["prompt"] > windows["prompt"] and request.truncate_prompt:
        texts["prompt"] = engine.cut_prompt(texts["prompt"], clip="prompt" in by_clip)
        counts["prompt"] = engine.count_tokens(texts["prompt"], clip="prompt" in by_clip)
    for name, count in counts.items():
        if count > windows[name]:
            advice = " or set truncate_prompt=true" if name == "prompt" else ""
            counted = "those of its chat template" if profile.traits.is_templated else "start and end tokens"
            raise PromptTooLong(
                f"{name}: {count} tokens; this model reads at most {windows[name]}, {counted} included. "
                f"Shorten it{advice}",
                param=name,
            )
    if has_t5(profile):
        _log_clip_overflow({name: texts[name] for name in texts.keys() - by_clip}, profile, engine)
    return texts["prompt"], counts["prompt"]


def _without_unknown_words(prompt: str, engine: Engine) -> str:
    """Return a prompt without the words that have no token of their own; as it is if nothing else is left.

    Spelt out, such a word takes most of a small window, and its letters disturb what the model knows.
    """
    special = engine.count_tokens("")
    pieces = _PIECE.findall(prompt)[:MAX_PIECES]
    known = {piece: engine.count_tokens(piece) == special + 1 for piece in set(pieces)}
    kept = [piece for piece in pieces if known[piece] and (len(piece) > 1 or piece in _SINGLE)]
    if len(kept) == len(pieces) or not any(piece.isalnum() for piece in kept):
        return prompt
    return re.sub(r"( ,)+", ",", " ".join(kept)).strip(" ,")


def _log_clip_overflow(texts: dict[str, str], profile: ModelProfile, engine: Engine) -> None:
    """Log the texts of which CLIP reads only the beginning, while T5 reads all of them."""
    for name in texts.keys() - {"prompt_3", "negative_prompt_3"}:  # read by T5 alone
        count = engine.count_tokens(texts[name], clip=True)
        if count > CLIP_WINDOW:
            log.info(
                "the text is longer than CLIP's window: CLIP reads its beginning, T5 reads all of it",
                extra=fields(model=profile.name, field=name, clip_tokens=count, clip_window=CLIP_WINDOW),
            )
