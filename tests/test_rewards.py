"""Rewards: formulas by hand, honest bookkeeping of what could not be scored, and judges that know a right caption."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vipo import rewards
from vipo.embedded import VOCABULARY, make_caption, parse_caption
from vipo.errors import UserError
from vipo.rewards import qwen_vl
from vipo.rewards.aesthetic import Aesthetic
from vipo.rewards.clip_family import ClipScore, HpsV21, PickScore
from vipo.rewards.embedded import EmojiLayout, EmojiMatch, centroid, nearest_ground, to_lab
from vipo.rewards.geneval import GenEvalHf
from vipo.rewards.image_reward import ImageReward
from vipo.rewards.ocr import Ocr
from vipo.rewards.qwen_vl import HpsV3, VideoAlign
from vipo.rewards.scoring import score
from vipo.types import Prompt, Reward

SCENES = Path(__file__).parent / "data" / "scenes"
LOADED: dict[str, type] = {
    "hpsv2.1": HpsV21,
    "pickscore": PickScore,
    "clipscore": ClipScore,
    "aesthetic": Aesthetic,
    "imagereward": ImageReward,
    "videoalign": VideoAlign,
    "hpsv3": HpsV3,
    "ocr": Ocr,
    "geneval_hf": GenEvalHf,
}
EMBEDDED = ("emoji_match", "emoji_judge", "emoji_layout")


@pytest.fixture(scope="module")
def scenes() -> tuple[Tensor, list[Prompt]]:
    """Eight composed pictures (8, 3, 1, 64, 64) and the captions they were composed from."""
    captions = json.loads((SCENES / "captions.json").read_text(encoding="utf-8"))
    pictures = [np.asarray(Image.open(SCENES / name).convert("RGB")) for name in captions]
    media = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(255).unsqueeze(2)
    return media, [Prompt(caption, index) for index, caption in enumerate(captions.values())]


@pytest.fixture(scope="module")
def built() -> dict[str, Reward]:
    return {name: rewards.build(name) for name in EMBEDDED}


def _with_other_objects(prompt: Prompt) -> Prompt:
    names, relation, ground = parse_caption(prompt.text)
    others = [name for name in VOCABULARY.names if name not in names]
    return Prompt(make_caption(others[3 : 3 + len(names)], relation, ground))


# --- rules -----------------------------------------------------------------------------------------------------------


def test_redness_by_hand() -> None:
    media = torch.zeros(3, 3, 2, 4, 5)
    media[0, 0] = 1.0  # red
    media[1, 1], media[1, 2] = 1.0, 1.0  # cyan
    media[2, 0, :, :2], media[2, 1, :, :2] = 1.0, 0.5  # the upper half orange: (1 - 0.25) / 2
    scores = rewards.build("redness")(media, [Prompt("")] * 3)
    torch.testing.assert_close(scores, torch.tensor([1.0, -1.0, 0.375]))


def test_brightness_by_hand() -> None:
    media = torch.zeros(2, 3, 1, 4, 4)
    media[0], media[1, 1] = 1.0, 0.5
    torch.testing.assert_close(rewards.build("brightness")(media, [Prompt("")] * 2), torch.tensor([1.0, 0.3576]))


def test_jpeg_compressibility_is_minus_the_kilobytes_of_the_file(tmp_path: Path) -> None:
    media = torch.rand(2, 3, 1, 32, 48, generator=torch.Generator().manual_seed(0))
    media[1] = 0.5
    scores = rewards.build("jpeg_compressibility")(media, [Prompt("")] * 2)
    picture = (media[0, :, 0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=95)
    assert scores[0] == pytest.approx(-(tmp_path / "a.jpg").stat().st_size / 1000)
    assert scores[1] > scores[0]


@pytest.mark.parametrize("name", ["redness", "brightness", "jpeg_compressibility"])
def test_a_video_scores_as_the_mean_of_its_frames(name: str) -> None:
    video = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reward = rewards.build(name)
    frames = torch.stack([reward(video[:, :, f : f + 1], [Prompt("")] * 2) for f in range(3)])
    torch.testing.assert_close(reward(video, [Prompt("")] * 2), frames.mean(0))


# --- bookkeeping -----------------------------------------------------------------------------------------------------


def _score(reward: object, count: int = 4) -> object:
    return score({"mine": reward}, {"mine": 1.0}, torch.rand(count, 3, 1, 8, 8), [Prompt("x")] * count)  # type: ignore[dict-item]


def test_scores_keep_missing_ones_missing_and_say_so() -> None:
    def mine(_media: Tensor, _prompts: Sequence[Prompt]) -> Tensor:
        return torch.tensor([1.0, torch.nan, torch.inf, -2.0], dtype=torch.float64)

    scores = score({"mine": mine}, {"mine": 2.0}, torch.rand(4, 3, 1, 8, 8), [Prompt("x")] * 4)
    assert scores.by_name["mine"].dtype == torch.float32
    torch.testing.assert_close(scores.by_name["mine"], torch.tensor([1.0, torch.nan, torch.nan, -2.0]), equal_nan=True)
    assert "2 of 4 samples (indices 1, 2)" in scores.failures["mine"]
    assert scores.total[3] == -4.0


def test_the_options_that_the_page_of_rewards_names_are_those_they_take() -> None:
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| .* \| (.*)\|$", page.partition("## In another process")[0], re.MULTILINE)
    common = {"pretrained", "dtype", "batch_size", "offload", "sha256", "tokenizer", "frames"}
    assert [name for name, _ in rows] == list(LOADED)
    for name, cell in rows:
        taken = set(inspect.signature(LOADED[name]).parameters)
        missing = {"ocr": common, "geneval_hf": {"sha256", "tokenizer", "frames"}, "aesthetic": {"tokenizer"}}
        missing["videoalign"] = {"frames"}
        assert set(re.findall(r"`(\w+)`", cell)) == taken - common, name
        assert taken & common == common - missing.get(name, set()), name


def test_a_reward_that_raises_is_named_with_its_cause() -> None:
    def mine(_media: Tensor, _prompts: Sequence[Prompt]) -> Tensor:
        raise RuntimeError("the server is down")

    with pytest.raises(UserError, match="'mine' raised RuntimeError: the server is down") as caught:
        _score(mine)
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    "answer, message",
    [
        (torch.ones(4, 1), r"returned \(4, 1\)"),
        (torch.ones(3), r"returned \(3,\)"),
        (torch.ones(4, dtype=torch.complex64), "one real number per sample"),
        ([1.0] * 3, r"returned \(3,\)"),
        ([[1.0]] * 4, r"number 0 is \[1.0\], a list; each must be a real number, or None"),
        (np.ones((4, 1)), r"number 0 is \[1.0\], a list"),
        ([1.0, "2.0", 3.0, 4.0], "number 1 is '2.0', a str"),
        ([1.0, 1j, 3.0, 4.0], "number 1 is 1j, a complex"),
        ([10**400] * 4, "number 0 is 10+, a int"),
        ("1234", "returned str; it must return one number per sample, as a tensor, an array or a list of 4"),
        ({0: 1.0}, "returned dict"),
        (1.0, "returned float"),
        (np.float64(1.0), "returned float64"),
        (None, "returned NoneType"),
        (torch.full((4,), torch.nan), "4 of 4 samples .* nothing to learn from"),
    ],
)
def test_answers_that_are_no_scores_are_refused(answer: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _score(lambda *_: answer)


@pytest.mark.parametrize(
    "answer",
    [
        [0.1, None, 2, math.nan],
        (0.1, math.inf, True + 1, None),
        [torch.tensor(0.1), None, np.float32(2), np.int64(-1) * math.nan],
        np.array([0.1, np.nan, 2, np.nan]),
        np.array([0.1, None, 2, None]),
    ],
)
def test_a_reward_may_return_a_list_of_numbers_with_none_where_there_is_no_score(answer: object) -> None:
    scores = _score(lambda *_: answer)
    expected = torch.tensor([0.1, torch.nan, 2, torch.nan])
    assert scores.by_name["mine"].dtype == torch.float32
    torch.testing.assert_close(scores.by_name["mine"], expected, rtol=0, atol=0, equal_nan=True)
    assert "2 of 4 samples (indices 1, 3)" in scores.failures["mine"]


def test_rewards_run_without_gradients_and_weights_must_match() -> None:
    seen = []

    def mine(_media: Tensor, _prompts: Sequence[Prompt]) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return torch.arange(4)

    assert _score(mine).by_name["mine"].tolist() == [0, 1, 2, 3]  # type: ignore[attr-defined]
    assert seen == [False]
    with pytest.raises(UserError, match="same names"):
        score({"mine": mine}, {"yours": 1.0}, torch.rand(1, 3, 1, 8, 8), [Prompt("")])


# --- names and files -------------------------------------------------------------------------------------------------


def test_a_reward_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def blue(media, prompts):\n    return media[:, 2].mean((1, 2, 3))\n"
        "class Channel:\n    def __init__(self, *, index):\n        self.index = index\n"
        "    def __call__(self, media, prompts):\n        return media[:, self.index].mean((1, 2, 3))\n"
        "number = 3\n"
    )
    media, prompts = torch.rand(2, 3, 1, 4, 4), [Prompt("")] * 2
    torch.testing.assert_close(rewards.build(f"{file}:blue")(media, prompts), media[:, 2].mean((1, 2, 3)))
    torch.testing.assert_close(rewards.build(f"{file}:Channel", index=1)(media, prompts), media[:, 1].mean((1, 2, 3)))
    for name, message in (
        (f"{tmp_path}/other.py:blue", "there is no file"),
        (f"{file}:red", "has no 'red'; it defines blue, Channel"),
        (f"{file}:number", "is a int, not a function"),
        (str(file), "names a file but no function"),
    ):
        with pytest.raises(UserError, match=message):
            rewards.build(name)
    with pytest.raises(UserError, match="does not take the options"):
        rewards.build(f"{file}:Channel", colour=1)


def test_a_file_that_does_not_import_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n")
    with pytest.raises(UserError, match="could not be imported: ModuleNotFoundError"):
        rewards.build(f"{tmp_path}/broken.py:reward")


def test_unknown_names_and_options_are_user_errors() -> None:
    with pytest.raises(UserError, match="Did you mean 'redness'"):
        rewards.build("rednes")
    with pytest.raises(UserError, match=r"refused its options {'quality': 200}: quality=200: JPEG quality goes from"):
        rewards.build("jpeg_compressibility", quality=200)
    with pytest.raises(UserError, match=r"takes no option 'qualty'; it takes quality. Did you mean 'quality'"):
        rewards.build("jpeg_compressibility", qualty=80)
    with pytest.raises(UserError, match="'redness' takes no option 'hue'; it takes none"):
        rewards.build("redness", hue=1)
    with pytest.raises(UserError, match="must not be negative"):
        rewards.build("emoji_match", stray=-1.0)


def test_every_reward_says_what_it_is() -> None:
    for entry in rewards.REWARDS.values():
        assert all((entry.summary, entry.value_range, entry.licence, entry.size)) and callable(entry.load())


@pytest.mark.parametrize("name", rewards.REWARDS)
def test_every_entry_leads_to_a_reward_that_refuses_what_it_does_not_know(name: str) -> None:
    with pytest.raises(UserError, match=f"^reward '{re.escape(name)}' takes no option 'nonsense'") as told:
        rewards.build(name, nonsense=1)
    listed = re.search(r"; it takes (.*?)\.", str(told.value))
    assert listed and listed[1].split(", ") == (list(rewards.REWARDS[name].parameters()) or ["none"])


def test_what_a_reward_passes_on_to_its_connection_is_an_option_of_it() -> None:
    for name in ("remote", "openai_judge"):
        assert {"timeout_seconds", "token_env"} <= rewards.REWARDS[name].parameters().keys()
        assert "connection" not in rewards.REWARDS[name].parameters()
    with pytest.raises(UserError, match=r"takes no option 'timeout'.* Did you mean 'timeout_seconds'"):
        rewards.build("remote", url="http://localhost:9", timeout=5)
    assert rewards.build("remote", url="http://localhost:9", timeout_seconds=5.0).client.timeout_seconds == 5.0


def test_an_option_without_which_there_is_no_reward_is_asked_for() -> None:
    with pytest.raises(UserError, match=r"^reward 'remote' needs url= among its options$"):
        rewards.build("remote")
    with pytest.raises(UserError, match="'openai_judge' needs base_url= and model= among"):
        rewards.build("openai_judge", low=0.0)


def test_the_state_says_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    entry = rewards.RewardEntry("tiny:redness", "a", "b", weights=(("owner/model", "model.safetensors"),))
    assert rewards.state(rewards.REWARDS["redness"]) == "ready"
    assert rewards.state(rewards.REWARDS["emoji_match"]) == "ready; needs captions of the embedded vocabulary"
    assert rewards.state(entry) == "no weights here: hf download owner/model; or name a folder in its options"
    missing = rewards.RewardEntry("tiny:redness", "a", "b", package="no_such_package", extra="ocr")
    assert rewards.state(missing) == "missing: pip install 'vipo[ocr]'"
    snapshot = tmp_path / "models--owner--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    (tmp_path / "models--owner--model" / "refs").mkdir()
    (tmp_path / "models--owner--model" / "refs" / "main").write_text("abc")
    assert rewards.state(entry) == "weights found"


# --- the embedded scorers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_right_caption_beats_one_of_other_objects(
    name: str, built: dict[str, Reward], scenes: tuple[Tensor, list[Prompt]]
) -> None:
    media, prompts = scenes
    right = built[name](media, prompts)
    wrong = built[name](media, [_with_other_objects(prompt) for prompt in prompts])
    assert right.shape == (8,) and right.dtype == torch.float32
    assert (right > wrong).sum() >= 7
    assert right.mean() - wrong.mean() > 0.4
    low, high = (-50.0, 0.0) if name == "emoji_match" else (0.0, 1.0)
    assert (torch.stack([right, wrong]) >= low).all() and (torch.stack([right, wrong]) <= high).all()


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_score_depends_on_its_own_sample_only(
    name: str, built: dict[str, Reward], scenes: tuple[Tensor, list[Prompt]]
) -> None:
    media, prompts = scenes
    together = built[name](media, prompts)
    order = [5, 0, 3]
    apart = torch.cat([built[name](media[i : i + 1], [prompts[i]]) for i in order])
    torch.testing.assert_close(apart, together[order], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_prompt_outside_the_vocabulary_gets_no_score(
    name: str, built: dict[str, Reward], scenes: tuple[Tensor, list[Prompt]]
) -> None:
    media, prompts = scenes
    scores = built[name](media[:2], [Prompt("a dragon over a castle"), prompts[1]])
    assert scores[0].isnan() and scores[1].isfinite()


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_video_of_one_picture_scores_as_the_picture(
    name: str, built: dict[str, Reward], scenes: tuple[Tensor, list[Prompt]]
) -> None:
    media, prompts = scenes
    video = media[:2].expand(-1, -1, 3, -1, -1)
    torch.testing.assert_close(
        built[name](video, prompts[:2]), built[name](media[:2], prompts[:2]), rtol=1e-3, atol=1e-4
    )


def test_match_falls_with_damage(built: dict[str, Reward], scenes: tuple[Tensor, list[Prompt]]) -> None:
    media, prompts = scenes
    tiles = media.unflatten(4, (8, 8)).unflatten(3, (8, 8))  # (N, 3, 1, 8, 8, 8, 8): rows, then columns
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torn = tiles[:, :, :, order][:, :, :, :, :, order].flatten(5, 6).flatten(3, 4)
    noisy = (media + 0.25 * torch.randn(media.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    whole = built["emoji_match"](media, prompts).mean()
    assert whole - built["emoji_match"](torn, prompts).mean() > 0.5
    assert whole > built["emoji_match"](noisy, prompts).mean()


def test_match_punishes_objects_nobody_asked_for(scenes: tuple[Tensor, list[Prompt]]) -> None:
    media, prompts = scenes
    two = media[2:3]  # an apple and a penguin
    assert parse_caption(prompts[2].text)[0] == ("apple", "penguin")
    captions = [prompts[2], Prompt("an apple on a navy background")]
    without, with_penalty = (EmojiMatch(stray=stray)(two.expand(2, -1, -1, -1, -1), captions) for stray in (0.0, 2.0))
    both_named, penguin_unnamed = without - with_penalty
    assert 0 < both_named < 0.2
    assert penguin_unnamed > both_named + 0.1


def test_layout_reads_relation_and_ground(built: dict[str, Reward], scenes: tuple[Tensor, list[Prompt]]) -> None:
    media, _ = scenes
    layout = built["emoji_layout"]
    captions = (
        "a donut left of a sunflower on a grey background",
        "a sunflower left of a donut on a grey background",  # the relation does not hold
        "a donut left of a sunflower on a pink background",  # nor does the ground
        "a sunflower left of a donut on a pink background",
    )
    scores = layout(media[4:5].expand(4, -1, -1, -1, -1), [Prompt(caption) for caption in captions])
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.75, 0.75, 0.5]))


def test_centroid_and_ground_by_hand() -> None:
    heat = torch.zeros(8, 8)
    heat[2, 5] = 1.0
    assert centroid(heat) == pytest.approx((5.5 / 8, 2.5 / 8))
    picture = (
        torch.tensor(VOCABULARY.grounds["teal"]).float().div(255)[None, :, None, None].expand(1, 3, 64, 64).clone()
    )
    picture[:, :, 20:40, 20:40] = 1.0
    assert nearest_ground(picture, torch.ones(1, 8, 8), 40.0) == ["teal"]
    assert nearest_ground(picture, torch.zeros(1, 8, 8), 40.0) == ["teal"]  # no background found: the border ring
    green = torch.tensor([0.0, 1.0, 0.0])[None, :, None, None].expand(1, 3, 64, 64)
    assert nearest_ground(green, torch.ones(1, 8, 8), 40.0) == [None]


def test_cielab_of_known_colours() -> None:
    lab = to_lab(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    expected = torch.tensor([[100.0, 0.0, 0.0], [0.0, 0.0, 0.0], [53.24, 80.09, 67.20]])
    torch.testing.assert_close(lab, expected, atol=0.1, rtol=0.0)


def test_judges_made_for_another_vocabulary_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vipo.rewards.embedded._vocabulary_stamp", lambda: "[]")
    with pytest.raises(UserError, match="another vocabulary"):
        EmojiLayout()


RATED = """
class Rated:
    def __init__(self, media_fps=16.0, index=0):
        self.rate = float(media_fps)
    def __call__(self, media, prompts):
        return media.new_full((len(media),), self.rate)
def plain(media, prompts, media_fps=1.0):
    return media.new_full((len(media),), media_fps)
"""


@pytest.mark.parametrize(
    ("name", "options", "rate"),
    [
        ("Rated", {}, 4.0),  # a class has to be called anyway
        ("Rated", {"index": 1}, 4.0),
        ("Rated", {"media_fps": 2.0}, 2.0),
        ("plain", {}, 1.0),  # it is the reward itself
    ],
)
def test_what_is_offered_is_taken_by_who_has_it_unless_told_otherwise(
    tmp_path: Path, name: str, options: dict[str, float], rate: float
) -> None:
    (tmp_path / "rated.py").write_text(RATED)
    media, prompts = torch.rand(2, 3, 5, 4, 4), [Prompt("")] * 2
    reward = rewards.build(f"{tmp_path}/rated.py:{name}", {"media_fps": 4.0, "colour": 1}, **options)
    assert reward(media, prompts).tolist() == [rate, rate]
    assert rewards.takes(f"{tmp_path}/rated.py:{name}", "media_fps")


def test_videoalign_is_offered_the_rate_of_the_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):  # noqa: N818
        pass

    def shared_model(options: qwen_vl.ModelOptions) -> None:
        raise Asked(options.media_fps)

    monkeypatch.setattr(qwen_vl, "shared_model", shared_model)
    for given, rate in (({}, 4.0), ({"media_fps": 12.0}, 12.0)):
        with pytest.raises(Asked, match=str(rate)):
            rewards.build("videoalign", {"media_fps": 4.0}, **given)
    assert [name for name in rewards.REWARDS if rewards.takes(name, "media_fps")] == ["videoalign"]
    assert rewards.build("redness", {"media_fps": 4.0})(torch.rand(1, 3, 1, 4, 4), [Prompt("")]).shape == (1,)
