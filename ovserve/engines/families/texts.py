"""How a family uses one of its text encoders: what the tokenizer gets, and which outputs are the embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["TextEncoder"]


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """One text encoder and its tokenizer.

    Attributes:
        component: directory of the encoder.
        tokenizer: directory of its tokenizer.
        window: tokens that the encoder reads, special tokens included; those before `skipped` come on top.
        outputs: which outputs are the embedding, by number or by name.
        is_masked: it takes an attention mask; the mask, int64 (tokens,), is then the last array of an embedding.
        is_padded: it gets as many tokens as its window has; else those of the text alone.
        prefix, suffix: texts around the prompt.
        chat: the prompt is a user's turn in the tokenizer's chat template, with these variables; None: no template.
        skipped: tokens of the prefix that are no part of the window.
    """

    component: str
    tokenizer: str
    window: int
    outputs: tuple[int | str, ...]
    is_masked: bool = False
    is_padded: bool = True
    prefix: str = ""
    suffix: str = ""
    chat: Mapping[str, object] | None = field(default=None, hash=False)
    skipped: int = 0
