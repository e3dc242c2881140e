"""A vision-language model as the judge, behind any server that speaks OpenAI's chat completions (vLLM, SGLang, ...).

Each sample is one question with its picture, at temperature 0; the score is the number that ``pattern`` finds in the
reply. A reply without such a number, or with one outside the range, is no score: NaN with what was said.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vipo.rewards import wire
from vipo.rewards.answer import Answer, RewardUnavailable
from vipo.rewards.http import JsonClient, RefusedError
from vipo.secrets import redacted
from vipo.types import Prompt

PLACEHOLDER = "{prompt}"
QUESTION = (
    "The picture was made for this caption: {prompt}\n"
    "Rate from 1 to 5 how well it shows what the caption says and how good it looks."
    " End with one line: Final Score: NUMBER"
)
PATTERN = r"Final Score:\s*\**\s*(\d+(?:\.\d+)?)"
UNFIT = (400, 422)  # this one request is refused, for its prompt or its picture; others may pass
QUOTED_CHARACTERS = 80


class OpenAiJudge:
    """The number a model gives, as it stands; divide by means of the reward's weight.

    Args:
        base_url: up to and including ``/v1``.
        model: its name on the server.
        question: what is asked; ``{prompt}`` stands for the caption.
        pattern: regular expression, case ignored, whose first group is the number; the last match in a reply counts.
        low, high: a number outside is no score.
        frames: of a video at most so many are shown, evenly spaced.
        parallel: questions under way at once.
        body: further fields of the request, such as ``max_tokens``.
        connection: time-outs, retries, token and cool-down, see :class:`vipo.rewards.http.JsonClient`.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        question: str = QUESTION,
        pattern: str = PATTERN,
        low: float = 1.0,
        high: float = 5.0,
        frames: int = 8,
        parallel: int = 4,
        body: Mapping[str, Any] | None = None,
        **connection: Any,
    ) -> None:
        if PLACEHOLDER not in question:
            raise ValueError(f"question must say {PLACEHOLDER} where the caption goes")
        if min(frames, parallel) < 1 or not low < high:
            raise ValueError(f"frames={frames} and parallel={parallel} must be positive, low={low} below high={high}")
        self.model, self.question, self.pattern = model, question, _compiled(pattern)
        self.low, self.high, self.frames, self.parallel = low, high, frames, parallel
        self.body = dict(body or {})
        self.client = JsonClient(base_url, **connection)

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        return self.explain(media, prompts).complete().to(media.device)

    def explain(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Answer:
        """Scores, and for each sample without one the reason.

        Raises:
            UserError: the server refused the token, the model or the address.
        """
        with ThreadPoolExecutor(self.parallel) as pool:
            return Answer.cat(list(pool.map(self._judge, media.detach().float().cpu(), prompts)))

    def _judge(self, sample: Float[Tensor, "3 F Y X"], prompt: Prompt) -> Answer:
        if not sample.isfinite().all():
            return _unscored("the picture is not finite")
        try:
            said = self.client.post("/chat/completions", self._request(sample, prompt))
        except RewardUnavailable as error:
            return Answer.unreachable(1, str(error))
        except RefusedError as error:
            if error.status not in UNFIT:
                raise
            return _unscored(str(error))
        return self._read(_content(said))

    def _request(self, sample: Tensor, prompt: Prompt) -> bytes:
        shown = torch.linspace(0, sample.shape[1] - 1, min(self.frames, sample.shape[1])).round().long()
        pictures = [base64.b64encode(wire.png(sample[:, frame])).decode() for frame in shown]
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}} for data in pictures
        ]
        content.append({"type": "text", "text": self.question.replace(PLACEHOLDER, prompt.text)})
        message = {"role": "user", "content": content}
        return json.dumps({"model": self.model, "temperature": 0, "messages": [message], **self.body}).encode()

    def _read(self, reply: str | None) -> Answer:
        if reply is None:
            return _unscored("the answer is no chat completion with text")
        found = self.pattern.findall(reply)
        if not found:
            return _unscored(f"the reply has no score: {' '.join(redacted(reply).split())[-QUOTED_CHARACTERS:]!r}")
        try:
            value = float(found[-1])
        except ValueError:
            return _unscored(f"{redacted(found[-1])[:QUOTED_CHARACTERS]!r} is no number")
        if not self.low <= value <= self.high:
            return _unscored(f"{value:g} is outside {self.low:g} to {self.high:g}")
        return Answer(torch.tensor([value]))


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    if compiled.groups != 1:
        raise ValueError(f"pattern {pattern!r} must have one group, around the number; it has {compiled.groups}")
    return compiled


def _content(said: Any) -> str | None:
    """The text of the first choice; None if there is none."""
    try:
        text = said["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return text if isinstance(text, str) else None


def _unscored(cause: str) -> Answer:
    return Answer(torch.tensor([math.nan]), {0: cause})
