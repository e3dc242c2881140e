"""What a reward says of positions: checked, laid on the latent grid, sent over the wire, and trained on."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from scripted import Reply, scripted, served
from vipo import rewards
from vipo.assemble import build
from vipo.errors import UserError
from vipo.options import SIGNED_MAPS
from vipo.recipe import parse_recipe
from vipo.rewards import evidence_wire
from vipo.rewards.answer import Answer, RewardUnavailable
from vipo.rewards.evidence import EvidenceGrid, by_sample, drawn
from vipo.rewards.remote import Remote
from vipo.rewards.scoring import Patience, score
from vipo.rewards.suite import RewardSuite
from vipo.training.background import Background
from vipo.types import Prompt, Scores

PROMPTS = [Prompt(f"prompt {number}", number) for number in range(4)]
MEDIA = torch.rand(4, 3, 1, 16, 24, generator=torch.Generator().manual_seed(0))
GRID = (1, 4, 6)
NAN = torch.nan


class Dense:
    """Scores of ones, and whatever evidence it is given."""

    def __init__(self, evidence: Any, scores: Any = None) -> None:
        self.evidence, self.scores, self.calls = evidence, scores, 0

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:  # noqa: ARG002
        raise AssertionError("one pass gives both")

    def with_evidence(self, media: Tensor, prompts: Sequence[Prompt]) -> Any:  # noqa: ARG002
        self.calls += 1
        return torch.ones(len(media)) if self.scores is None else self.scores, self.evidence


def located(reward: Any, media: Tensor = MEDIA, grid: tuple[int, int, int] = GRID, **options: Any) -> Scores:
    where = EvidenceGrid({"mine": 0.5}, grid, options.pop("temporal_stride", 1))
    prompts = PROMPTS[: len(media)]
    return score({"mine": reward}, {"mine": 1.0}, media, prompts, evidence=where, pause_seconds=0.0, **options)


# --- in this process -------------------------------------------------------------------------------------------------


def test_evidence_comes_in_one_pass_and_is_averaged_onto_the_latent_grid() -> None:
    reward = Dense(torch.rand(4, 1, 16, 24, generator=torch.Generator().manual_seed(1)))
    scores = located(reward)
    assert reward.calls == 1 and scores.evidence["mine"].shape == (4, *GRID)
    assert scores.evidence_weights == {"mine": 0.5}
    half = torch.zeros(4, 1, 16, 24)
    half[..., 12:] = -1.0
    laid = located(Dense(half)).evidence["mine"]
    assert torch.allclose(laid[..., [0, 1, 4, 5]], torch.tensor([0.0, 0, -1, -1]), atol=1e-5)
    same = torch.rand(4, *GRID) * 2 - 1
    assert torch.equal(located(Dense(same.double().numpy())).evidence["mine"], same)


def test_a_reward_is_asked_only_where_its_evidence_is_taken() -> None:
    assert not score({"mine": rewards.build("redness")}, {"mine": 1.0}, MEDIA, PROMPTS).evidence
    where = EvidenceGrid({"red": 1.0}, GRID)
    both = {"red": rewards.build("redness"), "light": rewards.build("brightness")}
    found = score(both, dict.fromkeys(both, 1.0), MEDIA, PROMPTS, evidence=where)
    assert list(found.evidence) == ["red"]
    values, evidence = rewards.build("redness").with_evidence(MEDIA, PROMPTS)  # type: ignore[attr-defined]
    assert torch.equal(found.by_name["red"], values)
    assert torch.allclose(evidence.mean((1, 2, 3)), values, atol=1e-6)


@pytest.mark.parametrize("frames", [1, 3, 9])
def test_frames_are_those_of_the_media_or_the_latents_or_one_for_all(frames: int) -> None:
    media = torch.zeros(2, 3, 9, 8, 8)
    evidence = torch.rand(2, frames, 4, 4)
    laid = located(Dense(evidence), media, (3, 4, 4), temporal_stride=4).evidence["mine"]
    expected = evidence if frames == 3 else evidence[:, :1].repeat(1, 3, 1, 1)
    if frames == 9:
        expected[:, 1], expected[:, 2] = evidence[:, 1:5].mean(1), evidence[:, 5:].mean(1)
    assert torch.allclose(laid, expected, atol=1e-6)
    with pytest.raises(UserError, match=r"evidence of 5 frames; give 1, which holds for all of them, 9 .* or 3"):
        located(Dense(torch.zeros(2, 5, 4, 4)), media, (3, 4, 4), temporal_stride=4)


def test_a_sample_of_nan_has_no_evidence_and_is_told() -> None:
    evidence = torch.zeros(4, 1, 2, 2)
    evidence[1] = NAN
    scores = located(Dense(evidence))
    assert scores.evidence["mine"].isnan().flatten(1).all(1).tolist() == [False, True, False, False]
    assert "1 of 4 samples have a score and no evidence; they keep" in scores.failures["mine"]
    unscored = located(Dense(evidence, [1.0, None, 2.0, 3.0]))  # told once: it has no score
    assert "no finite score for 1 of 4" in unscored.failures["mine"] and "evidence" not in unscored.failures["mine"]
    with pytest.raises(UserError, match=r"left 25% of the samples without evidence, more than .*share=0.2"):
        located(Dense(evidence), max_failed_share=0.2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(4, 2, 2), r"evidence of shape \(4, 2, 2\); it must be \(N, T, H, W\)"),
        (torch.zeros(3, 1, 2, 2), "evidence for 3 samples of 4"),
        (torch.zeros(4, 1, 0, 2), "evidence of shape"),
        (torch.full((4, 1, 2, 2), 1.5), r"numbers up to 1.5 for sample 0; each must be from -1 \(at fault\) to 1"),
        (torch.full((4, 1, 2, 2), -torch.inf), "not finite for sample 0"),
        (torch.tensor([[[[0.0, NAN]]]] * 4), "not finite for sample 0; .* or all of the sample's NaN"),
        (torch.zeros(4, 1, 2, 2, dtype=torch.complex64), "as Tensor; it must be real numbers"),
        (np.array([["a"]]), "an array of <U1"),
        ([[0.0]], "as list"),
    ],
)
def test_wrong_evidence_stops_the_run_in_one_sentence(wrong: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        located(Dense(wrong))
    assert "reward 'mine'" in str(caught.value) and "\n" not in str(caught.value)


def test_with_evidence_returns_two_things() -> None:
    class Alone(Dense):
        def with_evidence(self, media: Tensor, prompts: Sequence[Prompt]) -> Any:  # noqa: ARG002
            return torch.ones(len(media))

    with pytest.raises(UserError, match="returned Tensor from with_evidence; it must return two things"):
        located(Alone(None))
    with pytest.raises(UserError, match="gives no evidence: it has no method with_evidence"):
        located(rewards.build("brightness"))


def test_what_was_not_reached_is_asked_again_for_its_evidence_alone() -> None:
    class Flaky(Dense):
        def with_evidence(self, media: Tensor, prompts: Sequence[Prompt]) -> Any:
            self.calls += 1
            rows = [prompt.index for prompt in prompts]
            if self.calls == 1:  # the last two are out of reach
                return Answer(
                    torch.tensor([1.0, 2, NAN, NAN]), {2: "down", 3: "down"}, (2, 3), {0: MEDIA[0, 0], 1: MEDIA[1, 0]}
                )
            return torch.ones(len(rows)), media[:, 0]

    laid = located(Flaky(None)).evidence["mine"]
    assert torch.equal(laid, located(Dense(MEDIA[:, 0])).evidence["mine"])


def test_a_call_that_takes_too_long_has_no_evidence() -> None:
    class Down(Dense):
        def with_evidence(self, *_: Any) -> Any:
            raise RewardUnavailable("no line")

    patience = Patience(30.0, "mask")
    with pytest.raises(UserError, match="nothing to learn from"):
        located(Down(None), retries=0, patience=patience)
    suite = {"up": Dense(MEDIA[:, 0]), "down": Down(None)}
    where = EvidenceGrid({"up": 1.0, "down": 1.0}, GRID)
    found = score(
        suite, dict.fromkeys(suite, 1.0), MEDIA, PROMPTS, evidence=where, retries=0, trains=False, patience=patience
    )
    assert found.evidence["down"].isnan().all() and found.evidence["up"].isfinite().all()


def test_parts_that_are_scored_in_the_background_join() -> None:
    where = EvidenceGrid({"redness": 1.0}, GRID)
    suite = RewardSuite({"redness": rewards.build("redness")}, {"redness": 1.0}, evidence=where)
    with Background(suite) as background:
        parts = [background.submit(MEDIA[k : k + 2], PROMPTS[k : k + 2]) for k in (0, 2)]
        joined = Scores.join([part.result() for part in parts])
    assert torch.equal(joined.evidence["redness"], suite(MEDIA, PROMPTS).evidence["redness"])
    assert joined.evidence_weights == {"redness": 1.0}


def test_emoji_match_says_where_it_saw_what() -> None:
    scenes = Path(__file__).parent / "data" / "scenes"
    captions = json.loads((scenes / "captions.json").read_text(encoding="utf-8"))
    name, caption = next((name, text) for name, text in captions.items() if " left of " in text)
    from PIL import Image

    picture = torch.from_numpy(np.array(Image.open(scenes / name).convert("RGB"))).permute(2, 0, 1)[None, :, None] / 255
    first, second = caption.split(" on ")[0].split(" left of ")
    ground = caption.split(" on ")[1]
    reward = rewards.build("emoji_match")
    both = picture.expand(2, -1, -1, -1, -1)
    asked = [Prompt(caption), Prompt(f"{first} on {ground}"), Prompt("nothing of ours")]
    scores, evidence = reward.with_evidence(picture.expand(3, -1, -1, -1, -1), asked)  # type: ignore[attr-defined]
    assert torch.equal(scores[:2], reward(both, asked[:2]))
    assert scores[2].isnan() and evidence[2].isnan().all() and evidence[:2].abs().max() <= 1
    whole, without = evidence[0, 0], evidence[1, 0]
    left, right = (slice(None), slice(0, 3)), (slice(None), slice(5, 8))
    assert whole[left].max() > 0.8 and whole.min() > -0.1
    assert without[left].max() > 0.8 and (without.min() < -0.4) and scores[1] < scores[0]
    assert without[left].min() > -0.2 or without[right].min() < without[left].min()  # the stray thing is to the right
    clip = picture.expand(-1, -1, 3, -1, -1)
    assert torch.allclose(reward.with_evidence(clip, asked[:1])[1][:, 2], evidence[:1, 0], atol=1e-5)  # type: ignore[attr-defined]
    assert second


# --- over the wire ---------------------------------------------------------------------------------------------------


def test_served_evidence_is_that_of_the_same_reward_here() -> None:
    reward = Dense(torch.rand(2, 1, 5, 7) * 2 - 1)
    reward.evidence[1] = NAN
    with served(reward) as server:
        there = located(Remote(url=server.url, batch_size=2), MEDIA[:2])
    here = located(reward, MEDIA[:2])
    assert torch.equal(there.evidence["mine"].nan_to_num(9), here.evidence["mine"].nan_to_num(9))
    assert there.by_name["mine"].tolist() == [1.0, 1.0] and "1 of 2 samples have a score" in there.failures["mine"]


def test_a_served_reward_without_evidence_is_told() -> None:
    with served(rewards.build("brightness")) as server:
        with pytest.raises(UserError, match="status 422: reward 'mine' gives no evidence"):
            located(Remote(url=server.url), MEDIA)
        assert Remote(url=server.url)(MEDIA, PROMPTS).isfinite().all()
    with (
        served(Dense(torch.zeros(4, 1, 400, 400))) as server,
        pytest.raises(UserError, match="more than 131072 numbers"),
    ):
        located(Remote(url=server.url), MEDIA)


def judge(evidence: Any) -> Callable[[Any, int], Reply]:
    """A server of another's that says this of each sample."""
    return lambda body, _: Reply(
        {"scores": [{"id": i["id"], "score": 1.0, "error": None, "evidence": evidence} for i in body["items"]]}
    )


def heard(evidence: Any, grid: tuple[int, int, int] = GRID) -> Tensor:
    with scripted(judge(evidence)) as server:
        found = located(Remote(url=server.url, first_pause_seconds=0.001), MEDIA[:2], grid).evidence["mine"]
        assert [body["evidence"] for body in server.bodies] == [True]
    assert torch.equal(found[0].nan_to_num(9), found[1].nan_to_num(9))
    return found[0, 0]


def test_boxes_of_flaws_and_maps_of_a_served_judge_are_laid_on_the_latent_grid() -> None:
    # 16 x 24 pixels are 2 x 3 cells of 8; a latent grid of 2 x 3 shows them as they were drawn
    boxes = {"boxes": [[0, 0, 1 / 3, 0.5, 0.4], [0, 0, 1 / 6, 1, 0.6]]}
    expected = torch.tensor([[-0.4, 0, 0], [-0.3, 0, 0]])  # the larger score counts; half a cell counts half
    assert torch.allclose(heard({"flaws": boxes}, (1, 2, 3)), expected, atol=1e-6)
    assert torch.allclose(heard({"support": boxes}, (1, 2, 3)), -expected, atol=1e-6)
    assert not heard({"flaws": {"boxes": []}}).any()  # nothing wrong is evidence too
    given = torch.rand(4, 6)
    assert torch.allclose(heard({"flaws": given.tolist(), "support": [[1.0] * 6] * 4}), 1 - given, atol=1e-6)
    assert torch.allclose(heard({"map": [(given - 0.5).tolist()]}), given - 0.5, atol=1e-6)
    covered = drawn([(0.1, 0.2, 0.85, 0.7, 1.0)], (7, 9))
    assert covered.sum() == pytest.approx(0.75 * 9 * 0.5 * 7, rel=1e-5)


def npy(array: np.ndarray) -> dict[str, str]:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return {"kind": "npy", "data": base64.b64encode(buffer.getvalue()).decode()}


LIES: list[tuple[Any, str]] = [
    ("here", "must be null or an object with"),
    ({}, "must be null or an object with"),
    ({"map": [[0.0]], "flaws": [[0.0]]}, "must be null or an object with"),
    ({"map": {"boxes": []}}, "neither lists of numbers nor base64 .* must have the"),
    ({"map": [[0.0], [0.0, 1.0]]}, "neither lists of numbers"),
    ({"map": [["0.5"]]}, "neither lists of numbers"),
    ({"map": [[True]]}, "holds torch.bool"),
    ({"map": 0.5}, "it is float"),
    ({"map": [0.5]}, r"is \(1,\), not \(H, W\) or \(T, H, W\)"),
    ({"map": [[]]}, r"is \(1, 1, 0\), not"),
    ({"map": [[1.5]]}, "numbers that are not from -1 to 1"),
    ({"map": [[float("nan")]]}, "numbers that are not from -1 to 1"),
    ({"flaws": [[-0.5]]}, "numbers that are not from 0 to 1"),
    ({"map": npy(np.zeros((1, 2, 2)))}, "float64 .* is not float32"),
    ({"map": npy(np.zeros((1, 1, 2**17 + 1), np.float32))}, "of at most 131072 numbers"),
    ({"map": {"kind": "npy", "data": "%"}}, "neither lists of numbers nor base64"),
    ({"map": {"kind": "npy", "data": npy(np.zeros((1, 2, 2), np.float32))["data"][:-8]}}, "bytes are not float32"),
    ({"flaws": [[0.5]], "support": [[0.5, 0.5]]}, "give one shape"),
    ({"flaws": {"boxes": [[0, 0, 1, 1]]}}, r"a box is \[x0, y0, x1, y1, score\]"),
    ({"flaws": {"boxes": [[0, 0, 300, 200, 1]]}}, "five numbers from 0 to 1"),
    ({"flaws": {"boxes": [[0.5, 0, 0.5, 1, 1]]}}, "is empty; x0 and y0"),
    ({"flaws": {"boxes": [[0, 0, 1, 1, 1]] * 1001}}, "at most 1000 boxes"),
]


@pytest.mark.parametrize(("lie", "message"), LIES, ids=[message[:24] for _, message in LIES])
def test_evidence_against_the_protocol_is_refused(lie: Any, message: str) -> None:
    with pytest.raises(evidence_wire.WireError, match=message) as caught:
        evidence_wire.heard({"id": "7", "evidence": lie}, (16, 24))
    assert "id '7'" in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_that_lies_of_its_evidence_stops_the_run() -> None:
    with pytest.raises(UserError, match=r"answered against the protocol: the evidence of id '0', map, has numbers"):
        heard({"map": [[2.0]]})
    plain = lambda body, _: Reply({"scores": [{"id": i["id"], "score": 1.0} for i in body["items"]]})  # noqa: E731
    with scripted(plain) as server, pytest.raises(UserError, match="has no evidence, which it was asked for"):
        located(Remote(url=server.url), MEDIA)


def test_evidence_by_sample_keeps_rows_apart() -> None:
    found = by_sample("mine", {2: torch.zeros(1, 2, 2), 0: torch.full((1, 3, 3), NAN)}, 4)
    assert list(found) == [2] and Answer.cat([Answer(torch.ones(3)), Answer(torch.ones(1), evidence={0: found[2]})])
    joined = Answer.cat([Answer(torch.ones(3)), Answer(torch.ones(1), evidence={0: found[2]})])
    assert list(joined.evidence) == [3]


# --- trained on ------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "flaw_map": {"credit": "flaw_map"},
    "dense_reward": {"credit": "dense_reward"},
    "signed_consensus": {"credit": "signed_consensus"},
    "evidence": {"credit": "advantage_map", "structuring": {"sources": ["evidence", "deviation"]}},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_recipe_trains_on_it(tmp_path: Path, model_folder: Path, way: str) -> None:
    changes = {**WAYS[way], "rewards": {"redness": {"weight": 1.0, "evidence": 0.7}}}
    session = build(parse_recipe(tiny.recipe(model_folder, tmp_path / "prompts.txt", **changes)))
    step = session.trainer.step()
    assert step.maps is not None and step.maps.shape == (6, *tiny.GRID)
    assert step.metrics["grad_norm"] > 0 and step.metrics["ratio_deviation"] == 0
    assert ("map/negative" in step.metrics) == (WAYS[way]["credit"] in SIGNED_MAPS)
    takes = way != "signed_consensus"
    assert ("evidence/redness" in step.metrics) == takes == bool(step.scores.evidence)
    if takes:
        assert step.metrics["unlocated/redness"] == 0 and step.metrics["evidence/redness"] > 0
        assert step.scores.evidence_weights == {"redness": 0.7}
    if way == "flaw_map":
        flaws = (-step.scores.evidence["redness"]).clamp_min(0)
        assert torch.allclose(step.maps, 1 - flaws)
    scored = session.evaluation_scorer(step.rollout.media, step.rollout.prompts)
    assert not scored.evidence  # an evaluation does not ask


@pytest.mark.parametrize("way", ["flaw_map", "dense_reward", "evidence"])
def test_a_recipe_without_evidence_is_refused(tmp_path: Path, model_folder: Path, way: str) -> None:
    for given in ({"brightness": 1.0}, {"redness": {"weight": 1.0, "evidence": 0.0}}):
        recipe = parse_recipe(tiny.recipe(model_folder, tmp_path / "prompts.txt", **WAYS[way], rewards=given))
        with pytest.raises(UserError, match=r"takes evidence, and of .* none gives any"):
            build(recipe)


@pytest.mark.parametrize("credit", ["dense_reward", "flaw_map"])
def test_its_whole_run_keeps_sheets_and_resumes(tmp_path: Path, model_folder: Path, credit: str) -> None:
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", credit=credit, training__iterations=2)
    raw["training"] |= {"maps_every": 1, "checkpoint_every": 1}
    raw["training"]["prompts_at_once"] = 1
    whole = tiny.run_all(raw, tmp_path / "run")
    assert len(list((tmp_path / "run" / "maps").glob("*.png"))) == 2
    assert len(tiny.lines(tmp_path / "run" / "metrics.jsonl")) == 2 and whole
