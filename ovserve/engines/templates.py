"""Puts prompts into the chat templates that language models as text encoders expect, as the library does."""

from __future__ import annotations

from typing import Any

from ovserve.models.families import FamilyTraits

__all__ = ["count_templated", "templated"]


def templated(tokenizer: Any, traits: FamilyTraits, prompt: str) -> str:
    """Return the text that the text encoder reads; the prompt itself for families without a template.

    Args:
        tokenizer: an `openvino_genai.Tokenizer`.
        traits: the family: it has its own template, or uses that of the tokenizer.
        prompt: the prompt.
    """
    if traits.prompt_template:
        return traits.prompt_template.replace("{}", prompt, 1)
    if not traits.has_chat_template:
        return prompt
    message = {"role": "user", "content": prompt}
    text: str = tokenizer.apply_chat_template(
        [message], add_generation_prompt=True, extra_context={"enable_thinking": False}
    )
    return text


def count_templated(tokenizer: Any, traits: FamilyTraits, prompt: str) -> int:
    """Return the tokens of the window that a prompt takes, those of the template and special tokens included."""
    found = int(tokenizer.encode(templated(tokenizer, traits, prompt)).input_ids.shape[1])
    return found - traits.dropped_tokens
