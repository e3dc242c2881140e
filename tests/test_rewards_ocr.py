"""The text reward: the rule by hand, what gets no score, and a real engine on real letters where one is installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from vipo.errors import UserError
from vipo.rewards.ocr import Ocr, Picture, edit_distance, legibility, target
from vipo.types import Prompt


def _by_brightness(picture: Picture) -> Sequence[str]:
    """An engine that reads "Hello World" off white pictures, half of it off grey ones, nothing off black ones."""
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and picture.flags.c_contiguous
    return {255: ["Hello", "World"], 128: ["hello"], 0: []}[int(picture.mean())]


def _distance_by_recursion(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return _distance_by_recursion(a[1:], b[1:])
    shorter = ((a[1:], b), (a, b[1:]), (a[1:], b[1:]))
    return 1 + min(_distance_by_recursion(*pair) for pair in shorter)


# --- the rule --------------------------------------------------------------------------------------------------------


def test_distance_of_known_pairs() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("flaw", "lawn") == 2
    assert edit_distance("", "abc") == 3 and edit_distance("abc", "") == 3 and edit_distance("", "") == 0


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_distance_agrees_with_its_definition(a: str, b: str) -> None:
    assert edit_distance(a, b) == _distance_by_recursion(a, b) == edit_distance(b, a)


@pytest.mark.parametrize(
    "read, wanted, score",
    [
        ("HELLO world", "Hello World", 1.0),
        ("a shop with Hello World over its door", "helloworld", 1.0),  # text besides it is free once it is there
        ("helo world", "Hello World", 0.9),
        ("", "Hello", 0.0),
        ("completely different and much longer", "Hi", 0.0),  # never below 0
    ],
)
def test_legibility_by_hand(read: str, wanted: str, score: float) -> None:
    assert legibility(read, wanted) == pytest.approx(score)


def test_the_target_is_the_first_quotation() -> None:
    assert target('a sign "Open Late" under "Closed"') == "openlate"
    assert target("a sign without words") == target('an unclosed "quote') == target('an empty "" one, then "x"') == ""


# --- the reward ------------------------------------------------------------------------------------------------------


def test_a_batch_with_a_video_and_a_prompt_without_text() -> None:
    media = torch.tensor([1.0, 0.5, 0.0, 1.0])[:, None, None, None, None].expand(4, 3, 2, 8, 8).clone()
    media[2, :, 1] = 1.0  # a video that shows the text in one of its two frames
    prompts = [Prompt('it says "Hello World"')] * 3 + [Prompt("no words")]
    scores = Ocr(engine=_by_brightness)(media, prompts)
    assert scores.shape == (4,) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.5, 0.5, torch.nan]), equal_nan=True)


def test_the_engine_sees_red_green_blue_in_rows_and_columns() -> None:
    seen: list[Picture] = []

    def engine(picture: Picture) -> Sequence[str]:
        seen.append(picture)
        return []

    media = torch.zeros(1, 3, 1, 4, 6)
    media[0, 0, 0, 1, 5] = 1.0
    Ocr(engine=engine)(media, [Prompt('"x"')])
    assert seen[0].shape == (4, 6, 3) and seen[0][1, 5].tolist() == [255, 0, 0] and seen[0].sum() == 255


def test_an_unknown_or_missing_engine_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no engine 'tesseract'; choose from rapidocr, or give a function"):
        Ocr(engine="tesseract")
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UserError, match=r"lacks rapidocr: pip install 'vipo\[ocr\]'"):
        Ocr()


def test_the_real_engine_reads_real_letters() -> None:
    pytest.importorskip("rapidocr", reason="pip install 'vipo[ocr]'")
    picture = Image.new("RGB", (384, 256), (200, 30, 30))
    ImageDraw.Draw(picture).text((20, 90), "Step Goal Achieved", font=ImageFont.load_default(36), fill=(255, 255, 255))
    media = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255)[None, :, None].repeat(3, 1, 1, 1, 1)
    media[2] = 0.0
    prompts = [Prompt(f'a watch that shows "{text}"') for text in ("Step Goal Achieved", "Quizzical Fjord", "Step")]
    scores = Ocr()(media, prompts)
    assert scores[0] == 1.0 and scores[1] < 0.5 and scores[2] == 0.0
