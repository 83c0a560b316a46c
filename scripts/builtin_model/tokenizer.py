"""The tokenizer: CLIP's byte-level BPE with a small vocabulary, so that the text encoder's table stays small.

The vocabulary contains every byte, every byte at the end of a word, the results of the merges that build each known
word, and two special tokens. Every text can be encoded: a known word is one token, and an unknown word is encoded in
smaller parts.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

__all__ = [
    "END",
    "START",
    "PromptEncoder",
    "build_vocabulary",
    "convert_tokenizer_files",
    "write_tokenizer_files",
]

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
Merge = tuple[str, str]


def byte_alphabet() -> list[str]:
    """Return the 256 characters for bytes in CLIP's (and GPT-2's) vocabulary files; printable ones are themselves."""
    printable = {*map(ord, string.printable), *range(161, 256)} - {*range(33), 127, 173}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def build_vocabulary(words: Sequence[str]) -> tuple[list[str], list[Merge]]:
    """Return the tokens in the order of their ids, and the merges in the order of their ranks.

    Args:
        words: every word with its own token.
    """
    alphabet = byte_alphabet()
    tokens = alphabet + [character + WORD_END for character in alphabet]
    known, ranks = set(tokens), dict[Merge, int]()
    # Short words first, so that longer words build on their prefixes.
    for word in sorted(words, key=lambda word: (len(word), word)):
        parts = _apply([*word[:-1], word[-1] + WORD_END], ranks)
        while len(parts) > 1:
            merge = (parts[0], parts[1])
            ranks.setdefault(merge, len(ranks))
            parts[:2] = ["".join(merge)]
            if parts[0] not in known:
                known.add(parts[0])
                tokens.append(parts[0])
    return [*tokens, START, END], list(ranks)


def _apply(parts: list[str], ranks: dict[Merge, int]) -> list[str]:
    """Apply byte-pair encoding: merge the pair with the best rank until no pair has a rank."""
    while len(parts) > 1:
        rank, index = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(parts)))
        if rank == len(ranks):
            break
        parts = [*parts[:index], parts[index] + parts[index + 1], *parts[index + 2 :]]
    return parts


def write_tokenizer_files(folder: Path, words: Sequence[str], window: int) -> None:
    """Write the files from which a `CLIPTokenizer` is loaded; a prompt has at most `window` tokens."""
    tokens, merges = build_vocabulary(words)
    specials = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": window,
        **specials,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", specials)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False), "utf-8")


class PromptEncoder:
    """Encodes prompts to token ids of fixed length, with a cache of words, since there are few different ones."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = CLIPTokenizer.from_pretrained(folder)
        self._words: dict[str, list[int]] = {}
        self.window: int = self._tokenizer.model_max_length
        self.start, self.end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id

    def encode(self, prompt: str) -> list[int]:
        """Return `window` ids: start, tokens (truncated to fit), end, and padding with the end token."""
        ids = [self.start]
        for word in prompt.replace(",", " , ").split():
            if word not in self._words:
                self._words[word] = self._tokenizer(word)["input_ids"][1:-1]
            ids += self._words[word]
        ids = [*ids[: self.window - 1], self.end]
        return ids + [self.end] * (self.window - len(ids))


def convert_tokenizer_files(folder: Path, out: Path) -> None:
    """Convert the tokenizer in `folder` to the OpenVINO model that openvino_genai loads."""
    import openvino  # noqa: PLC0415  not needed for training
    from openvino_tokenizers import convert_tokenizer  # type: ignore[import-untyped]  # noqa: PLC0415

    model = convert_tokenizer(CLIPTokenizer.from_pretrained(folder), with_detokenizer=False)
    out.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, out / "openvino_tokenizer.xml")
