"""Checks a request's prompts against the windows of the model's text encoders."""

from __future__ import annotations

import logging

from ovserve.engines.protocol import CLIP_WINDOW, Engine, clip_only_fields, has_t5
from ovserve.errors import PromptTooLong
from ovserve.logs import fields
from ovserve.models.profile import ModelProfile
from ovserve.wire.request import ImageRequest

__all__ = ["fit_prompt"]

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
    counts = {name: engine.count_tokens(text, clip=name in by_clip) for name, text in texts.items()}
    windows = {name: CLIP_WINDOW if name in by_clip else profile.prompt_tokens for name in texts}
    if counts["prompt"] > windows["prompt"] and request.truncate_prompt:
        texts["prompt"] = engine.cut_prompt(request.prompt, clip="prompt" in by_clip)
        counts["prompt"] = engine.count_tokens(texts["prompt"], clip="prompt" in by_clip)
    for name, count in counts.items():
        if count > windows[name]:
            advice = " or set truncate_prompt=true" if name == "prompt" else ""
            raise PromptTooLong(
                f"{name}: {count} tokens; this model reads at most {windows[name]}, start and end tokens included. "
                f"Shorten it{advice}",
                param=name,
            )
    if has_t5(profile):
        _log_clip_overflow({name: texts[name] for name in texts.keys() - by_clip}, profile, engine)
    return texts["prompt"], counts["prompt"]


def _log_clip_overflow(texts: dict[str, str], profile: ModelProfile, engine: Engine) -> None:
    """Log the texts of which CLIP reads only the beginning, while T5 reads all of them."""
    for name in texts.keys() - {"prompt_3", "negative_prompt_3"}:  # read by T5 alone
        count = engine.count_tokens(texts[name], clip=True)
        if count > CLIP_WINDOW:
            log.info(
                "the text is longer than CLIP's window: CLIP reads its beginning, T5 reads all of it",
                extra=fields(model=profile.name, field=name, clip_tokens=count, clip_window=CLIP_WINDOW),
            )
