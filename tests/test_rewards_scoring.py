"""The failure policy: ask again what can pass, stop on what cannot, invent nothing. And scoring on a thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vipo import rewards
from vipo.errors import UserError
from vipo.rewards.answer import Answer, RewardUnavailable
from vipo.rewards.scoring import ask, score
from vipo.rewards.suite import RewardSuite
from vipo.training.background import Background
from vipo.types import Prompt, Reward, Scores

PROMPTS = [Prompt(f"prompt {number}", number) for number in range(4)]
MEDIA = torch.linspace(0, 1, 4)[:, None, None, None, None].expand(4, 3, 1, 8, 8).contiguous()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that scoring would have waited."""
    waited: list[float] = []
    monkeypatch.setattr("vipo.rewards.scoring.time.sleep", waited.append)
    return waited


class Down:
    """Out of reach the first ``times`` times, then the mean of the picture."""

    def __init__(self, times: int) -> None:
        self.times, self.asked = times, list[list[int]]()

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.asked.append([prompt.index for prompt in prompts])
        if len(self.asked) <= self.times:
            raise RewardUnavailable("the line is dead")
        return media.mean((1, 2, 3, 4))


class Partly:
    """Samples of odd index are out of reach the first ``times`` times; ``never`` has no score at all."""

    def __init__(self, times: int, never: int = -1) -> None:
        self.times, self.never, self.asked = times, never, list[list[int]]()

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.explain(media, prompts).complete()

    def explain(self, media: Tensor, prompts: Sequence[Prompt]) -> Answer:
        self.asked.append([prompt.index for prompt in prompts])
        parts = []
        for sample, prompt in zip(media, prompts, strict=True):
            if prompt.index % 2 and len(self.asked) <= self.times:
                parts.append(Answer.unreachable(1, "the line is dead"))
            elif prompt.index == self.never:
                parts.append(Answer(torch.tensor([torch.nan]), {0: "too dark"}))
            else:
                parts.append(Answer(sample.mean()[None]))
        return Answer.cat(parts)


def _scores(reward: Reward, **options: float) -> Scores:
    return score({"mine": reward}, {"mine": 1.0}, MEDIA, PROMPTS, **options)


def test_a_reward_out_of_reach_is_asked_again_after_a_pause(pauses: list[float]) -> None:
    reward = Down(2)
    scores = _scores(reward, retries=2, pause_seconds=7.0)
    torch.testing.assert_close(scores.by_name["mine"], torch.linspace(0, 1, 4))
    assert not scores.failures
    assert pauses == [7.0, 7.0]
    assert reward.asked == [[0, 1, 2, 3]] * 3


def test_after_the_last_try_the_run_stops_with_the_cause(pauses: list[float]) -> None:
    with pytest.raises(UserError, match=r"4 of 4 samples .*the line is dead \(4 times\): there is nothing to learn"):
        _scores(Down(99), retries=3)
    assert len(pauses) == 3


def test_only_what_was_not_seen_is_asked_again(pauses: list[float]) -> None:
    reward = Partly(1, never=2)
    scores = _scores(reward)
    assert reward.asked == [[0, 1, 2, 3], [1, 3]]
    expected = torch.tensor([0, 1 / 3, torch.nan, 1])
    torch.testing.assert_close(scores.by_name["mine"], expected, equal_nan=True)
    assert "1 of 4 samples (indices 2), because too dark (once); they are left out" in scores.failures["mine"]
    assert len(pauses) == 1


def test_what_stays_out_of_reach_is_missing_and_its_causes_are_counted(pauses: list[float]) -> None:
    scores = _scores(Partly(99, never=0), retries=1)
    torch.testing.assert_close(
        scores.by_name["mine"], torch.tensor([torch.nan, torch.nan, 2 / 3, torch.nan]), equal_nan=True
    )
    assert "because the line is dead (2 times), too dark (once); they" in scores.failures["mine"]
    assert len(pauses) == 1


def test_the_suite_stops_beyond_its_share_and_says_the_cause(pauses: list[float]) -> None:  # noqa: ARG001
    suite = RewardSuite({"mine": Partly(99)}, {"mine": 1.0}, max_failed_share=0.4)
    with pytest.raises(UserError, match=r"left 50% .*max_failed_share=0\.4.*the line is dead \(2 times\)"):
        suite(MEDIA, PROMPTS)


@pytest.mark.parametrize(
    "fault, message",
    [
        (TypeError("two arguments, not one"), "'mine' raised TypeError: two arguments"),
        (ConnectionError("no route"), "'mine' raised ConnectionError: no route"),
        (UserError("prompt 3 has no metadata"), "reward 'mine': prompt 3 has no metadata"),
    ],
)
def test_faults_stop_at_once(fault: Exception, message: str, pauses: list[float]) -> None:
    def mine(_media: Tensor, _prompts: Sequence[Prompt]) -> Tensor:
        raise fault

    with pytest.raises(UserError, match=message) as caught:
        _scores(mine)
    assert caught.value.__cause__ is fault
    assert not pauses


def test_a_fault_on_the_second_try_stops_too(pauses: list[float]) -> None:
    class Worse(Down):
        def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            super().__call__(media, prompts)
            raise KeyError("lost")

    with pytest.raises(UserError, match="raised KeyError"):
        _scores(Worse(1))
    assert len(pauses) == 1


def test_many_causes_are_cut_short_and_the_most_frequent_comes_first() -> None:
    class Varied(Partly):
        def explain(self, *_: object) -> Answer:
            causes = ["a", "b", "c", "d", "b"]
            return Answer(torch.tensor([torch.nan] * 5 + [1.0]), dict(enumerate(causes)))

    scores = score({"mine": Varied(0)}, {"mine": 1.0}, torch.rand(6, 3, 1, 4, 4), [Prompt("")] * 6)
    assert ", because b (2 times), a (once), c (once), ...; they" in scores.failures["mine"]


@pytest.mark.usefixtures("unchecked")
def test_an_explained_answer_of_the_wrong_shape_is_refused() -> None:
    class Short(Partly):
        def explain(self, *_: object) -> Answer:
            return Answer(torch.zeros(3))

    with pytest.raises(UserError, match=r"returned \(3,\) of torch.float32; .* shape \(4,\)"):
        _scores(Short(0))


def test_an_answer_for_callers_that_take_a_tensor() -> None:
    assert Answer(torch.tensor([1.0, torch.nan]), {1: "too dark"}).complete()[0] == 1
    with pytest.raises(RewardUnavailable, match="the line is dead"):
        Answer.cat([Answer(torch.ones(1)), Answer.unreachable(2, "the line is dead")]).complete()
    with pytest.raises(RewardUnavailable, match="the line is dead"):
        Partly(99)(MEDIA, PROMPTS)
    assert ask("mine", Down(99), MEDIA, PROMPTS).unreached == (0, 1, 2, 3)


# --- in the background -----------------------------------------------------------------------------------------------


def test_scores_from_the_background_are_those_of_the_plain_call() -> None:
    names = ("redness", "jpeg_compressibility")
    suite = RewardSuite({name: rewards.build(name) for name in names}, dict.fromkeys(names, 1.0))
    batches = [torch.rand(4, 3, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    with Background(suite) as background:
        coming = [background.submit(media, PROMPTS) for media in batches]
        for media, future in zip(batches, coming, strict=True):
            plain, scored = suite(media, PROMPTS), future.result(timeout=10)
            assert all(torch.equal(scored.by_name[name], plain.by_name[name]) for name in names)


def test_the_background_lets_the_caller_go_on_and_calls_a_reward_once_at_a_time() -> None:
    go, at_work, most = threading.Event(), [0], [0]

    def waits(_media: Tensor, _prompts: Sequence[Prompt]) -> Tensor:
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        assert go.wait(10)
        at_work[0] -= 1
        return torch.zeros(4)

    with Background(RewardSuite({"waits": waits}, {"waits": 1.0})) as background:
        coming = [background.submit(MEDIA, PROMPTS) for _ in range(3)]
        assert not any(future.done() for future in coming)  # and yet we are here
        go.set()
        assert all(future.result(timeout=10).by_name["waits"].tolist() == [0.0] * 4 for future in coming)
    assert most == [1]


def test_what_the_scorer_raises_comes_out_of_the_future_and_closing_drops_the_rest() -> None:
    started, go = threading.Event(), threading.Event()

    def broken(_media: Tensor, _prompts: Sequence[Prompt]) -> Tensor:
        started.set()
        assert go.wait(10)
        raise ValueError("bad picture")

    background = Background(RewardSuite({"broken": broken}, {"broken": 1.0}))
    first, second = (background.submit(MEDIA, PROMPTS) for _ in range(2))
    assert started.wait(10)
    threading.Timer(0.05, go.set).start()
    background.close()
    with pytest.raises(UserError, match="'broken' raised ValueError: bad picture"):
        first.result(timeout=0)
    assert second.cancelled()
