"""Several runs on one page: the figures of `vipo compare`, curves with bands, pictures of one seed, what is missing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from terminal import Vipo, assert_refused
from test_report import PER_PROMPT, TEXTS, pixels, unpacked, write_run
from vipo.evaluation.estimate import Estimate
from vipo.media.sheets import load_sheet, save_sheet
from vipo.report import arms, beside, together
from vipo.report.compare import comparable
from vipo.report.svg import Band, interval, y_span
from vipo.report.together import render

EACH = 6  # pictures an iteration trains on


def change_recipe(folder: Path, **changes: Any) -> Path:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **changes}))
    return folder


def change_last(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    change(lines[-1])
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Read only: two credits at two rates, two seeds each, whose gains are 0.1, 0.2, ... 0.8 in their order."""
    root, made = tmp_path_factory.mktemp("together"), list[Path]()
    one = write_run(root / "one", gain=0.0)
    for credit in ("sample", "advantage_map"):
        for rate in (0.001, 0.002):
            for seed in (0, 1):
                name = f"{credit}-{rate}-{seed}"
                folder = Path(shutil.copytree(one, root / name))
                raise_to(folder, 0.1 * (len(made) + 1))
                prompts = {"per_iteration": 2, "group_size": EACH // 2}
                keys = {
                    "name": name,
                    "credit": credit,
                    "seed": seed,
                    "optimizer": {"learning_rate": rate},
                    "prompts": prompts,
                }
                made.append(change_recipe(folder, **keys, structuring=STRUCTURING))
    for number, folder in enumerate((made[0], made[6])):  # pictures of their own
        media = torch.rand(len(TEXTS), 3, 1, 8, 8, generator=torch.Generator().manual_seed(100 + number))
        save_sheet(folder / "samples" / "step-000006.png", media, TEXTS, {})
    return made


def raise_to(folder: Path, gain: float) -> None:
    """Have the reward rise by so much over the run."""
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    for line in lines:
        line["values"]["match"] = [value + gain * line["iteration"] / 6 for value in line["values"]["match"]]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


STRUCTURING = {"sources": ["perceptual"], "normalization": "mean", "backbone": "x", "components": 3}


@pytest.fixture
def eight(written: list[Path], tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in written]


@pytest.fixture(scope="module")
def page(written: list[Path]) -> str:
    return render(comparable(written))


def test_the_page_stands_alone_and_prompts_are_inert(page: str) -> None:
    references = re.findall(r"""(?:src|href|srcset)\s*=\s*["']?([^"'\s>]+)""", page)
    assert {r for r in references if not r.startswith(("data:", "#"))} == {"https://arxiv.org/abs/2511.18719"}
    assert not re.search(r"url\(|@import|<script|<link (?!rel=\"icon\" href=\"data:)", page)
    assert "<b>thing</b>" not in page and "a &lt;b&gt;thing&lt;/b&gt; number 0" in page
    assert all("alt=" in tag for tag in re.findall(r"<img[^>]+>", page))
    assert all("aria-label=" in tag for tag in re.findall(r"<svg[^>]+class[^>]+>", page))
    assert re.findall(r'<section id="(\w+)"', page) == ["groups", "outcome", "curves", "pictures", "prompts"]
    assert page.count('tabindex="0"') == page.count('class="scroll"')  # what scrolls can be scrolled by keyboard
    assert "Missing or left out" not in page and "one starting noise" in page and ">untrained<" in page


def test_values_and_scores_are_inert_too(eight: list[Path]) -> None:
    change_recipe(eight[3], generator={"name": "flux", "path": "another", "frames": 1})
    for folder in eight[:4]:
        log = folder / "evaluations.jsonl"
        log.write_text(log.read_text().replace('"judge"', '"<script>judge"'))
        change_recipe(folder, credit=f"<script>{folder.name}")
    page = render(comparable(eight[:4]))
    assert "<script" not in page and "credit &lt;script&gt;" in page and "&lt;script&gt;judge" in page
    assert "one starting noise" not in page and ">untrained<" not in page  # of another model


def test_the_page_has_the_figures_that_the_command_prints(
    page: str, written: list[Path], vipo: Vipo, tmp_path: Path
) -> None:
    found = json.loads(vipo("compare", *written, "--json").out)["groups"]
    assert [group["settings"] for group in found][1] == {"credit": "sample", "optimizer.learning_rate": 0.002}
    table = page[page.index('id="outcome"') : page.index("Run by run")]
    for group in found:
        score = group["scores"]["match"]
        assert f">{score['mean']:.4f}<" in table and f"{score['low']:.4f} to {score['high']:.4f}" in table
        assert score["difference"] is None or f">+{score['difference']['mean']:.4f}<" in table
    assert table.count("better over seeds") == 3 and 'data-label="Pictures to level' in table
    said = vipo("compare", *written, "--html", tmp_path / "out.html")
    assert said.out.strip() == str(tmp_path / "out.html") and (tmp_path / "out.html").read_text() == page


def test_curves_are_means_over_seeds_with_a_panel_for_each_rate(written: list[Path]) -> None:
    found = arms.arms(comparable(written))
    assert [(arm.line, arm.rate, arm.style) for arm in found] == [
        ("credit sample", "learning rate 0.001", "s0"),
        ("credit sample", "learning rate 0.002", "s0"),
        ("credit advantage map", "learning rate 0.001", "s1"),
        ("credit advantage map", "learning rate 0.002", "s1"),
    ]
    match, judge = arms.curves(found)
    assert [panel.title for panel in match.panels] == ["learning rate 0.001", "learning rate 0.002"]
    legend = [words for _, words in match.panels[0].legend]
    assert legend[:2] == ["credit sample (2 seeds)", "credit advantage map (2 seeds)"] and "the level" in legend[2]
    assert (judge.role, len(judge.panels[1].legend), match.note) == ("held-out judge", 2, "")
    band = arms._band("match", found[0], pictures=True)
    assert band is not None and band.x == [0, 3 * EACH, 6 * EACH]
    assert np.subtract(band.y, band.y[0]) == pytest.approx([0, 0.075, 0.15], abs=2e-3)  # of 0.1 and 0.2
    assert np.subtract(band.high, band.low) == pytest.approx([0, 0.05, 0.1])
    of_rates = arms.arms(comparable(written[:4]))  # nothing else differs: one panel
    assert [(arm.line, arm.rate) for arm in of_rates][1] == ("learning rate 0.002", "")


def flat(name: str, *y: float) -> Band:
    return Band(name, "s0", list(range(len(y))), y, y, y)


def test_what_falls_far_below_all_others_is_broken_off_and_what_rises_is_not() -> None:
    up, noise, fallen, riser = flat("a", 0, 0.3), flat("b", 0, -0.01), flat("c", 0, -2), flat("d", 0, 9)
    assert arms._axis([up, noise, fallen]) == (y_span([up, noise]), [fallen])
    assert arms._axis([noise, flat("e", 0, 0), riser]) == (y_span([noise, riser]), [])
    assert arms._axis([up, fallen]) == (y_span([up, fallen]), [])  # of two neither is the rule
    deep = [fallen, flat("f", 0, -2.1)]
    assert [band.name for band in arms._axis([up, noise, riser, flat("g", 0, 0), *deep])[1]] == []
    assert {band.name for band in arms._axis([up, noise, flat("h", 0, 0.2), flat("g", 0, 0), *deep])[1]} == {"c", "f"}


def test_a_curve_that_leaves_the_axis_is_marked_and_told(eight: list[Path]) -> None:
    def fall(record: dict[str, Any]) -> None:
        record["values"]["match"] = [value - 9 for value in record["values"]["match"]]

    for folder in eight[-2:]:
        change_last(folder, fall)
    match, judge = arms.curves(arms.arms(comparable(eight)))
    marks = [panel.svg.count('class="off s1"') for panel in match.panels]
    assert marks == [0, 1] and not judge.note
    assert "Broken off the axis at its lower end: credit advantage map, learning rate 0.002 falls to" in match.note


def test_pictures_are_the_first_of_each_prompt_of_one_seed(written: list[Path]) -> None:
    found, sheets = arms.arms(comparable(written)), beside.Sheets()
    prompts, rows = beside.beside(found, sheets)
    assert prompts == TEXTS[: 2 * beside.PROMPTS : PER_PROMPT] and not sheets.problems
    beside.movements(found, sheets)
    assert sum(tiles is not None for tiles in sheets._read.values()) == beside.AT_HAND  # not 16 in memory
    assert [(row.words, row.seed) for row in rows][:2] == [
        ("untrained", None),
        ("credit sample, learning rate 0.001", 0),
    ]
    for row, folder, at in ((rows[0], written[0], 0), (rows[1], written[0], 6), (rows[4], written[6], 6)):
        strips, _ = load_sheet(folder / "samples" / f"step-{at:06d}.png")
        assert np.array_equal(pixels(unpacked(row.tiles[3].uri))[0], np.asarray(strips[3 * PER_PROMPT]))


def test_prompts_that_moved_most_are_means_over_seeds(eight: list[Path]) -> None:
    def move(record: dict[str, Any]) -> None:
        rows = record["values"]["match"]
        record["values"]["match"] = [
            v + 3 * (k // PER_PROMPT == 4) - 5 * (k // PER_PROMPT == 7) for k, v in enumerate(rows)
        ]

    change_last(eight[1], move)  # of one of two seeds: half of it
    first, *_ = beside.movements(arms.arms(comparable(eight[:4])), beside.Sheets())
    assert (first.gained[0].prompt, first.lost[0].prompt) == (TEXTS[4 * PER_PROMPT], TEXTS[7 * PER_PROMPT])
    assert (first.gained[0].gain, first.lost[0].gain) == pytest.approx((0.15 + 1.5, 0.15 - 2.5), abs=0.02)
    score = first.gained[0].scores[0]
    assert score.after - score.before == pytest.approx(first.gained[0].gain)
    assert len(first.gained[0].pictures) == 2 and len(first.lost) == 1 and first.seeds == (0, 1)


def test_what_is_missing_is_told_by_the_command_and_on_the_page(eight: list[Path], vipo: Vipo, tmp_path: Path) -> None:
    log = eight[0] / "evaluations.jsonl"
    log.write_text(log.read_text().replace('{"iteration": 6', '{"iteration": 6;', 1))
    change_last(eight[3], lambda record: record["values"].update(judge=[None] * len(TEXTS)))
    again = Path(shutil.copytree(eight[4], tmp_path / "again"))
    (eight[6] / "samples" / "step-000006.png").unlink()
    change_last(eight[7], lambda record: record.pop("values"))
    said = vipo("compare", *eight, again, "--html", tmp_path / "out.html")
    words, page = " ".join(said.err.split()), (tmp_path / "out.html").read_text()
    both = [
        f"{eight[0]}: left out 1 damaged line of evaluations.jsonl",
        f"{eight[0]}: its last evaluation is of iteration 3, of 6 planned",
        f"{eight[7]}: its last evaluation is of iteration 3, of 6 planned",
        f"{eight[4]}: seed 0 of credit=advantage_map, learning_rate=0.001 is also {again}, which counts in its group",
        "credit=sample, learning_rate=0.002: no row for judge, of which not every seed has a score at its end",
    ]
    assert said.code == 0 and all(sentence in words for sentence in both), words
    assert all(sentence in page for sentence in both)
    assert f"{eight[6]}: its pictures are not shown: the pictures of iteration 6 are not in samples/" in page
    assert "no point in the curves at iteration 6, where not every seed was evaluated" in page
    assert "seed 1, iteration" in page and "seed 0, iteration" not in page  # the seed that all groups have pictures of


def test_nothing_but_evaluations_is_a_page_too(eight: list[Path]) -> None:
    for folder in eight:
        shutil.rmtree(folder / "samples")
        for name in ("metrics.jsonl", "timing.jsonl", "environment.json"):
            (folder / name).unlink()
        change_recipe(folder, prompts={})
    page = render(comparable(eight))
    assert f"{eight[7]}: its last evaluation is of iteration 6, its metrics.jsonl has 0" in page
    assert "No pictures can be shown" in page and "so the curves are against iterations" in page
    assert "without scores before and after" not in page and "Gained most" in page
    one = eight[0] / "evaluations.jsonl"
    one.write_text(one.read_text().splitlines(keepends=True)[0])
    alone = render(comparable(eight[:1]))
    assert "No group has scores before and after training" in alone and "1 run in 1 group" in alone


def test_a_report_is_of_one_run_and_a_page_is_no_folder(written: list[Path], vipo: Vipo) -> None:
    assert_refused(
        vipo("report", *written[:2]),
        "a report is of one run, not of 2",
        f"vipo compare {written[0]} {written[1]} --html PATH",
    )
    assert not (written[0] / "report.html").exists()
    assert_refused(vipo("compare", written[0], "--html", written[1]), "is a folder; add a file name to it")
    assert_refused(vipo("compare", *written, "--html", "x.html", "--csv"), "one format at a time", "--html")
    assert (written[1] / "recipe.yaml").is_file()


@pytest.mark.parametrize(
    "keys", [{"seed": "x"}, {"prompts": [1]}, {"prompts": {"per_iteration": "x", "group_size": 2}}]
)
def test_a_recipe_of_another_kind_is_a_sentence(keys: dict[str, Any], eight: list[Path], vipo: Vipo) -> None:
    change_recipe(eight[1], **keys)
    assert_refused(vipo("compare", *eight[:2]), "is damaged")


def test_an_interval_that_would_make_all_others_dots_is_an_arrow() -> None:
    def ends(*far: float) -> list[Estimate]:
        return [Estimate(value, 0.1, value - 0.1, value + 0.1) for value in far]

    assert together._widest(ends(0.1, -0.2, -9)) == pytest.approx(0.3) and together._widest([]) == 0
    assert together._widest(ends(0.1, -9)) == pytest.approx(9.1)  # of two neither is the rule
    drawn = interval(-9.1, -9, -8.9, label="far", widest=0.3)
    assert 'class="off" d="M0.0 8l9.0' in drawn and "<circle" not in drawn
