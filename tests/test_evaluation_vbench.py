"""VBench: the published aggregation, its result files, and the dimensions computed here against their formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vipo.errors import UserError
from vipo.evaluation.vbench import (
    DIMENSIONS,
    QUALITY,
    SEMANTIC,
    aesthetic_quality,
    aggregate,
    consistency,
    read_results,
    table,
    temporal_flickering,
    total,
)
from vipo.prompts.files import read_prompts, shipped_set

ALL = {name: 0.5 + 0.01 * k for k, name in enumerate(DIMENSIONS)}


def write(path: Path, scores: dict[str, float]) -> Path:
    videos = [{"video_path": "a-0.mp4", "video_results": True}]
    path.write_text(json.dumps({name: [score, videos] for name, score in scores.items()}))
    return path


@pytest.mark.parametrize(
    ("quality", "semantic", "published"), [(83.36, 71.20, 80.93)]
)  # the table's row, with its columns the right way round
def test_the_total_of_published_totals(quality: float, semantic: float, published: float) -> None:
    assert round(total(quality, semantic), 2) == published
    assert round(total(semantic, quality), 2) != published


def test_an_aggregation_by_hand() -> None:
    scores = dict.fromkeys(DIMENSIONS, 0.0) | {"subject_consistency": 1.0, "dynamic_degree": 0.8, "scene": 0.41110}
    lows = (0 - 0.2615) / (1 - 0.2615) + (0 - 0.6293) / (1 - 0.6293) + (0 - 0.706) / (0.9975 - 0.706)
    quality = (1.0 + lows + 0.5 * 0.8) / 6.5
    semantic = (0.5 + (0 - 0.0009) / (0.2855 - 0.0009)) / 9
    found = aggregate(scores)
    assert found.quality == pytest.approx(quality, abs=1e-12) and found.semantic == pytest.approx(semantic, abs=1e-12)
    assert found.total == pytest.approx((4 * quality + semantic) / 5, abs=1e-12) and found.missing == ()


def test_the_bounds_are_what_zero_and_one_mean() -> None:
    for scores, share in ((lambda d: d.low, 0.0), (lambda d: d.high, 1.0)):
        found = aggregate({name: scores(dimension) for name, dimension in DIMENSIONS.items()})
        assert found.quality == pytest.approx(share) and found.semantic == pytest.approx(share)


def test_the_dimensions_are_those_of_the_prompts_with_their_published_counts() -> None:
    named = [name for prompt in read_prompts(shipped_set("vbench")) for name in prompt.metadata["dimension"]]
    assert set(named) == set(DIMENSIONS) and len(QUALITY) == 7 and len(SEMANTIC) == 9
    assert {name: named.count(name) for name in ("temporal_flickering", "subject_consistency", "scene", "color")} == {
        "temporal_flickering": 75, "subject_consistency": 72, "scene": 86, "color": 85
    }  # fmt: skip


def test_a_missing_dimension_is_named_and_its_total_unknown() -> None:
    found = aggregate({name: score for name, score in ALL.items() if name != "scene"})
    assert found.missing == ("scene",) and found.semantic is None and found.total is None
    assert found.quality == aggregate(ALL).quality
    rows = {row["dimension"]: row for row in table({"dynamic_degree": 0.8})}
    assert rows["dynamic_degree"]["normalized"] == 0.8 and rows["dynamic_degree"]["weight"] == 0.5
    assert rows["scene"]["score"] is None and len(rows) == 16


def test_an_unknown_dimension_is_refused() -> None:
    with pytest.raises(UserError, match=r"beauty are not VBench dimensions; they are subject_consistency"):
        aggregate({"beauty": 1.0})


def test_several_files_and_a_folder_are_one_result(tmp_path: Path) -> None:
    names = list(ALL)
    write(tmp_path / "a_eval_results.json", {name: ALL[name] for name in names[:9]})
    second = write(tmp_path / "rest.json", {name.replace("_", " "): ALL[name] for name in names[8:]})
    assert read_results([tmp_path, second]) == ALL


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not a VBench result"),
        ("[1]", "is not a VBench result"),
        ('{"scene": 0.5}', "is not a VBench result"),
        ('{"scene": ["high"]}', "is not a VBench result"),
        ('{"scene": []}', "is not a VBench result"),
        ("{}", "no usable score for any dimension"),
        ('{"scene": [NaN, []]}', "no usable score for scene"),
        ('{"beauty": [0.5, []]}', "no usable score for beauty; VBench's dimensions are"),
    ],
)
def test_a_file_that_is_no_result_is_named(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UserError, match=says) as raised:
        read_results([tmp_path / "r.json"])
    assert "r.json" in str(raised.value) and "\n" not in str(raised.value)


def test_results_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{k}.json", {"scene": 0.5 + k / 10}) for k in range(2)]
    with pytest.raises(UserError, match=r"1\.json' says scene = 0\.6, another of the files says 0\.5"):
        read_results(files)
    with pytest.raises(UserError, match=r"has no \*_eval_results\.json"):
        read_results([tmp_path])
    with pytest.raises(UserError, match=r"lost\.json"):
        read_results([tmp_path / "lost.json"])


def test_flickering_is_one_minus_the_mean_change_of_8_bit_frames() -> None:
    media = torch.rand(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    levels = (media * 255).round()
    by_hand = [
        (255 - sum(float((levels[n, :, i + 1] - levels[n, :, i]).abs().mean()) for i in range(3)) / 3) / 255
        for n in range(2)
    ]
    assert temporal_flickering(media).tolist() == pytest.approx(by_hand, abs=1e-6)
    assert temporal_flickering(media[:, :, :1].expand(-1, -1, 4, -1, -1)).tolist() == [1.0, 1.0]


def colours(images: Tensor) -> Tensor:
    """Features that can point away from each other."""
    return images.mean((2, 3)) - 0.5


def test_consistency_frame_by_frame() -> None:
    media = torch.rand(2, 3, 5, 2, 2, generator=torch.Generator().manual_seed(3))
    by_hand, clamped = [], 0
    for video in media:
        seen = [F.normalize(colours(video[None, :, i]), dim=-1) for i in range(5)]
        each = []
        for i in range(1, 5):
            pair = [float((seen[i] * seen[j]).sum()) for j in (i - 1, 0)]
            clamped += sum(cosine < 0 for cosine in pair)
            each.append(sum(max(0.0, cosine) for cosine in pair) / 2)
        by_hand.append(sum(each) / 4)
    assert clamped > 0  # or the clamp is not tested
    assert consistency(media, colours).tolist() == pytest.approx(by_hand, abs=1e-6)


def test_a_picture_has_no_score_over_time() -> None:
    picture = torch.rand(2, 3, 1, 4, 4)
    assert temporal_flickering(picture).isnan().all() and consistency(picture, colours).isnan().all()


def test_aesthetic_quality_is_a_tenth_of_the_frames_mean() -> None:
    def brightness(media: Tensor, prompts: Any) -> Tensor:
        assert len(prompts) == len(media) and media.shape[2] == 1
        return 10 * media.mean((1, 2, 3, 4))

    media = torch.rand(2, 3, 4, 5, 6)
    assert aesthetic_quality(media, brightness).tolist() == pytest.approx(media.mean((1, 2, 3, 4)).tolist(), abs=1e-6)
    assert math.isclose(float(aesthetic_quality(torch.ones(1, 3, 2, 4, 4), brightness)), 1.0)
