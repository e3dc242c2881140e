"""A reward in another process: the same scores, and every fault of the wire survived or told in a sentence."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scripted import Reply, scripted, served
from vipo import rewards
from vipo.errors import UserError
from vipo.rewards import wire
from vipo.rewards.answer import Answer, RewardUnavailable
from vipo.rewards.http import CircuitBreaker, JsonClient
from vipo.rewards.remote import Remote
from vipo.rewards.scoring import score
from vipo.types import Prompt

PROMPTS = [Prompt(f"prompt {number}", number) for number in range(5)]
QUICK = {"first_pause_seconds": 0.001}


def _pictures(frames: int = 1, count: int = 5) -> Tensor:
    levels = torch.randint(256, (count, 3, frames, 6, 9), generator=torch.Generator().manual_seed(0))
    return levels.float() / 255


def _honest(body: Any, _number: int) -> Reply:
    """What a right server says: the length of the prompt."""
    return Reply({"scores": [{"id": i["id"], "score": len(i["prompt"]), "error": None} for i in body["items"]]})


# --- the same scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("encoding", ["8bit", "exact"])
def test_remote_scores_are_the_local_ones_bit_for_bit(frames: int, encoding: str) -> None:
    reward, media = rewards.build("redness"), _pictures(frames)  # 8 bit media: nothing to lose
    with served(reward) as server:
        remote = Remote(url=server.url, batch_size=2, encoding=encoding)
        assert torch.equal(remote(media, PROMPTS), reward(media, PROMPTS))


def test_a_served_reward_and_the_same_reward_in_process_agree_bit_for_bit() -> None:
    """Pixels between the 256 levels of a picture file, and a network that looks at them: nothing may be rounded."""
    reward, prompts = (
        rewards.build("emoji_match"),
        [Prompt("a cat on a teal background"), Prompt("a fox left of a moon on a navy background")],
    )
    media = torch.rand(2, 3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with served(reward) as server:
        far, rounded = (Remote(url=server.url, **options)(media, prompts) for options in ({}, {"encoding": "8bit"}))
    here = reward(media, prompts)
    assert torch.equal(far, here) and (rounded != here).all()


def test_requests_hold_fewer_long_clips() -> None:
    short, long = torch.empty(20, 3, 1, 512, 512), torch.empty(20, 3, 53, 240, 416)
    assert wire.fitting(short, 8, 200) == 8 and wire.fitting(long, 8, 200) == 2 and wire.fitting(long, 8, 1) == 1
    body = wire.encode_request(_pictures(count=1), PROMPTS[:1], encoding="exact")
    numbers = _pictures(count=1).numel()
    assert numbers * wire.FLOAT_BYTES < len(body) < numbers * wire.FLOAT_BYTES + 500
    with scripted(_honest) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("vipo.rewards.remote.REQUEST_MEGABYTES", 2 * numbers * wire.FLOAT_BYTES / 1e6 + 1e-5)
        Remote(url=server.url)(_pictures(), PROMPTS)
    assert [len(request["items"]) for request in server.bodies] == [2, 2, 1]


def test_exact_keeps_float32_and_8bit_rounds_to_the_nearest_level() -> None:
    media = torch.rand(1, 3, 1, 6, 9, generator=torch.Generator().manual_seed(1))
    exact, rounded = (
        wire.decode_request(wire.encode_request(media, PROMPTS[:1], encoding=encoding)).media
        for encoding in ("exact", "8bit")
    )
    assert torch.equal(exact, media)
    assert 0 < (rounded - media).abs().max() <= 0.5 / 255 + 1e-7


@pytest.mark.parametrize("encoding", wire.ENCODINGS)
def test_pixels_that_are_not_finite_stay_so(encoding: str) -> None:
    media = _pictures(count=2)
    media[1, 0, 0, 2, 3] = torch.nan
    with served(rewards.build("redness")) as server:
        answer = Remote(url=server.url, encoding=encoding).explain(media, PROMPTS[:2])
    assert answer.scores.isfinite().tolist() == [True, False]
    assert answer.causes == {1: "the reward gave no finite score"}


def test_prompts_arrive_as_they_were_sent() -> None:
    seen: list[Prompt] = []

    def keep(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        seen.extend(prompts)
        return torch.zeros(len(media))

    sent = [
        Prompt('a "sign" that says {prompt}\n', 7, {"objects": [{"class": "cat", "count": 2}], "none": None}),
        Prompt("łódź 🐈"),
    ]
    with served(keep) as server:
        Remote(url=server.url)(_pictures(count=2), sent)
    assert seen == sent


def test_an_item_without_a_score_is_nan_with_the_servers_reason() -> None:
    class Picky:
        def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            return self.explain(media, prompts).complete()

        def explain(self, *_: object) -> Answer:
            return Answer(torch.tensor([1.0, torch.nan]), {1: "no objects in metadata"})

    with served(Picky()) as server:
        remote = Remote(url=server.url, batch_size=2)
        scores = score({"far": remote}, {"far": 1.0}, _pictures(count=2), PROMPTS[:2])
    assert "1 of 2 samples (indices 1), because no objects in metadata (once)" in scores.failures["far"]


def test_metadata_that_json_cannot_say_is_refused_here() -> None:
    for value in (object(), float("nan")):
        with pytest.raises(UserError, match="metadata cannot be sent"):
            wire.encode_request(_pictures(count=1), [Prompt("", 0, {"thing": value})], encoding="8bit")


# --- what fails on a wire --------------------------------------------------------------------------------------------


def test_a_5xx_is_asked_again_and_then_forgotten() -> None:
    def answer(body: Any, number: int) -> Reply:
        return Reply({"error": "warming up"}, 503) if number < 2 else _honest(body, number)

    with scripted(answer) as server:
        scores = Remote(url=server.url, retries=2, **QUICK)(_pictures(), PROMPTS)
    assert scores.tolist() == [8.0] * 5
    assert len(server.bodies) == 3 and server.bodies[0] == server.bodies[2]


def test_pauses_double_spread_by_content_and_repeat_in_every_run() -> None:
    client = JsonClient("http://127.0.0.1:1", first_pause_seconds=1.0)
    pauses = [client.pause(attempt, b"body") for attempt in range(5)]
    assert all(0.5 * 2**k <= pause < 1.5 * 2**k for k, pause in enumerate(pauses))
    assert pauses == [client.pause(attempt, b"body") for attempt in range(5)]
    others = {client.pause(0, f"rank {rank}".encode()) for rank in range(64)}
    assert max(others) - min(others) > 0.7


@pytest.mark.parametrize("status, tries", [(400, 1), (401, 1), (404, 1), (301, 1), (429, 3), (408, 3), (500, 3)])
def test_what_is_worth_a_retry(status: int, tries: int) -> None:
    with scripted(lambda *_: Reply({"error": {"message": "because"}}, status)) as server:
        expected = UserError if tries == 1 else RewardUnavailable
        with pytest.raises(expected, match=f"status {status}.*because"):
            Remote(url=server.url, retries=2, **QUICK)(_pictures(), PROMPTS)
    assert len(server.bodies) == tries


def test_a_slow_server_is_given_up_and_so_is_one_that_trickles() -> None:
    for reply in (Reply(after_seconds=1.0), Reply({"scores": ["x" * 99]}, trickle_seconds=0.05)):
        too_slow = pytest.raises(RewardUnavailable, match=r"TimeoutError: (timed out|it took too long)")
        with scripted(lambda *_, reply=reply: reply) as server, too_slow:
            Remote(url=server.url, timeout_seconds=0.2, retries=1, **QUICK)(_pictures(), PROMPTS)
        assert len(server.bodies) == 2


def test_an_answer_that_breaks_off_is_asked_for_again() -> None:
    def answer(body: Any, number: int) -> Reply:
        whole = _honest(body, number)
        return whole if number else Reply(whole.body, missing_bytes=5)

    with scripted(answer) as server:
        assert Remote(url=server.url, **QUICK)(_pictures(), PROMPTS).tolist() == [8.0] * 5
    assert len(server.bodies) == 2


def _entries(*scores: Any) -> dict[str, Any]:
    return {"scores": [{"id": str(place), "score": value, "error": None} for place, value in enumerate(scores)]}


@pytest.mark.parametrize(
    "said, message",
    [
        (b"<html>hello</html>", r"not JSON: <html>hello</html>\. Is this the reward's address"),
        (b"", "not JSON: without a word"),
        ([1.0, 2.0], 'lacks "scores"'),
        ({"scores": [1.0, 2.0]}, 'lacks "scores"'),
        (_entries(1.0), "1 scores for 2 items"),
        (_entries(1.0, 2.0, 3.0), "3 scores for 2 items"),
        ({"scores": [*_entries(1.0)["scores"]] * 2}, "other ids"),
        ({"scores": [{"id": "1", "score": 1.0}, {"id": "x", "score": 1.0}]}, "other ids"),
        ({"scores": [{"id": 0, "score": 1.0}, {"id": 1, "score": 1.0}]}, "other ids"),
        (_entries(1.0, "2.0"), "id '1' is '2.0', neither a finite number nor null"),
        (_entries(1.0, True), "neither a finite number"),
        (_entries(1.0, float("nan")), "neither a finite number"),
        (_entries(1.0, float("inf")), "neither a finite number"),
        (_entries(1.0, 10**400), "neither a finite number"),
        ({"scores": [{"id": "0", "score": 1.0}, {"id": "1"}]}, "id '1' is 'missing'"),
    ],
)
def test_a_server_that_lies_stops_the_run(said: Any, message: str) -> None:
    with scripted(lambda *_: Reply(said)) as server, pytest.raises(UserError, match=message):
        Remote(url=server.url, **QUICK)(_pictures(count=2), PROMPTS[:2])
    assert len(server.bodies) == 1


def test_the_order_of_an_answer_does_not_matter_and_null_is_nan() -> None:
    backwards = {"scores": [*_entries(1.0, None, 3.0)["scores"]][::-1]}
    with scripted(lambda *_: Reply(backwards)) as server:
        answer = Remote(url=server.url).explain(_pictures(count=3), PROMPTS[:3])
    torch.testing.assert_close(answer.scores, torch.tensor([1.0, torch.nan, 3.0]), equal_nan=True)
    assert answer.causes == {1: "the server gave no score and no reason"} and not answer.unreached


def test_a_request_that_fails_for_good_costs_only_its_own_samples() -> None:
    def answer(body: Any, number: int) -> Reply:
        down = body["items"][0]["prompt"] == "prompt 2" and number < 4
        return Reply({"error": "out of memory"}, 500) if down else _honest(body, number)

    with scripted(answer) as server:
        remote = Remote(url=server.url, batch_size=2, retries=1, **QUICK)
        first = remote.explain(_pictures(), PROMPTS)
        assert first.unreached == (2, 3) and first.scores.isnan().tolist() == [False, False, True, True, False]
        scores = score({"far": remote}, {"far": 1.0}, _pictures(), PROMPTS, retries=1, pause_seconds=0.01)
    assert scores.by_name["far"].tolist() == [8.0] * 5 and not scores.failures


def test_a_refusal_is_heard_although_the_server_hung_up_before_it_had_read_everything() -> None:
    words = b'{"error": "far too big"}'
    refusal = b"HTTP/1.1 413 No\r\nContent-Length: %d\r\n\r\n%s" % (len(words), words)

    def refuse() -> None:
        connection, _ = listener.accept()
        connection.recv(10)
        connection.sendall(refusal)
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=refuse, daemon=True).start()
        remote = Remote(url=f"http://127.0.0.1:{listener.getsockname()[1]}", encoding="exact", retries=0)
        with pytest.raises(UserError, match="refused with status 413: far too big"):
            remote(torch.rand(1, 3, 1, 1024, 1024), PROMPTS[:1])


def test_nobody_listens() -> None:
    with scripted(_honest) as server:
        pass  # its port is free again
    with pytest.raises(RewardUnavailable, match=f"{server.url} cannot be reached: ConnectionRefusedError"):
        Remote(url=server.url, retries=1, **QUICK)(_pictures(), PROMPTS)


def test_the_breaker_opens_cools_down_and_lets_one_through() -> None:
    now = [0.0]
    breaker = CircuitBreaker(failures=2, cool_down_seconds=10.0, clock=lambda: now[0])

    def fails() -> None:
        with breaker.request():
            raise RewardUnavailable("the line is dead")

    def refuses_to_ask() -> None:
        with pytest.raises(RewardUnavailable, match="the line is dead"), breaker.request():
            pytest.fail("it asked")

    @contextmanager
    def one_failure() -> Iterator[None]:
        with pytest.raises(RewardUnavailable):
            yield

    with one_failure():
        fails()
    with breaker.request() as probe:
        assert not probe  # and this one works: the count begins anew
    for _ in range(2):
        with one_failure():
            fails()
    refuses_to_ask()
    now[0] = 10.0
    with one_failure(), breaker.request() as probe:
        assert probe
        refuses_to_ask()  # one at a time
        raise RewardUnavailable("the line is dead")
    refuses_to_ask()  # it cools down again
    now[0] = 20.0
    with breaker.request() as probe:
        assert probe
    with breaker.request() as probe:
        assert not probe
    with pytest.raises(ValueError, match="failures_to_open=0 must be positive"):
        CircuitBreaker(failures=0, cool_down_seconds=1.0)


def test_a_server_that_is_down_costs_a_batch_seconds_not_hours() -> None:
    with scripted(lambda *_: Reply({"error": "out of memory"}, 500)) as server:
        remote = Remote(url=server.url, batch_size=1, retries=1, failures_to_open=2, cool_down_seconds=0.2, **QUICK)
        answer = remote.explain(_pictures(), PROMPTS)
        assert len(answer.unreached) == 5 and "out of memory" in answer.causes[4]
        assert len(server.bodies) == 4  # two requests of two tries
        time.sleep(0.2)
        remote.explain(_pictures(count=1), PROMPTS[:1])
        assert len(server.bodies) == 5  # the probe, without retries


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:80",
        "ftp://host",
        "http://",
        "http://host:port",
        "http://host:0",
        "http://[::1",
        "http://a..b",
        "http://ho st",
        "http://host/ä",
        "http://host/?q=1",
        "http://host/#x",
        "http://host\r\nX: 1",
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UserError, match="is not a server's address; give http://HOST:PORT"):
        Remote(url=url)


def test_options_that_make_no_sense() -> None:
    for options, message in (
        ({"batch_size": 0}, "batch_size=0"),
        ({"encoding": "jpeg"}, "must be one of exact, 8bit"),
        ({"timeout_seconds": 0.0}, "must be positive"),
        ({"retries": -1}, "not negative"),
    ):
        with pytest.raises(ValueError, match=message):
            Remote(url="http://127.0.0.1:1", **options)
    with pytest.raises(UserError, match="a password in it ends up in logs") as caught:
        Remote(url="http://me:s3cret@host")
    assert "s3cret" not in str(caught.value)


def test_a_base_path_is_kept() -> None:
    with scripted(_honest) as server:
        Remote(url=f"{server.url}/behind/a/proxy/")(_pictures(), PROMPTS)
    assert server.paths == ["/behind/a/proxy/score"]


# --- a process of its own --------------------------------------------------------------------------------------------

SERVE = "import sys; from vipo.rewards.server import serve; serve(sys.argv[1], {}, port=int(sys.argv[2]))"


@pytest.fixture
def start() -> Iterator[Callable[[str, int], subprocess.Popen[str]]]:
    """Starts servers that do not outlive the test."""
    started = []

    def start(name: str, port: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SERVE, name, str(port)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "is served at http://127.0.0.1:" in line, process.communicate()
    return line.split()[-1]


@pytest.fixture
def slow_reward(tmp_path: Path) -> str:
    """The mean of the picture, slowly; says that it has begun by making a file."""
    file = tmp_path / "slow.py"
    file.write_text(
        f"import pathlib, time\ndef reward(media, prompts):\n    pathlib.Path({str(tmp_path / 'began')!r}).touch()\n"
        "    time.sleep(0.2)\n    return media.mean((1, 2, 3, 4))\n"
    )
    return f"{file}:reward"


def _while_it_scores(began: Path, ask: Callable[[], Tensor], then: Callable[[], object]) -> Tensor:
    """Ask on a thread, do something to the server once it scores, and wait for the scores."""
    began.unlink(missing_ok=True)
    with ThreadPoolExecutor(1) as pool:
        scores = pool.submit(ask)
        while not began.exists():
            time.sleep(0.01)
        then()
        return scores.result(timeout=120)


def test_a_server_may_be_killed_while_it_scores_and_started_again_and_ends_cleanly_on_sigterm(
    slow_reward: str, tmp_path: Path, start: Callable[[str, int], subprocess.Popen[str]]
) -> None:
    expected, began = _pictures().mean((1, 2, 3, 4)), tmp_path / "began"
    first = start(slow_reward, 0)
    url, second = _address(first), list[subprocess.Popen[str]]()
    remote = Remote(url=url, batch_size=3, retries=1, cool_down_seconds=0.05, **QUICK)

    def patiently() -> Tensor:
        scores = score({"far": remote}, {"far": 1.0}, _pictures(), PROMPTS, retries=1200, pause_seconds=0.1)
        return scores.by_name["far"]

    def replace() -> None:
        first.kill()
        first.wait()
        second.append(start(slow_reward, int(url.rsplit(":", 1)[1])))  # takes its time, while the client asks

    torch.testing.assert_close(_while_it_scores(began, patiently, replace), expected)
    assert _address(second[0]) == url
    hasty = Remote(url=url, retries=0)
    scores = _while_it_scores(began, lambda: hasty(_pictures(), PROMPTS), second[0].terminate)
    torch.testing.assert_close(scores, expected)  # what it had in hand was finished
    out, trouble = second[0].communicate(timeout=60)
    assert (second[0].returncode, out, trouble) == (0, "", "")
