"""Rewards that misbehave: whatever one does, a score is never invented, nobody else is harmed, and the process ends."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import faults
import gloo
import tiny
from scripted import Reply, scripted
from vipo import secrets
from vipo.errors import UserError
from vipo.objective import spread
from vipo.options import OnTimeout
from vipo.ranks import together
from vipo.recipe import load_recipe, parse_recipe
from vipo.rewards import REWARDS, build
from vipo.rewards.openai_judge import OpenAiJudge
from vipo.rewards.remote import Remote
from vipo.rewards.scoring import MOST_STUCK, Patience, score
from vipo.rewards.suite import RewardSuite
from vipo.runs.run import Run
from vipo.threads import left_behind
from vipo.training.background import Background
from vipo.training.health import Health
from vipo.training.metrics import reward_numbers
from vipo.types import Prompt, Scores

PROMPTS = [Prompt(f"prompt {number}", number, {"tags": ["a"]}) for number in range(4)]
MEDIA = torch.rand(4, 3, 1, 6, 9, generator=torch.Generator().manual_seed(0))
RIGHT = [0.0, 1.0, 2.0, 3.0]


def scores(reward: Any, **options: Any) -> Scores:
    return score({"mine": reward}, {"mine": 1.0}, MEDIA, PROMPTS, pause_seconds=0.0, **options)


@pytest.fixture
def hanging() -> Iterator[Callable[..., Any]]:
    """A reward that does not answer until the test is over."""
    over = threading.Event()

    def reward(_media: Tensor, _prompts: Sequence[Prompt]) -> list[float]:
        over.wait(60)
        return RIGHT

    yield reward
    over.set()
    for thread in left_behind():
        thread.join(10)


class Unspeakable(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise RuntimeError("not even that")


def raising(error: BaseException) -> Callable[..., Any]:
    def reward(_media: Tensor, _prompts: Sequence[Prompt]) -> Any:
        raise error

    return reward


@pytest.mark.parametrize(
    "error, says",
    [
        (ZeroDivisionError("a"), "raised ZeroDivisionError: a"),
        (SystemExit(0), "raised SystemExit: 0"),
        (RecursionError("deep"), "raised RecursionError: deep"),
        (MemoryError(), "raised MemoryError"),
        (StopIteration(), "raised StopIteration"),
        (Unspeakable(), "raised Unspeakable: it does not say what"),
    ],
)
@pytest.mark.parametrize("seconds", [None, 30.0])
def test_whatever_is_raised_is_one_sentence(error: BaseException, says: str, seconds: float | None) -> None:
    with pytest.raises(UserError, match=f"reward 'mine' {says}"):
        scores(raising(error), patience=Patience(seconds))


@pytest.mark.parametrize(
    "answer, says",
    [
        (["a"] * 4, "number 0 is 'a', a str"),
        ("1234", "returned str; it must return one number per sample"),
        ([1.0] * 3, r"returned \(3,\)"),
        (torch.zeros(4, 1), r"returned \(4, 1\)"),
        (torch.zeros(4, device="meta"), "cannot be read as numbers"),
        (torch.zeros(4, dtype=torch.complex64), "one real number"),
        (np.array(["a", 1, None, 2], object), "number 0 is 'a'"),
        (None, "returned NoneType"),
        ({0: 1.0}, "returned dict"),
        (torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([1.0]), (3,)), r"returned \(3,\)"),
    ],
)
def test_what_is_not_one_number_for_each_is_refused(answer: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        scores(lambda *_: answer)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e39, None, 10**400])
def test_what_is_no_number_is_masked_and_counted(odd: Any) -> None:
    found = scores(lambda *_: [0.0, odd, 2.0, 3.0], max_failed_share=0.5) if odd != 10**400 else None
    if found is None:  # there is no float for it
        with pytest.raises(UserError, match="each must be a real number"):
            scores(lambda *_: [0.0, odd, 2.0, 3.0])
        return
    assert found.by_name["mine"].isnan().tolist() == [False, True, False, False]
    assert "1 of 4 samples (indices 1)" in found.failures["mine"]


@pytest.mark.parametrize("scale", [1e30, 1e-30, 3e37, 1e-3])
def test_scores_of_any_size_have_a_spread_and_a_mean(scale: float) -> None:
    values = scores(lambda *_: [scale * value for value in RIGHT]).by_name["mine"]
    assert spread(values, 2).item() == pytest.approx(scale * math.sqrt(0.5), rel=1e-5)
    numbers = reward_numbers(Scores({"mine": values}, {"mine": 1.0}), torch.zeros(4), 2)
    assert numbers["reward/mine"] == pytest.approx(scale * 1.5, rel=1e-5)
    assert all(math.isfinite(value) for value in numbers.values()), numbers


def test_a_mean_whose_sum_is_infinite_in_float32_is_a_number() -> None:
    values = torch.full((4,), 3e38)
    assert reward_numbers(Scores({"mine": values}, {"mine": 1.0}), torch.zeros(4), 2)["reward/mine"] == values[0]


def test_a_reward_in_tiny_units_is_an_event(model_folder: Path) -> None:
    trainer = tiny.trainer(model_folder, scorer=RewardSuite({"tiny": _tiny}, {"tiny": 1.0}), credit="sample")
    events = [event for _ in range(2) for event in trainer.step().events]
    told = [event for event in events if "'tiny' differ by" in event]
    assert len(told) == 1 and "next to the eps 0.0001" in told[0]
    assert not Health().iteration({"advantage_size": 0.8, "spread/tiny": 1e-2})


def _tiny(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return tiny.redness(media, prompts).double() * 1e-30


def vandal(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    result = media.mean((1, 2, 3, 4))
    media.zero_()
    media.numpy()[:] = 7.0
    for prompt in prompts:
        prompt.metadata["tags"].append("b")  # type: ignore[attr-defined]
    return result


def test_what_a_reward_writes_into_its_media_nobody_else_sees() -> None:
    media, prompts = MEDIA.clone(), [Prompt("x", 0, {"tags": ["a"]}) for _ in range(4)]
    both = {"vandal": vandal, "next": tiny.brightness}
    found = score(both, dict.fromkeys(both, 1.0), media, prompts)
    assert torch.equal(found.by_name["next"], found.by_name["vandal"])
    assert torch.equal(media, MEDIA)
    assert prompts[0].metadata == {"tags": ["a"]}


@pytest.mark.parametrize("name", ["redness", "brightness", "jpeg_compressibility"])
def test_rewards_of_vipo_leave_alone_what_they_are_given(name: str) -> None:
    assert name in REWARDS
    media = MEDIA.clone()
    score({name: build(name)}, {name: 1.0}, media, PROMPTS)
    assert torch.equal(media, MEDIA)


# --- rewards that hang -----------------------------------------------------------------------------------------------


def test_a_call_that_takes_too_long_stops_the_run_or_is_masked(hanging: Callable[..., Any]) -> None:
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"'mine' has not answered in 0\.1 seconds; raise training\.reward_timeout"):
        scores(hanging, patience=Patience(0.1))
    found = scores(hanging, patience=Patience(0.1, "mask"), max_failed_share=0.0)
    assert found.by_name["mine"].isnan().all()
    assert "has not answered in 0.1 seconds" in found.failures["mine"]
    assert time.monotonic() - begin < 10


def test_one_that_hangs_again_and_again_stops_a_run_that_masks(hanging: Callable[..., Any]) -> None:
    for _ in range(MOST_STUCK - 1):
        scores(hanging, patience=Patience(0.05, "mask"))
    with pytest.raises(UserError, match="calls of it have not ended: it hangs"):
        scores(hanging, patience=Patience(0.05, "mask"))


def test_one_that_was_slow_once_is_asked_on() -> None:
    calls = []

    def slow_once(_media: Tensor, _prompts: Sequence[Prompt]) -> list[float]:
        calls.append(0)
        time.sleep(0.3 if len(calls) == 1 else 0)
        return RIGHT

    patience = Patience(0.1, "mask")
    assert scores(slow_once, patience=patience).by_name["mine"].isnan().all()
    assert scores(slow_once, patience=patience).by_name["mine"].tolist() == RIGHT
    time.sleep(0.4)
    assert scores(slow_once, patience=patience).by_name["mine"].tolist() == RIGHT


def test_after_an_exception_the_background_does_not_wait_for_a_hanging_reward(hanging: Callable[..., Any]) -> None:
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Background(RewardSuite({"a": hanging}, {"a": 1.0})) as background:
        background.submit(MEDIA, PROMPTS)
        raise KeyboardInterrupt
    assert time.monotonic() - begin < 5


HANGS = """
import time
from pathlib import Path
def hangs(media, prompts):
    Path(__file__).with_name("asked").touch()
    {what}
"""


def _own_recipe(folder: Path, model_folder: Path, what: str, **changes: Any) -> Path:
    (folder / "mine.py").write_text(HANGS.format(what=what))
    given = {"rewards": {f"{folder}/mine.py:hangs": 1.0}, **changes}
    return tiny.write_recipe(folder / "recipe.yaml", tiny.recipe(model_folder, folder / "prompts.txt", **given))


def _ends(run: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    try:
        output, errors = run.communicate(timeout=seconds)
    finally:
        run.kill()
    return run.returncode, output + errors


@pytest.mark.parametrize("in_background", [False, pytest.param(True, marks=pytest.mark.long)])
def test_two_ctrl_c_stop_a_run_whose_reward_hangs(tmp_path: Path, model_folder: Path, in_background: bool) -> None:
    what = "media.shape[0] > 2 and time.sleep(600)\n    return media.mean((1, 2, 3, 4))"  # not in the evaluation
    recipe = _own_recipe(tmp_path, model_folder, what, **({"training__prompts_at_once": 1} if in_background else {}))
    run = tiny.command_line("train", recipe, "--allow-code", "--output", tmp_path / "run")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "samples").glob("*.png")):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.2)
    time.sleep(3)
    for _ in range(2):
        run.send_signal(signal.SIGINT)
        time.sleep(1)
    code, said = _ends(run, 30)
    assert code == 130 and "Traceback" not in said, said


@pytest.mark.parametrize(
    "what, code, says",
    [
        ("raise SystemExit(0)", 2, "raised SystemExit: 0"),
        pytest.param("time.sleep(600)", 2, "has not answered in 1 seconds", marks=pytest.mark.long),
    ],
)
def test_a_run_never_ends_well_without_its_reward(
    tmp_path: Path, model_folder: Path, what: str, code: int, says: str
) -> None:
    recipe = _own_recipe(tmp_path, model_folder, what, training__reward_timeout=1.0)
    got, said = faults.call(tmp_path / "said.txt", "train", recipe, "--allow-code", "--output", tmp_path / "run")
    assert got == code and says in said and "Traceback" not in said
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.slow
def test_a_reward_that_fails_in_one_process_ends_all_of_them(tmp_path: Path, model_folder: Path) -> None:
    what = "import os\n    assert os.environ['RANK'] == '0' or len(media) < 3, 'only here'\n"
    what += "    return media.mean((1, 2, 3, 4))"
    recipe = _own_recipe(tmp_path, model_folder, what)
    healthy, failing = gloo.vipo("train", recipe, "--allow-code", "--output", tmp_path / "run")
    assert healthy.code and failing.code and "raised AssertionError: only here" in failing.stderr
    assert "a reward failed in another process" in healthy.stderr


class Two:
    """The engine of one of two processes, told what the other says."""

    team, teams, in_step, device = 0, 2, False, torch.device("cpu")

    def __init__(self, other_failed: bool) -> None:
        self.other_failed = other_failed

    def gather(self, values: Tensor) -> Tensor:
        raise NotImplementedError

    def any(self, flag: bool) -> bool:
        return flag or self.other_failed


def test_a_failure_elsewhere_is_raised_here_and_one_here_is_told_first() -> None:
    assert together(Two(False), lambda: 5) == 5
    with pytest.raises(UserError, match="in another process"):
        together(Two(True), lambda: 5)
    for elsewhere in (False, True):
        with pytest.raises(UserError, match="raised ZeroDivisionError"):
            together(Two(elsewhere), lambda: scores(raising(ZeroDivisionError())))


# --- served ones -----------------------------------------------------------------------------------------------------

QUICK = {"first_pause_seconds": 0.001, "cool_down_seconds": 0.0}


def _said(body: Any, **reply: Any) -> Callable[..., Reply]:
    return lambda *_: Reply(body, **reply)


def test_a_server_that_answers_in_another_order_is_understood() -> None:
    def answer(body: Any, _number: int) -> Reply:
        entries = [{"id": item["id"], "score": float(item["index"]), "error": None} for item in body["items"]]
        return Reply({"scores": entries[::-1]})

    with scripted(answer) as server:
        assert scores(Remote(url=server.url)).by_name["mine"].tolist() == RIGHT


def test_a_flood_is_not_taken_to_its_end() -> None:
    with scripted(_said(b"[" + b"1," * 10_000_000 + b"1]")) as server, pytest.raises(UserError, match="longer than"):
        scores(Remote(url=server.url, retries=0))
    long = {"scores": [{"id": str(k), "score": None, "error": "x" * 100_000} for k in range(4)]}
    with scripted(_said(long)) as server:
        found = scores(Remote(url=server.url), trains=False)
    assert len(found.failures["mine"]) < 1000


def test_a_server_that_begins_for_ever_is_given_up() -> None:
    """100 Continue after 100 Continue: the standard library reads on."""
    import socket

    listening = socket.create_server(("127.0.0.1", 0))

    def go_on() -> None:
        with listening.accept()[0] as connection, pytest.raises(OSError):
            while True:
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                time.sleep(0.05)

    thread = threading.Thread(target=go_on)
    thread.start()
    begin = time.monotonic()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    found = score(
        {"mine": Remote(url=url, retries=0, timeout_seconds=1.0, **QUICK)},
        {"mine": 1.0},
        MEDIA,
        PROMPTS,
        retries=0,
        trains=False,
    )
    assert found.by_name["mine"].isnan().all() and time.monotonic() - begin < 10
    listening.close()
    thread.join(10)


# --- secrets ---------------------------------------------------------------------------------------------------------

SECRET = "tok-5e1f-7788-very-secret"


def test_a_server_that_echoes_the_token_puts_it_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", SECRET)
    entries = [{"id": str(k), "score": None, "error": f"you sent Authorization: Bearer {SECRET}"} for k in range(4)]
    for said, status in (({"scores": entries}, 200), ({"error": f"no {SECRET}"}, 400), (f"<{SECRET}>".encode(), 500)):
        with scripted(_said(said, status=status)) as server:
            remote = Remote(url=server.url, token_env="MINE", retries=0, **QUICK)
            try:
                told = str(scores(remote, retries=0, trains=False).failures)
            except UserError as error:
                told = str(error)
        assert SECRET not in told and secrets.HIDDEN in told
    reply = {"choices": [{"message": {"content": f"your key is {SECRET}"}}]}
    with scripted(_said(reply)) as server:
        judge = OpenAiJudge(base_url=server.url, model="m", token_env="MINE", **QUICK)
        told = str(scores(judge, trains=False).failures)
    assert SECRET not in told and secrets.HIDDEN in told


def test_a_run_whose_server_echoes_the_token_keeps_it_off_its_disk(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINE", SECRET)

    def answer(body: Any, _number: int) -> Reply:
        count = len(body["items"])
        some = [{"id": str(k), "score": float(k), "error": None} for k in range(count - 1)]
        return Reply({"scores": [*some, {"id": str(count - 1), "score": None, "error": f"Bearer {SECRET}"}]})

    with scripted(answer) as server:
        options = {"url": server.url, "token_env": "MINE"}
        raw = tiny.recipe(
            model_folder, tmp_path / "prompts.txt", rewards={"remote": {"options": options}}, training__iterations=1
        )
        list(Run(parse_recipe(raw), tmp_path / "run"))
    from vipo.report.page import write_report

    write_report(tmp_path / "run")
    events = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["events"]
    assert any(secrets.HIDDEN in event for event in events), events
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    "options",
    [
        {"body": {"api_key": SECRET}},
        {"body": {"nested": [{"hf_token": SECRET}]}},
        {"base_url": f"http://me:{SECRET}@host/v1"},
        {"base_url": f"http://host/v1?key={SECRET}"},
        {"question": f"{{prompt}} Authorization: Bearer {SECRET}"},
        {"password": 123456789},
    ],
)
def test_a_secret_among_options_is_refused_before_it_is_written(
    tmp_path: Path, model_folder: Path, options: dict[str, Any]
) -> None:
    given = {"base_url": "http://127.0.0.1:1", "model": "m", **options}
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", rewards={"openai_judge": {"options": given}})
    with pytest.raises(UserError, match="environment variable") as told:
        parse_recipe(raw)
    assert SECRET not in str(told.value) and "123456789" not in str(told.value)
    with pytest.raises(UserError, match="environment variable") as told:
        build("openai_judge", **given)
    assert SECRET not in str(told.value) and "123456789" not in str(told.value)


def test_words_that_only_sound_like_secrets_are_options() -> None:
    fine = {"max_tokens": 5, "stop_token_ids": [1], "token_env": "MINE", "url": "http://host:80/v1", "tokenizer": "a/b"}
    assert list(secrets.in_the_open(fine)) == []


def test_refused_options_and_overrides_hide_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    with pytest.raises(UserError) as told:
        build("jpeg_compressibility", quality=SECRET)
    assert SECRET not in str(told.value)
    with pytest.raises(UserError) as told:
        load_recipe("quickstart", [f"rewards={{x: {{password: {SECRET}: ["])
    assert SECRET not in str(told.value)


def test_on_timeout_is_declared_once() -> None:
    assert Patience().on_timeout in OnTimeout.__args__  # type: ignore[attr-defined]
