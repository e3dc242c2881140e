"""The reward server: every request that cannot be served gets a status and one sentence; strangers get nothing."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPConnection
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from scripted import served
from vipo import rewards
from vipo.errors import UserError
from vipo.rewards import wire
from vipo.rewards.answer import RewardUnavailable
from vipo.rewards.remote import Remote
from vipo.rewards.server import RewardServer, serve
from vipo.types import Prompt

PROMPTS = [Prompt(f"prompt {number}", number) for number in range(5)]
MEDIA = torch.rand(5, 3, 1, 6, 9, generator=torch.Generator().manual_seed(0))


def _raw(server: RewardServer, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, Any]]:
    connection = HTTPConnection(*server.server_address[:2], timeout=10)
    connection.putrequest(method, path)
    for key, value in {"Content_Length": str(len(body)), **headers}.items():
        if value != "":
            connection.putheader(key.replace("_", "-"), value)
    connection.endheaders(body)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def _post(server: RewardServer, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    return _raw(server, "POST", "/score", body, **{"Content_Type": "application/json", **headers})


def _item(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "prompt": "", "media": {"kind": "png", "data": _base64(wire.png(torch.rand(3, 4, 4)))}} | changes


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _saved(save: Callable[[io.BytesIO], None]) -> str:
    buffer = io.BytesIO()
    save(buffer)
    return _base64(buffer.getvalue())


def _npy(array: np.ndarray) -> dict[str, str]:
    return {"kind": "npy", "data": _saved(lambda buffer: np.save(buffer, array, allow_pickle=True))}


def _header_alone(shape: tuple[int, ...]) -> dict[str, str]:
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    return {"kind": "npy", "data": _saved(lambda buffer: np.lib.format.write_array_header_1_0(buffer, header))}


def _picture(mode: str, form: str) -> dict[str, str]:
    return {"kind": "png", "data": _saved(lambda buffer: Image.new(mode, (4, 4)).save(buffer, format=form))}


MALFORMED: list[tuple[Any, str]] = [
    (b"{", "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b"[" * 99_999, "not JSON"),
    (b'{"version": NaN}', "NaN is no JSON number"),
    ([], '"version": 1'),
    ({"version": 2, "items": []}, '"version": 1'),
    ({"version": 1, "items": []}, "at least one item"),
    ({"version": 1, "items": {"a": 1}}, "must be a list"),
    (["x"], "item 0 must be an object"),
    ([_item(id=3)], 'item 0 must be an object whose "id" is text'),
    ([_item(), _item()], "id of its own"),
    ([_item(prompt=None)], '"prompt" is text'),
    ([_item(metadata=[])], '"metadata" an object'),
    ([_item(index="1")], '"index" must be a whole number'),
    ([_item(media=None)], '"kind" of png or npy'),
    ([_item(media={"kind": ["png"], "data": ""})], '"kind" of png or npy'),
    ([_item(media={"kind": "pickle", "data": ""})], '"kind" of png or npy'),
    ([_item(media={"kind": "png", "data": "%%%"})], "not base64 of a whole png"),
    ([_item(media={"kind": "png", "data": _base64(wire.png(torch.rand(3, 99, 99))[:-900])})], "of a whole png"),
    ([_item(media=_picture("RGBA", "PNG"))], "RGBA (4, 4) is not RGB"),
    ([_item(media=_picture("RGB", "JPEG"))], "not base64 of a whole png"),
    ([_item(media=_npy(np.array([{"run": "me"}], dtype=object)))], "object (1,) is not float32 or uint8"),
    ([_item(media=_npy(np.zeros((3, 1, 4, 4))))], "float64 (3, 1, 4, 4) is not float32 or uint8"),
    ([_item(media=_npy(np.zeros((3, 4, 4), np.float32)))], "of shape (3, F, Y, X)"),
    ([_item(media=_header_alone((3, 1, 10**6, 10**6)))], "0 bytes are not float32 (3, 1, 1000000, 1000000)"),
    ([_item(), _item(id="b", media=_npy(np.zeros((3, 1, 4, 5), np.uint8)))], "must have one shape"),
]


@pytest.fixture(scope="module")
def redness() -> Iterator[RewardServer]:
    with served(rewards.build("redness"), max_bytes=1_000_000) as server:
        yield server


@pytest.mark.parametrize("body, message", MALFORMED)
def test_malformed_requests_get_a_400_and_one_sentence(redness: RewardServer, body: Any, message: str) -> None:
    if isinstance(body, list) and body:
        body = {"version": 1, "items": body}
    status, said = _post(redness, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert status == 400
    assert message in said["error"] and "\n" not in said["error"]


@pytest.mark.parametrize(
    "method, path, headers, status, message",
    [
        ("GET", "/", {}, 404, "use GET /health"),
        ("POST", "/other", {}, 404, "use POST /score"),
        ("PUT", "/score", {}, 405, "Unsupported method"),
        ("POST", "/score", {"Content_Type": "text/plain"}, 415, "application/json"),
        ("POST", "/score", {"Content_Length": ""}, 411, "Content-Length"),
        ("POST", "/score", {"Content_Length": "-1"}, 411, "Content-Length"),
        ("POST", "/score", {"Content_Length": "30000000", "Content_Type": "application/json"}, 413, "over 1 MB"),
    ],
)
def test_other_requests_that_make_no_sense(
    redness: RewardServer, method: str, path: str, headers: dict[str, str], status: int, message: str
) -> None:
    body = b" " * 30_000_000 if status == 413 else b""  # more than the kernel keeps: it must be taken to the end
    got, said = _raw(redness, method, path, body, **headers)
    assert (got, message in said["error"]) == (status, True), said


def test_health_and_info(redness: RewardServer) -> None:
    status, health = _raw(redness, "GET", "/health")
    assert (status, health["status"]) == (200, "ok")
    assert _raw(redness, "GET", "/info")[1] == {"name": "mine", "version": "0.1.0", "protocol": 1, "max_megabytes": 1}


def test_a_batch_over_the_limit_is_told_so_even_while_it_is_still_being_sent(redness: RewardServer) -> None:
    media = torch.rand(2, 3, 1, 1024, 1024)  # 25 MB: far more than the kernel keeps for us
    remote = Remote(url=redness.url, encoding="exact", retries=0)
    with pytest.raises(
        UserError, match=r"status 413: .* over 1 MB; lower batch_size, take encoding=8bit, or serve with a higher"
    ):
        remote(media, PROMPTS[:2])


def test_the_token_is_required_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIGHT", "s3cret")
    monkeypatch.setenv("WRONG", "s3cre")
    media = (MEDIA * 255).round() / 255
    with served(rewards.build("redness"), token="s3cret") as server:
        assert Remote(url=server.url, token_env="RIGHT")(media, PROMPTS).isfinite().all()
        for wrong in ({}, {"token_env": "WRONG"}):
            with pytest.raises(UserError, match="status 401: the bearer token is missing or wrong"):
                Remote(url=server.url, **wrong)(media, PROMPTS)
        assert _raw(server, "GET", "/info")[0] == 401
        assert _raw(server, "GET", "/health")[0] == 200
    for value in ("", " ", "two\nlines", "schlüssel"):
        monkeypatch.setenv("ODD", value)
        with pytest.raises(UserError, match="must name an environment variable that holds the token"):
            Remote(url="http://127.0.0.1:1", token_env="ODD")


def test_other_machines_are_listened_to_only_with_a_token() -> None:
    reward = rewards.build("redness")
    for host in ("0.0.0.0", ""):
        with pytest.raises(UserError, match="can be reached from other machines; put a secret"):
            RewardServer(reward, "mine", host=host, port=0)
    RewardServer(reward, "mine", host="0.0.0.0", port=0, token="s3cret").server_close()
    with pytest.raises(UserError, match="can be reached from other machines"):
        serve("no such reward", {}, host="0.0.0.0")  # before anything is loaded
    with pytest.raises(UserError, match="is unknown"):
        RewardServer(reward, "mine", host="no.such.host.invalid", port=0)


def test_a_port_that_is_taken_is_told(redness: RewardServer) -> None:
    with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1:.*choose another --port"):
        RewardServer(redness.reward, "mine", port=redness.server_address[1])
    with pytest.raises(UserError, match="max_megabytes=0 leaves no room"):
        serve("redness", {}, max_megabytes=0)


def test_a_fault_of_the_reward_stops_the_run_at_once_and_one_that_may_pass_does_not() -> None:
    calls: list[str] = []

    def faulty(_media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        calls.append(prompts[0].text)
        raise (RewardUnavailable("the model is loading") if prompts[0].index else KeyError("objects"))

    with served(faulty) as server:
        remote = Remote(url=server.url, retries=2, first_pause_seconds=0.001)
        with pytest.raises(UserError, match="status 422: reward 'mine' raised KeyError: 'objects'"):
            remote(MEDIA[:1], PROMPTS[:1])
        assert len(calls) == 1
        with pytest.raises(RewardUnavailable, match="status 503, the model is loading"):
            remote(MEDIA[:1], PROMPTS[1:2])
        assert len(calls) == 4


def test_the_model_scores_one_request_at_a_time_while_others_are_read() -> None:
    at_work, most, turns = [0], [0], threading.Lock()

    def slow(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        with turns:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        time.sleep(0.02)
        with turns:
            at_work[0] -= 1
        return media.mean((1, 2, 3, 4)) + len(prompts)

    media = (MEDIA * 255).round() / 255
    with served(slow) as server:
        results: dict[int, Tensor] = {}

        def client(count: int) -> None:
            results[count] = Remote(url=server.url)(media[:count], PROMPTS[:count])

        clients = [threading.Thread(target=client, args=(count,)) for count in range(1, 6)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
    assert most == [1]
    for count in range(1, 6):
        torch.testing.assert_close(results[count], media[:count].mean((1, 2, 3, 4)) + count)
