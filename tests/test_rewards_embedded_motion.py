"""Motion of clips: the rule that trains, on squares whose way is known, and the judge that was trained on drawings."""

from __future__ import annotations

import pytest
import torch

from vipo import rewards
from vipo.embedded import clips
from vipo.rewards.embedded_motion import EmojiMotion, centres, foreground, to_motion_input
from vipo.types import Prompt

FRAMES, SIDE, SQUARE = 17, 64, 16
CORNER = {"left": (44, 24), "right": (4, 24), "up": (24, 44), "down": (24, 4), "still": (24, 24)}


def clip(motion: str, way: float = 32.0, wobble: float = 0.0, sideways: float = 0.0) -> torch.Tensor:
    """A red square that goes ``way`` pixels over a teal ground, and ``sideways`` down, (1, 3, F, Y, X)."""
    media = torch.tensor([0.07, 0.54, 0.54]).view(1, 3, 1, 1, 1).repeat(1, 1, FRAMES, SIDE, SIDE)
    (x, y), (dx, dy) = CORNER[motion], clips.DIRECTIONS[motion]
    for frame in range(FRAMES):
        step = way * frame / (FRAMES - 1)
        left, top = (
            round(x + dx * step + wobble * (-1) ** frame),
            round(y + dy * step + sideways * frame / (FRAMES - 1)),
        )
        media[0, :, frame, top : top + SQUARE, left : left + SQUARE] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    return media


def says(motion: str) -> Prompt:
    return Prompt(clips.make_clip_caption("apple", motion, "teal"))


def score(media: torch.Tensor, motion: str) -> float:
    return float(EmojiMotion()(media, [says(motion)])[0])


@pytest.mark.parametrize("shown", clips.MOTIONS)
def test_the_motion_that_the_caption_claims_scores_highest(shown: str) -> None:
    found = {claimed: score(clip(shown), claimed) for claimed in clips.MOTIONS}
    assert max(found, key=found.__getitem__) == shown and found[shown] > 0.8
    assert sorted(found.values())[-2] < 0.4
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}.get(shown)
    assert opposite is None or found[opposite] < -0.8


def test_half_the_way_is_half_the_reward_and_more_than_enough_is_no_more() -> None:
    assert score(clip("right", way=13), "right") == pytest.approx(0.45, abs=0.05)  # its ends are means of three frames
    assert score(clip("right", way=40), "right") <= 1.0


def test_a_way_across_the_claimed_one_costs_what_it_is_long() -> None:
    straight, slanted = score(clip("right"), "right"), score(clip("right", sideways=20.0), "right")
    assert slanted == pytest.approx(straight - 20 * 14 / 16 / (0.4 * SIDE), abs=0.1)


def test_a_rough_path_and_an_empty_frame_cost() -> None:
    assert score(clip("right", wobble=2.0), "right") < score(clip("right"), "right") - 0.2
    empty = clip("still")
    empty[:, :, 8:] = empty[:, :, :1, :1, :1]
    assert score(empty, "still") < score(clip("still"), "still") - 0.9
    blank = torch.full((1, 3, FRAMES, SIDE, SIDE), 0.5)
    assert score(blank, "still") == pytest.approx(-1.0) and score(blank, "left") == pytest.approx(-2.0)


def test_the_path_is_where_the_square_is() -> None:
    path = centres(foreground(clip("right"), 20.0))
    assert path.shape == (1, FRAMES, 2)
    expected = (4 + SQUARE / 2 + 2 * torch.arange(FRAMES)) / SIDE
    assert torch.allclose(path[0, :, 0], expected, atol=0.01) and torch.allclose(path[0, :, 1], torch.tensor(0.5))


@pytest.mark.parametrize("name", ["emoji_motion", "emoji_motion_judge"])
def test_a_prompt_outside_the_grammar_gets_no_score(name: str) -> None:
    media = torch.cat([clip("left"), clip("left")])
    found = rewards.build(name)(media, [Prompt("a nice video"), says("left")])
    assert found.isnan().tolist() == [True, False]


def test_the_held_out_judge_tells_motions_of_things_it_has_never_seen() -> None:
    judge = rewards.build("emoji_motion_judge")
    for shown in clips.MOTIONS:
        media = clip(shown, way=26.0)
        found = {claimed: float(judge(media, [says(claimed)])[0]) for claimed in clips.MOTIONS}
        assert max(found, key=found.__getitem__) == shown and found[shown] > 0.5


def test_the_judge_takes_any_length_and_size() -> None:
    media = torch.nn.functional.interpolate(clip("up"), size=(9, 40, 48), mode="trilinear")
    assert to_motion_input(media).shape == (1, 3, 9, 32, 32)
    assert rewards.build("emoji_motion_judge")(media, [says("up")]).shape == (1,)


def test_captions_of_clips_are_read_back_and_others_refused() -> None:
    every = [(n, m, g) for n in clips.OBJECTS for m in clips.MOTIONS for g in clips.GROUNDS]
    captions = [clips.make_clip_caption(*claims) for claims in every]
    assert [tuple(clips.parse_clip_caption(text)) for text in captions] == every and len(set(captions)) == 160
    for text in (
        "a cat moving left",
        "a cat moving north on a teal background",
        "an cat moving left on a teal background",
    ):
        with pytest.raises(ValueError, match="not a caption of a clip"):
            clips.parse_clip_caption(text)


def test_the_pictures_rewards_read_the_captions_of_clips_too() -> None:
    named = rewards.build("emoji_match")(clip("left"), [says("left")])
    assert named.shape == (1,) and bool(named.isfinite().all())
