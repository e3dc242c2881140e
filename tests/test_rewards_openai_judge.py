"""A model behind chat completions as the judge: what it is asked, what is read from its reply, what is no score."""

from __future__ import annotations

import base64
import io
import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scripted import Reply, scripted
from vipo.errors import UserError
from vipo.rewards.answer import RewardUnavailable
from vipo.rewards.openai_judge import OpenAiJudge
from vipo.rewards.scoring import score
from vipo.types import Prompt

MEDIA = torch.randint(256, (4, 3, 1, 6, 9), generator=torch.Generator().manual_seed(0)).float() / 255
PROMPTS = [Prompt(f"prompt {number}", number) for number in range(4)]


def _says(text: Any) -> Reply:
    return Reply({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})


def _asked(body: Any) -> str:
    return str(body["messages"][0]["content"][-1]["text"])


def _judge(url: str, **options: Any) -> OpenAiJudge:
    return OpenAiJudge(base_url=f"{url}/v1", model="judge", **{"first_pause_seconds": 0.001, **options})


def _picture(part: dict[str, Any]) -> np.ndarray:
    head, _, data = part["image_url"]["url"].partition(",")
    assert (part["type"], head) == ("image_url", "data:image/png;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)), formats=["PNG"]))


def test_the_question_the_picture_and_the_settings_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    prompt = Prompt('a {prompt} with "{0}"')
    with scripted(lambda *_: _says("Final Score: 4")) as server:
        judge = _judge(
            server.url, question='{prompt}? As {"score": N}!', token_env="JUDGE_KEY", body={"max_tokens": 16}
        )
        assert judge(MEDIA[:1], [prompt]).tolist() == [4.0]
    body = server.bodies[0]
    assert (server.paths, body["model"], body["temperature"], body["max_tokens"]) == (
        ["/v1/chat/completions"],
        "judge",
        0,
        16,
    )
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert _asked(body) == 'a {prompt} with "{0}"? As {"score": N}!'
    (message,) = body["messages"]
    expected = (MEDIA[0, :, 0].permute(1, 2, 0) * 255).round().byte().numpy()
    assert np.array_equal(_picture(message["content"][0]), expected)


def test_a_video_is_shown_in_evenly_spaced_frames() -> None:
    levels = torch.arange(9) / 255
    video = levels.view(1, 1, 9, 1, 1).expand(1, 3, 9, 4, 4)
    with scripted(lambda *_: _says("Final Score: 4")) as server:
        _judge(server.url, frames=3)(video, PROMPTS[:1])
    *pictures, question = server.bodies[0]["messages"][0]["content"]
    assert [_picture(part)[0, 0, 0] for part in pictures] == [0, 4, 8]
    assert question["type"] == "text"


@pytest.mark.parametrize(
    "reply, expected",
    [
        ("Final Score: 4", 4.0),
        ("final score: 3.5", 3.5),
        ("**Final Score:** 2", 2.0),
        ("Final Score: **2**", 2.0),
        ("I would say Final Score: 2. No, better.\nFinal Score: 5", 5.0),
    ],
)
def test_the_last_score_of_a_reply_counts(reply: str, expected: float) -> None:
    with scripted(lambda *_: _says(reply)) as server:
        assert _judge(server.url)(MEDIA[:1], PROMPTS[:1]).tolist() == [expected]


@pytest.mark.parametrize(
    "reply, cause",
    [
        (_says("I cannot rate this."), "the reply has no score: 'I cannot rate this.'"),
        (_says("Final Score: five"), "the reply has no score"),
        (_says("Final Score: 7"), "7 is outside 1 to 5"),
        (_says("Final Score: 0.5"), "0.5 is outside 1 to 5"),
        (_says(None), "the answer is no chat completion with text"),
        (_says([{"type": "text"}]), "the answer is no chat completion with text"),
        (Reply({"choices": []}), "the answer is no chat completion with text"),
        (Reply([1]), "the answer is no chat completion with text"),
        (Reply({"error": {"message": "content policy"}}, 400), "status 400: content policy"),
    ],
)
def test_a_reply_without_a_score_is_no_score_and_says_why(reply: Reply, cause: str) -> None:
    def answer(body: Any, _number: int) -> Reply:
        return reply if "prompt 1" in _asked(body) else _says("Final Score: 3")

    with scripted(answer) as server:
        scores = score({"judge": _judge(server.url)}, {"judge": 1.0}, MEDIA, PROMPTS)
    assert scores.by_name["judge"].isnan().tolist() == [False, True, False, False]
    assert "1 of 4 samples (indices 1), because " in scores.failures["judge"]
    assert cause in scores.failures["judge"]
    assert len(server.bodies) == 4


def test_other_patterns_and_what_they_may_catch() -> None:
    with scripted(lambda *_: _says('{"rating": "8/10"}')) as server:
        options = {"pattern": r'"rating": "(\d+)/10"', "low": 0.0, "high": 10.0}
        assert _judge(server.url, **options)(MEDIA[:1], PROMPTS[:1]).tolist() == [8.0]
        odd = _judge(server.url, pattern=r'"(\w+)": ').explain(MEDIA[:1], PROMPTS[:1])
    assert odd.scores.isnan().all() and odd.causes == {0: "'rating' is no number"}
    with scripted(lambda *_: _says("score nan")) as server:
        assert _judge(server.url, pattern=r"score (\w+)").explain(MEDIA[:1], PROMPTS[:1]).scores.isnan().all()


def test_questions_run_side_by_side_and_scores_keep_their_order() -> None:
    together = threading.Barrier(4, timeout=10)

    def answer(body: Any, _number: int) -> Reply:
        number = together.wait() and 0
        number += int(_asked(body).split("prompt ")[1][0])
        return Reply(_says(f"Final Score: {number + 1}").body, after_seconds=0.05 * (3 - number))

    with scripted(answer) as server:
        assert _judge(server.url, parallel=4)(MEDIA, PROMPTS).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_busy_server_is_asked_again_and_a_dead_one_is_out_of_reach() -> None:
    def answer(_body: Any, number: int) -> Reply:
        return Reply({"error": "busy"}, 429) if number == 0 else _says("Final Score: 3")

    with scripted(answer) as server:
        assert _judge(server.url)(MEDIA[:1], PROMPTS[:1]).tolist() == [3.0]
    with pytest.raises(RewardUnavailable, match="ConnectionRefusedError"):
        _judge(server.url, retries=0)(MEDIA, PROMPTS)
    assert _judge(server.url, retries=0).explain(MEDIA, PROMPTS).unreached == (0, 1, 2, 3)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_stops_at_once(status: int) -> None:
    stops = pytest.raises(UserError, match=f"refused with status {status}: no such thing")
    with scripted(lambda *_: Reply({"error": {"message": "no such thing"}}, status)) as server, stops:
        _judge(server.url, parallel=1)(MEDIA, PROMPTS)
    assert len(server.bodies) < 4


def test_a_picture_that_is_not_finite_is_not_shown() -> None:
    media = MEDIA[:1].clone()
    media[0, 0, 0, 0, 0] = torch.nan
    with scripted(lambda *_: _says("Final Score: 3")) as server:
        answer = _judge(server.url).explain(media, PROMPTS[:1])
    assert not server.bodies and answer.causes == {0: "the picture is not finite"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"question": "How good?"}, r"question must say \{prompt\}"),
        ({"pattern": r"score"}, "must have one group"),
        ({"pattern": r"(a)(b)"}, "must have one group"),
        ({"pattern": r"("}, "is not a regular expression"),
        ({"low": 5.0, "high": 1.0}, "low=5.0 below high=1.0"),
        ({"frames": 0}, "must be positive"),
        ({"parallel": 0}, "must be positive"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _judge("http://127.0.0.1:1", **options)
