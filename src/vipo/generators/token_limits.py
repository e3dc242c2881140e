"""Prompts longer than what a text encoder reads of one: diffusers cuts them, here they are counted and named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

AT_ONCE = 4096  # prompts between two calls of a tokenizer
SHOWN = 60  # characters of the prompt that is named


@dataclass(frozen=True)
class TokenLimit:
    """How many tokens of a prompt one text encoder reads.

    Args:
        reader: the encoder, as people call it.
        tokenizer: its own.
        most: tokens that are not cut off, those that mark the end and those of the template among them.
        written: a prompt to the text that is tokenised.
        uncounted: tokens at the front of every text that are neither counted nor kept.
    """

    reader: str
    tokenizer: Any
    most: int
    written: Callable[[str], str] = str
    uncounted: int = 0

    def tokens(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens each prompt has, uncut."""
        counts: list[int] = []
        for start in range(0, len(prompts), AT_ONCE):
            texts = [self.written(prompt) for prompt in prompts[start : start + AT_ONCE]]
            rows = self.tokenizer(texts, padding=False, truncation=False, return_attention_mask=False, verbose=False)
            counts += [len(row) - self.uncounted for row in rows["input_ids"]]
        return counts


def chat(tokenizer: Any, *, thinking: bool) -> Callable[[str], str]:
    """A prompt as the only message of a chat in the tokenizer's template, up to where the answer would begin."""

    def written(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        return text

    return written


def cut_prompts(limits: Sequence[TokenLimit], texts: Mapping[str, Sequence[str]]) -> list[str]:
    """A sentence for each kind of text and each limit that cuts some of it; ``texts`` are by what they are called."""
    told = []
    for kind, given in texts.items():
        distinct = list(dict.fromkeys(given))
        for limit in limits:
            long = [(text, n) for text, n in zip(distinct, limit.tokens(distinct), strict=True) if n > limit.most]
            if long:
                told.append(_sentence(kind, len(distinct), limit, long))
    return told


def _sentence(kind: str, count: int, limit: TokenLimit, long: Sequence[tuple[str, int]]) -> str:
    text, tokens = long[0]
    shown = repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
    return (
        f"{len(long)} of {count} {kind} longer than the {limit.most} tokens that {limit.reader} reads, the rest is cut;"
        f" the first is {shown} with {tokens} tokens"
    )
