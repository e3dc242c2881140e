"""GenEval's checks: the rules by hand, and the detectors on tiny random weights against what is written out here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

from vipo import embedded
from vipo.errors import UserError
from vipo.rewards import geneval
from vipo.rewards.geneval import Colours, Detector, GenEvalHf, cut_out
from vipo.rewards.geneval_checks import COLOURS, Clause, Detection, Found, read_claims, stands, verdict
from vipo.types import Prompt

TOKENIZER = Path(embedded.__file__).parent / "emoji-flux" / "tokenizer"
LABELS = ("cat", "mouse", "car", "tennis racket")
MODES = ("official", "strict", "partial")


def _at(left: float, top: float, width: float = 10.0, height: float = 10.0, score: float = 0.9) -> Detection:
    return Detection((left, top, left + width, top + height), score, torch.ones(1, 1, dtype=torch.bool))


def _painted(*colours: str) -> Any:
    """A painter that gives these colours, in order, to whatever it is asked about."""
    return lambda _name, objects: colours[: len(objects)]


def _verdicts(metadata: dict[str, Any], found: Found, painter: Any = None) -> list[float]:
    """The verdict in every mode."""
    claims = read_claims(metadata)
    assert claims is not None
    return [verdict(claims, found, painter or _painted(), mode) for mode in MODES]  # type: ignore[arg-type]


# --- what is claimed -------------------------------------------------------------------------------------------------


def test_claims_of_a_published_line() -> None:
    line = (
        '{"tag": "position", "include": [{"class": "kite", "count": 1},'
        ' {"class": "wine glass", "count": 1, "position": ["above", 0]}]}'
    )
    claims = read_claims(json.loads(line))
    assert claims is not None and not claims.counting and claims.names == {"kite", "wine glass"}
    assert claims.included == (Clause("kite", 1), Clause("wine glass", 1, relation="above", target=0))
    counting = read_claims({"tag": "counting", "include": [{"class": "cat", "count": 2}]})
    assert counting is not None and counting.counting


@pytest.mark.parametrize("metadata", [{}, {"tag": "colors"}, {"include": []}])
def test_a_prompt_without_claims_has_none(metadata: dict[str, Any]) -> None:
    assert read_claims(metadata) is None


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "clause, message",
    [
        ({"count": 1}, "KeyError: 'class'"),
        ({"class": "cat", "count": "many"}, "ValueError"),
        ({"class": "cat", "count": 0}, "a count is less than 1"),
        ({"class": "cat", "count": 1, "color": "beige"}, "'beige' is not known"),
        ({"class": "cat", "count": 1, "position": ["behind", 0]}, "'behind' is not known"),
        ({"class": "cat", "count": 1, "position": ["above", 1]}, "must come before it"),
        ("cat", "AttributeError"),
    ],
)
def test_claims_that_cannot_be_read_say_why(clause: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_claims({"include": [{"class": "car", "count": 1}, clause]})


# --- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cats, expected",
    [(0, [0, 0, 0]), (1, [0, 0, 0.5]), (2, [1, 1, 1]), (3, [0, 0, 0.5]), (4, [0, 0, 0]), (9, [0, 0, 0])],
)
def test_counting(cats: int, expected: list[float]) -> None:
    metadata = {"include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
    assert _verdicts(metadata, {"cat": [_at(0, 0)] * cats}) == pytest.approx(expected)


def test_more_than_asked_for_is_enough_for_the_benchmark_alone() -> None:
    metadata = {"include": [{"class": "cat", "count": 1}, {"class": "car", "count": 1}]}
    found = {"cat": [_at(0, 0)] * 2, "car": [_at(0, 0)]}
    assert _verdicts(metadata, found) == [1.0, 0.0, 0.5]
    assert _verdicts(metadata, {"cat": [_at(0, 0)]}) == [0.0, 0.0, 0.5]


@pytest.mark.parametrize(
    "painted, expected",
    [
        (("red", "red"), [1, 1, 1]),
        (("red", "blue"), [0, 0, 0.75]),  # the count holds, half of the colours do
        (("blue", "blue"), [0, 0, 0.5]),
    ],
)
def test_colours(painted: tuple[str, ...], expected: list[float]) -> None:
    metadata = {"include": [{"class": "cat", "count": 2, "color": "red"}]}
    assert _verdicts(metadata, {"cat": [_at(0, 0)] * 2}, _painted(*painted)) == pytest.approx(expected)


def test_only_the_surest_are_looked_at_by_the_benchmark() -> None:
    metadata = {"include": [{"class": "cat", "count": 1, "color": "red"}]}
    two = {"cat": [_at(0, 0), _at(50, 50)]}
    assert _verdicts(metadata, two, _painted("red", "blue")) == [1.0, 0.0, 0.0]
    assert _verdicts(metadata, two, _painted("blue", "red")) == [0.0, 0.0, 0.0]


def test_a_colour_is_not_asked_of_objects_that_are_not_there() -> None:
    def painter(_name: str, _objects: Sequence[Detection]) -> Sequence[str]:
        raise AssertionError("nothing to look at")

    assert _verdicts({"include": [{"class": "cat", "count": 1, "color": "red"}]}, {}, painter) == [0.0, 0.0, 0.0]


def test_positions_refer_to_the_other_clause() -> None:
    metadata = {"include": [{"class": "car", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]}
    car, left, right = {"car": [_at(100, 0)]}, {"cat": [_at(0, 0)]}, {"cat": [_at(200, 0)]}
    assert _verdicts(metadata, car | left) == [1.0, 1.0, 1.0]
    assert _verdicts(metadata, car | right) == pytest.approx([0.0, 0.0, 2 / 3])
    assert _verdicts(metadata, left) == pytest.approx([0.0, 0.0, 1 / 3])  # no car: neither it nor the relation
    two_left = [_at(0, 0), _at(0, 20)]  # where a count does not hold, nothing stands anywhere
    assert _verdicts(metadata, car | {"cat": two_left}) == pytest.approx([1.0, 0.0, 1 / 3])
    assert _verdicts(metadata, {"car": [_at(100, 0), _at(100, 20)]} | left) == pytest.approx([1.0, 0.0, 1 / 3])


def test_every_object_must_stand_so() -> None:
    metadata = {"include": [{"class": "car", "count": 1}, {"class": "cat", "count": 2, "position": ["left of", 0]}]}
    found = {"car": [_at(100, 0)], "cat": [_at(0, 0), _at(200, 0)]}
    assert _verdicts(metadata, found) == pytest.approx([0.0, 0.0, 2 / 3])


@pytest.mark.parametrize(
    "a, b, relations",
    [
        ((0, 0), (50, 0), {"left of"}),
        ((50, 0), (0, 0), {"right of"}),
        ((0, 0), (0, 50), {"above"}),
        ((0, 50), (0, 0), {"below"}),
        ((0, 0), (50, 50), {"left of", "above"}),  # (50 - 2) / 70.7 along both axes
        ((0, 0), (50, 20), {"left of"}),  # 18 / 53.9 is less than half
        ((0, 0), (2, 0), set()),  # within 0.1 of both widths
        ((0, 0), (3, 0), set()),  # (3 - 2) / 3 is less than half
        ((0, 0), (5, 0), {"left of"}),  # (5 - 2) / 5
        ((0, 0), (0, 0), set()),
    ],
)
def test_positions_by_hand(a: tuple[float, float], b: tuple[float, float], relations: set[str]) -> None:
    assert {r for r in ("left of", "right of", "above", "below") if stands(_at(*a), _at(*b), r)} == relations


@given(*[st.floats(0, 100, allow_subnormal=False)] * 4)
def test_relations_mirror(x: float, y: float, u: float, v: float) -> None:
    a, b = _at(x, y), _at(u, v)
    for one, other in (("left of", "right of"), ("above", "below")):
        assert stands(a, b, one) == stands(b, a, other)
        assert not (stands(a, b, one) and stands(a, b, other))


# --- the detectors ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mask2Former and a CLIP of random weights, as transformers saves them."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("geneval")
    swin = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, hidden_dim=32, feature_size=32, mask_feature_size=16, dim_feedforward=16, num_queries=12,
        encoder_layers=1, encoder_feedforward_dim=16, decoder_layers=2, num_attention_heads=2, num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
    )  # fmt: skip
    detector = Mask2FormerForUniversalSegmentation(config)
    torch.nn.init.normal_(detector.class_predictor.weight, std=1.5)  # so that queries differ in what they see
    detector.save_pretrained(folder / "mask2former")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    clip = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=8)
    )
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def detector(folder: Path) -> Detector:
    return Detector(folder / "mask2former", resolution=64, dtype="float32", offload=False)


def _picture(height: int = 60, width: int = 90) -> Tensor:
    coarse = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(7))
    return F.interpolate(coarse, size=(height, width), mode="bilinear")[0]


def _expected(network: Any, picture: Tensor, label: int, sure: float) -> list[tuple[list[int], float]]:
    """Boxes and scores, by looping over the network's queries."""
    large = F.interpolate(picture[None], (64, 96), mode="bicubic", antialias=True).clamp(0, 1)  # 60 x 90, to 32 px
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        output = network((large - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))
    masks = F.interpolate(output.masks_queries_logits, picture.shape[1:], mode="bilinear")[0]
    found = []
    for logits, mask in zip(output.class_queries_logits[0], masks, strict=True):
        ys, xs = torch.where(mask > 0)
        if len(ys):
            score = float(logits.softmax(0)[label] * mask[mask > 0].sigmoid().mean())
            found.append(([int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1], score))
    return sorted((pair for pair in found if pair[1] > sure), key=lambda pair: -pair[1])


def test_detections_are_those_of_the_network(detector: Detector) -> None:
    picture = _picture()
    found = detector(picture, {"cat", "computer mouse"}, sure=0.05)
    assert set(found) == {"cat", "computer mouse"}
    for label, name in enumerate(("cat", "computer mouse")):
        expected = _expected(detector.network, picture, label, 0.05)
        assert len(found[name]) == len(expected) > 0
        for detection, (box, score) in zip(found[name], expected, strict=True):
            assert list(detection.box) == box and detection.score == pytest.approx(score, abs=1e-4)
            assert detection.mask.shape == (60, 90)
    assert len(detector(picture, {"cat"}, sure=0.9)["cat"]) == 0


def _fake(detector: Detector, masks: Tensor, classes: Tensor) -> Detector:
    """The detector with a network that always answers this."""
    answer = SimpleNamespace(masks_queries_logits=masks[None], class_queries_logits=classes[None])
    network = torch.nn.Module()
    network.forward = lambda _seen: answer  # type: ignore[method-assign]
    network.dtype = torch.float32  # type: ignore[assignment]
    fake = object.__new__(Detector)
    fake.network, fake.labels, fake.resolution, fake.offload = network, detector.labels, 64, False
    return fake


def test_boxes_scores_and_limits_by_hand(detector: Detector) -> None:
    masks = torch.full((20, 8, 8), -20.0)
    masks[:18, 2:5, 1:7] = 20.0  # 18 alike
    masks[18, 0, 0] = 0.1  # sigmoid 0.525; the twentieth is empty
    classes = torch.zeros(20, 5)
    classes[:, 0] = torch.linspace(9, 5, 20)
    found = _fake(detector, masks, classes)(torch.rand(3, 8, 8), {"cat", "car"}, sure=0.6)
    assert found["car"] == [] and len(found["cat"]) == 16
    scores = [detection.score for detection in found["cat"]]
    assert scores == sorted(scores, reverse=True) and scores[0] == pytest.approx(float(classes[0].softmax(0)[0]))
    assert found["cat"][0].box == (1.0, 2.0, 7.0, 5.0) and int(found["cat"][0].mask.sum()) == 18
    loose = _fake(detector, masks[18:], classes[18:])(torch.rand(3, 8, 8), {"cat"}, sure=0.3)["cat"]
    assert [d.box for d in loose] == [(0.0, 0.0, 1.0, 1.0)]
    assert loose[0].score == pytest.approx(0.525 * float(classes[18].softmax(0)[0]), abs=1e-3)


@pytest.mark.parametrize(
    "size, seen",
    [((1024, 1024), (800, 800)), ((480, 832), (768, 1344)), ((100, 1000), (128, 1344)), ((9, 9), (800, 800))],
)
def test_sizes_the_detector_sees(size: tuple[int, int], seen: tuple[int, int]) -> None:
    assert geneval._seen_size(*size, 800) == seen


def test_a_cut_out_is_grey_where_the_object_is_not() -> None:
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[1:4, 2:5] = True
    mask[1, 2] = False
    cut = cut_out(torch.zeros(3, 6, 8), Detection((2.0, 1.0, 5.0, 4.0), 1.0, mask))
    assert cut.shape == (1, 3, 3, 3) and (cut[0, :, 0, 0] == 153 / 255).all() and float(cut.sum()) == pytest.approx(1.8)


def test_colours_are_those_of_the_clip(folder: Path) -> None:
    colours = Colours(folder / "clip", batch_size=2, dtype="float32", offload=False)
    network, picture = CLIPModel.from_pretrained(folder / "clip").eval(), _picture(64, 64)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    whole = torch.ones(64, 64, dtype=torch.bool)
    boxes = [(0.0, 0.0, 32.0, 32.0), (32.0, 0.0, 64.0, 32.0), (0.0, 32.0, 32.0, 64.0)]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    named = []
    with torch.no_grad():
        for left, top, right, bottom in boxes:
            seen = (picture[:, int(top) : int(bottom), int(left) : int(right)] - mean) / std
            image = F.normalize(network.get_image_features(seen[None]).pooler_output[0], dim=0)
            closeness = []
            for colour in COLOURS:
                texts = [
                    f"a photo of a {colour} car",
                    f"a photo of a {colour}-colored car",
                    f"a photo of a {colour} object",
                ]
                tokens = tokenizer(
                    texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
                ).input_ids
                vectors = F.normalize(network.get_text_features(tokens).pooler_output, dim=1)
                closeness.append(float(image @ F.normalize(vectors.mean(0), dim=0)))
            named.append(COLOURS[closeness.index(max(closeness))])
    assert colours(picture, "car", [Detection(box, 1.0, whole) for box in boxes]) == named
    assert colours(picture, "car", [Detection(boxes[1], 1.0, whole)]) == named[1:2]  # the phrases come from memory


# --- the reward ------------------------------------------------------------------------------------------------------


def test_scores_of_a_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = GenEvalHf(pretrained=folder / "mask2former", clip=folder / "clip", mode="partial")
    asked = []

    def detect(_self: Detector, picture: Tensor, names: set[str], *, sure: float) -> Found:
        asked.append((names, sure))
        return {"cat": [_at(0, 0)] * round(float(picture.mean()))}

    monkeypatch.setattr(Detector, "__call__", detect)
    media = torch.tensor([1.0, 2.0, 1.0])[:, None, None, None, None].expand(3, 3, 2, 8, 8).clone()
    media[1, :, 1] = 0.0  # a video: two cats, then none
    two = {"tag": "counting", "include": [{"class": "cat", "count": 2}]}
    prompts = [Prompt("", 0, {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}), Prompt("", 1, two)]
    scores = reward(media, [*prompts, Prompt("a cat")])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.5, torch.nan]), equal_nan=True)
    assert asked == [({"cat"}, 0.3)] * 2 + [({"cat"}, 0.9)] * 2  # counting wants to be surer


def test_the_whole_reward_runs(folder: Path) -> None:
    media = torch.stack([_picture(), _picture().flip(2)])[:, :, None]
    claims = {"include": [{"class": "cat", "count": 1}, {"class": "car", "count": 1, "color": "red"}]}
    for mode in MODES:
        reward = GenEvalHf(
            pretrained=folder / "mask2former", clip=folder / "clip", mode=mode, resolution=64, offload=True
        )
        scores = reward(media, [Prompt("a cat and a red car", 0, claims)] * 2)
        assert scores.shape == (2,) and ((scores >= 0) & (scores <= 1)).all()


def test_what_does_not_fit_says_what_would(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no mode='soft'; choose from official, strict, partial"):
        GenEvalHf(pretrained=folder / "mask2former", clip=folder / "clip", mode="soft")
    with pytest.raises(ValueError, match="resolution=8 px is less than one cell"):
        GenEvalHf(pretrained=folder / "mask2former", clip=folder / "clip", resolution=8)
    with pytest.raises(UserError, match="holds a model of type 'clip'; reward 'geneval_hf' accepts mask2former"):
        GenEvalHf(pretrained=folder / "clip", clip=folder / "clip")
    reward = GenEvalHf(pretrained=folder / "mask2former", clip=folder / "clip")
    with pytest.raises(
        UserError, match=r"knows 4 classes, and 'tennis rackets' is none of them; .* Did you mean 'tennis racket'"
    ):
        reward(_picture()[None, :, None], [Prompt("", 0, {"include": [{"class": "tennis rackets", "count": 1}]})])
    monkeypatch.setattr(geneval.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"needs scipy: pip install 'vipo\[geneval\]'"):
        GenEvalHf(pretrained=folder / "mask2former", clip=folder / "clip")
