"""The claims experiment: recipes of all arms, known results to known rows, verdicts from intervals, the page."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vipo.errors import UserError
from vipo.media.sheets import save_sheet

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments" / "claims"))
import coverage
import page
import plots
import results
import run
import tables
import verdicts
from arm import recipe_of
from cells import NONE, Table
from matrix import ARMS, SETTING

PROMPTS = 12
START = np.linspace(0.2, 0.8, PROMPTS)
SLOPES = [1.0, 2.0, 3.0, 2.0, 1.5, 2.5, 0.5, 3.5]
EVERY = (*dict.fromkeys((*tables.SCORES, *tables.JUDGES, *tables.CLIP_SCORES)),)
PAIR = ("redness-sample", "redness-vipo")
WOBBLE = 0.01 * (-1.0) ** np.arange(PROMPTS)  # of mean 0


def write(folder: Path, arm: str, seed: int, evaluations: Mapping[int, Mapping[str, Any]], **training: Any) -> None:
    stored = {str(k): {name: list(map(float, v)) for name, v in e.items()} for k, e in evaluations.items()}
    record = {"arm": arm, "seed": seed, "evaluations": stored, "training": training, "seconds": 60.0}
    record |= {"recipe": ARMS[arm].recipe, "overrides": list(ARMS[arm].overrides)}
    (folder / f"{arm}-{seed}.json").write_text(json.dumps(record))


def write_gains(
    folder: Path, arm: str, gains: Mapping[int, float], *, iterations: int = 24, more: Sequence[int] = ()
) -> None:
    """An arm whose every score rises by each seed's gain, half of it at half time, give or take the wobble."""
    for seed, gain in gains.items():
        at = {
            k: {score: START + gain * k / iterations + WOBBLE * (seed + 1) for score in EVERY}
            for k in (*more, iterations // 2, iterations)
        }
        write(folder, arm, seed, at, clipped_fraction=[0.0, 0.1 * (seed + 1)])


def write_untrained(folder: Path) -> None:
    for arm in ("untrained", "groups-untrained", "clips-untrained"):
        write(folder, arm, 0, {0: dict.fromkeys(EVERY, START)})


def write_redness(folder: Path, arm: str, seed: int, redness: list[float], structure: list[float]) -> None:
    """Mean redness gained and every measure at iterations 0, 4, 8 ..."""
    at = {
        4 * k: {"redness": START + r, **dict.fromkeys(tables.STRUCTURE, np.full(PROMPTS, s))}
        for k, (r, s) in enumerate(zip(redness, structure, strict=True))
    }
    write(folder, arm, seed, at)


def write_gradient(folder: Path, **slopes: list[float]) -> None:
    maps = {name: {"slope": row, "auc": 0.9, "top_quarter": 0.5} for name, row in slopes.items()}
    maps[results.SCALAR] = {"slope": SLOPES, "auc": 0.5, "top_quarter": 0.25}
    (folder / "gradient.json").write_text(json.dumps({"iterations": len(SLOPES), "lengths": [1.0], "maps": maps}))


def write_everything(folder: Path, pictures: Path) -> None:
    """A finished experiment."""
    write_untrained(folder)
    for number, arm in enumerate(ARMS):
        if not ARMS[arm].trained:
            continue
        for seed in range(results.planned_seeds(arm)):
            if arm in tables.REDNESS:
                loss = 0.8 if arm == "redness-sample" else 0.4
                write_redness(folder, arm, seed, [0, 0.2, 0.5 + 0.1 * seed], [1, 1 - loss / 3, 1 - loss + 0.05 * seed])
            else:
                long = {"iterations": 48, "more": (8, 16, 32)} if arm in tables.GROUPS else {}
                write_gains(folder, arm, {seed: 0.01 * number + 0.01 * seed}, **long)
    write_gradient(folder, clear=[10 + s for s in SLOPES], unclear=[s - 2 for s in SLOPES])
    rules = {"hard, 224 px, stride 16": {"border": {"auc": 0.84, "inverted_percent": 14.06}}}
    (folder / "orientation.json").write_text(json.dumps({"rules": rules}))
    grouped = [f"{arm}-0-048" for arm in page.COMPARED_ARMS.values()]
    for name in ("groups-untrained-0-000", *grouped, "redness-sample-0-000", "redness-sample-0-004"):
        write_sheet(pictures / f"{name}.png")


def write_sheet(path: Path, prompt: str = "a <b>fox</b>") -> None:
    save_sheet(path, torch.rand(6, 3, 1, 16, 16), [f"{prompt} {i}" for i in range(6)], {})


def row(table: Table, *start: str) -> tuple[str, ...]:
    """The first line whose cells begin with these words, as its main words."""
    return next(
        tuple(text for text, _ in line)
        for line in table.lines
        if tuple(text for text, _ in line)[: len(start)] == start
    )


def by_name(folder: Path) -> dict[str, Table]:
    return {table.name: table for table in tables.tables(results.read(folder))}


def test_every_arm_has_a_valid_recipe_with_its_changes() -> None:
    for name, arm in ARMS.items():
        recipe = recipe_of(arm, 1, 3, 4)
        assert (recipe.seed, recipe.training.iterations, recipe.evaluation.limit) == (1, 3, 4), name
    assert recipe_of(ARMS["vipo-clip-1e-4"], 0, 1, 1).optimizer.per_iteration == 4
    assert recipe_of(ARMS["stride-16"], 0, 1, 1).structuring.backbone_options == {"stride": 16, "resolution": 128}


def test_every_arm_is_in_a_table_and_no_table_has_another() -> None:
    ablated = [arm for arms in tables.ABLATIONS.values() for arm in arms]
    shown = {*tables.MAIN, *tables.SOURCES, *tables.CLIPPED, *tables.REDNESS, *tables.GROUPS, *tables.CLIPS, *ablated}
    shown |= {"untrained", "groups-untrained", "clips-untrained"}
    assert shown == set(ARMS)


def test_known_gains_become_known_rows(tmp_path: Path) -> None:
    write_untrained(tmp_path)
    write_gains(tmp_path, "sample", {0: 0.1, 1: 0.2, 2: 0.3})
    write_gains(tmp_path, "vipo", {0: 0.4, 1: 0.5, 2: 0.6})
    found = results.read(tmp_path)
    gained = results.gain(found, "vipo", "emoji_match", 24)
    assert gained is not None
    assert (gained.mean, gained.deviation) == (pytest.approx(0.5), pytest.approx(0.1))
    assert gained.range == (pytest.approx(0.4), pytest.approx(0.6))
    difference = results.paired(found, "vipo", "sample", "emoji_judge", 24)
    assert difference is not None
    assert difference.per_seed == pytest.approx({0: 0.3, 1: 0.3, 2: 0.3})
    assert (difference.low, difference.high) == (pytest.approx(0.3), pytest.approx(0.3))  # the wobbles are the same
    table = by_name(tmp_path)["main"]
    assert row(table, "vipo")[1:] == ("3 of 5", "emoji_match", "+0.250", "+0.150 [+0.150, +0.150]", "apart, above")
    texts = [line[0][0] for line in table.lines]
    assert texts.index("After 12 iterations") < texts.index("After 24 iterations")
    last = next(line for line in table.lines[texts.index("After 24 iterations") :] if line[0][0] == "vipo")
    assert last[3] == ("+0.500", "+0.400 to +0.600, SD 0.100")
    assert last[4] == ("+0.300 [+0.300, +0.300]", "+0.300, +0.300, +0.300")


def test_arms_that_are_missing_are_listed_and_nothing_is_invented(tmp_path: Path) -> None:
    write_gains(tmp_path, "vipo", {0: 0.4, 1: 0.5})
    write_gains(tmp_path, "sample", {1: 0.1, 2: 0.2})
    found = results.read(tmp_path)
    assert results.gain(found, "vipo", "emoji_match", 24) is None  # no untrained model to compare with
    difference = results.paired(found, "vipo", "sample", "emoji_match", 24)
    assert difference is not None and difference.per_seed == pytest.approx({1: 0.4})
    made = by_name(tmp_path)
    assert row(made["main"], "stride-16")[1:3] == ("0 of 3", "not trained yet")
    assert row(made["main"], "vipo")[1:] == ("2 of 5", "emoji_match", NONE, "+0.200 [+0.200, +0.200]", NONE)
    assert row(made["ablations"], "average")[2] == "not trained yet"
    assert row(made["clipping"], "sample-clip-1e-4")[1] == "0 of 5"
    assert made["agreement"].lines == made["orientation"].lines == ((("Not measured yet.", ""),),)
    assert "redness-sample 0 of 5" in made["collapse"].lines[0][0][0]
    assert made["collapse"].lines[1:] == ((("There is no redness that every run reached.", ""),),)


def test_the_interval_is_that_of_seeds_and_prompts_drawn_again() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(size=(3, 40)) + 0.2 * rng.normal(size=(3, 1))
    found = results.spread({k: torch.tensor(v) for k, v in enumerate(values)})
    assert found is not None
    draws = ((rng.integers(3, size=3), rng.integers(40, size=40)) for _ in range(5000))
    means = [values[seeds][:, prompts].mean() for seeds, prompts in draws]
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == (pytest.approx(low, abs=0.05), pytest.approx(high, abs=0.05))


def test_prompts_are_drawn_jointly_and_seeds_by_themselves() -> None:
    prompts = torch.linspace(-1, 1, 64, dtype=torch.double)
    alike = results.spread({0: prompts, 1: prompts, 2: prompts})
    alone = results.spread({0: prompts})
    assert alike is not None and alone is not None
    assert (alike.low, alike.high) == (pytest.approx(alone.low), pytest.approx(alone.high))
    flat = results.spread({seed: torch.full((64,), float(seed), dtype=torch.double) for seed in range(3)})
    assert flat is not None and (flat.low, flat.high) == (0.0, 2.0)  # one seed three times: 1 of 27 draws, above 2.5 %


def test_a_prompt_without_a_score_is_left_out() -> None:
    found = results.spread({0: torch.tensor([1.0, math.nan, 3.0]).double(), 1: torch.full((3,), math.nan).double()})
    assert found is not None and (found.mean, found.seeds) == (2.0, 1)
    assert 1.0 <= found.low <= found.high <= 3.0
    assert results.spread({0: torch.full((3,), math.nan).double()}) is None


@pytest.mark.parametrize(
    ("arm", "base", "other"),
    [
        ("vipo", "sample", "sample"),
        ("uniform-clip-1e-2", "vipo", "vipo-clip-1e-2"),
        ("vipo-rate-5e-4", "sample", "sample-rate-5e-4"),
        ("sample-rate-5e-4", "sample", "sample"),
        ("source-text", "vipo", "vipo"),
    ],
)
def test_an_arm_is_compared_with_its_twin(arm: str, base: str, other: str) -> None:
    assert tables.rival(arm, base) == other


def test_clipped_shares_are_means_over_iterations_and_seeds(tmp_path: Path) -> None:
    write_untrained(tmp_path)
    for arm, gain in (("sample-clip-1e-4", 0.1), ("vipo-clip-1e-4", 0.3)):
        write_gains(tmp_path, arm, {0: gain, 1: gain}, iterations=12)
    line = row(by_name(tmp_path)["clipping"], "vipo-clip-1e-4")
    assert line[1:5] == ("2 of 5", "0.0750", "+0.300", "+0.200 [+0.200, +0.200]")


def test_structure_is_read_at_equal_redness(tmp_path: Path) -> None:
    """Scalar GRPO gains 0.25 in a quarter of its first step; ViPO overshoots and falls back: its first pass counts."""
    write_redness(tmp_path, "redness-sample", 0, [0.0, 1.0, 2.0], [1.0, 0.6, 0.2])
    write_redness(tmp_path, "redness-vipo", 0, [0.0, 2.0, 1.0], [1.0, 0.8, 0.1])
    found = results.read(tmp_path)
    quarter, whole = results.levels(found, PAIR, (0.25, 1.0))
    assert (quarter.gain, whole.gain) == (pytest.approx(0.25), pytest.approx(1.0))

    def mean(level: results.Level, arm: str) -> float:
        return float(level.measures[arm]["edges_kept"][0].mean())

    assert mean(quarter, "redness-sample") == pytest.approx(0.9)
    assert mean(quarter, "redness-vipo") == pytest.approx(0.975)
    assert (mean(whole, "redness-sample"), mean(whole, "redness-vipo")) == (pytest.approx(0.6), pytest.approx(0.9))
    kept = [line for line in by_name(tmp_path)["collapse"].lines if line[0][0] == "edges_kept"][-1]
    assert [text for text, _ in kept[1:]] == ["0.600", "0.900", "+0.300 [+0.300, +0.300]"]


def test_the_last_level_is_the_smallest_final_gain_of_all_seeds(tmp_path: Path) -> None:
    write_redness(tmp_path, "redness-sample", 0, [0.0, 2.0], [1.0, 0.5])
    write_redness(tmp_path, "redness-vipo", 0, [0.0, 3.0], [1.0, 0.5])
    assert results.levels(results.read(tmp_path), PAIR, (1.0,))[0].gain == pytest.approx(2.0)
    write_redness(tmp_path, "redness-vipo", 1, [0.0, 0.5], [1.0, 0.5])
    assert results.levels(results.read(tmp_path), PAIR, (1.0,))[0].gain == pytest.approx(0.5)
    write_redness(tmp_path, "redness-vipo", 2, [0.0, -0.5], [1.0, 0.5])
    assert results.levels(results.read(tmp_path), PAIR, (1.0,)) == []


def test_signals_are_mean_over_deviation_and_paired_with_scalar(tmp_path: Path) -> None:
    other = [*SLOPES[3:], 5.0, 1.0, 0.0]
    write_gradient(tmp_path, twice=[2 * s for s in SLOPES], down=[-s for s in SLOPES], other=other)
    gradient = results.read(tmp_path).gradient
    assert gradient is not None
    found = results.signals(gradient)
    assert found[results.SCALAR].ratio_to_noise == pytest.approx(np.mean(SLOPES) / np.std(SLOPES, ddof=1))
    assert found["twice"].ratio_to_noise == pytest.approx(found[results.SCALAR].ratio_to_noise)  # its scale cancels
    assert (found["twice"].relative_low, found["twice"].relative_high) == (pytest.approx(1.0), pytest.approx(1.0))
    assert found["down"].relative == pytest.approx(-1.0)
    assert found["other"].relative_low < found["other"].relative < found["other"].relative_high
    assert row(by_name(tmp_path)["agreement"], "down")[-1] == NONE


def effect(low: float, high: float, seeds: int = 3) -> results.Spread:
    return results.Spread((low + high) / 2, dict.fromkeys(range(seeds), 0.0), low, high)


@pytest.mark.parametrize(
    ("found", "above", "verdict"),
    [
        (effect(0.1, 0.2), True, "holds"),
        (effect(0.1, 0.2), False, "does not hold"),
        (effect(-0.2, -0.1), True, "does not hold"),
        (effect(-0.2, -0.1), False, "holds"),
        (effect(-0.1, 0.2), True, "cannot be told apart"),
        (effect(0.0, 0.2), True, "cannot be told apart"),
        (effect(0.1, 0.2, seeds=1), True, "cannot be told apart"),
        (None, True, "not measured yet"),
    ],
)
def test_the_interval_decides(found: results.Spread | None, above: bool, verdict: str) -> None:
    assert verdicts.Part("it", found, above).verdict == verdict


def test_a_claim_is_as_good_as_its_worst_part() -> None:
    good, bad, unclear = (verdicts.Part("it", effect(*sides)) for sides in ((1, 2), (-2, -1), (-1, 1)))
    assert verdicts.Claim("x", "", (good, good)).verdict == "holds"
    assert verdicts.Claim("x", "", (good, unclear)).verdict == "cannot be told apart"
    assert verdicts.Claim("x", "", (good, unclear, bad)).verdict == "does not hold"
    assert verdicts.Claim("x", "", (good, verdicts.Part("it", None))).verdict == "not measured yet"


def test_claims_read_the_right_arms(tmp_path: Path) -> None:
    write_untrained(tmp_path)
    gains = {
        "sample": 0.2,
        "vipo": 0.3,
        "source-deviation-perceptual": 0.4,
        "sample-rate-1e-3": 0.1,
        "source-deviation-perceptual-rate-1e-3": 0.5,
        "average": 0.4,
        "reward-map": 0.1,
        "sample-clip-1e-4": 0.2,
        "vipo-clip-1e-4": 0.1,
        "detached-clip-1e-4": 0.2,
    }
    long = ("sample", "vipo", "source-deviation-perceptual")
    grouped = {
        "sample-1e-3": 0.2,
        "consensus-1e-3": 0.4,
        "flaw-map-1e-3": 0.1,
        "quickstart-clean": 0.3,
        "sample-clean": 0.3,
        "noise": 0.4,
        "sample-own-noises": 0.1,
        "consensus-own-noises": 0.3,
        "sample-cosine": 0.2,
        "consensus-cosine": 0.4,
    }
    for arm, gain in grouped.items():
        done = 16 if arm.endswith("1e-3") else 48
        write_gains(tmp_path, f"groups-{arm}", dict.fromkeys(range(3), gain), iterations=done)
    on_clips = {"sample": 0.2, "vipo": 0.4, "deviation": 0.3, "consensus": 0.1}
    for arm, gain in {**on_clips, "sample-rate-2e-3": 0.25, "deviation-rate-2e-3": 0.35}.items():
        write_gains(tmp_path, f"clips-{arm}", dict.fromkeys(range(3), gain), iterations=16)
    for arm, gain in {**gains, "uniform-clip-1e-4": 0.1, "sample-clip-1e-2": 0.2, "uniform-clip-1e-2": 0.1}.items():
        write_gains(tmp_path, arm, dict.fromkeys(range(3), gain), iterations=24 if arm in long else 12)
    for seed in range(3):
        write_redness(tmp_path, "redness-sample", seed, [0.0, 1.0], [1.0, 0.2])
        write_redness(tmp_path, "redness-vipo", seed, [0.0, 1.0], [1.0, 0.7])
    found = {claim.letter: claim for claim in verdicts.claims(results.read(tmp_path))}
    verdict = {letter: claim.verdict for letter, claim in found.items()}
    assert verdict == {
        "a": "holds",
        "b": "does not hold",
        "c": "holds",
        "d": "holds",
        "e": "does not hold",
        "f": "holds",
        "g": "holds",
        "h": "holds",
        "i": "not measured yet",  # its arms end after 16 iterations
        "j": "not measured yet",
        "k": "holds",
        "l": "cannot be told apart",
        "m": "does not hold",
        "n": "holds",
        "o": "holds",
        "p": "holds",
        "q": "not measured yet",
        "r": "not measured yet",  # its arms were evaluated at the end alone
    }
    assert [part.verdict for part in found["b"].parts] == ["holds", "holds", "does not hold", "does not hold"]
    assert [part.verdict for part in found["q"].parts] == ["holds", "not measured yet"]
    assert [part.verdict for part in found["r"].parts] == ["not measured yet", "holds"]
    assert found["a"].parts[0].effect is not None and found["e"].parts[0].effect is not None
    assert found["a"].parts[0].effect.mean == pytest.approx(0.3 - 0.2)
    assert found["e"].parts[0].effect.mean == pytest.approx(0.15 - 0.4)  # vipo at 12 iterations: the arm has no more
    assert "12 iterations" in found["e"].parts[0].what and "24 iterations" in found["a"].parts[0].what
    assert page.summary(list(found.values())) == "The paper makes 7 claims: 5 hold, 2 do not hold."


def test_markdown_keeps_everything_outside_the_markers() -> None:
    table = Table("main", "Title", "A note. ", ("Arm", "Gain"), ((("Group", ""),), (("a|b", "k=1"), ("+0.1", ""))))
    text = "# Mine\n\n<!-- table main -->\nold\n<!-- end -->\n\nprose <!-- a remark -->\n"
    made = page.filled(text, [table])
    written = "| Arm | Gain |\n| --- | --- |\n| **Group** |  |\n| a\\|b<br>k=1 | +0.1 |\n\nA note.\n"
    assert made == f"# Mine\n\n<!-- table main -->\n\n{written}\n<!-- end -->\n\nprose <!-- a remark -->\n"
    assert page.filled(made, [table]) == made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table nothing -->\n<!-- end -->", "table 'nothing', which does not exist; tables are main"),
        ("<!-- table main -->\nfor ever", "1 lines .* of which 0 are followed"),
        ("<!-- table main -->\n<!-- table main -->\n<!-- end -->", "before the next"),
        ("only prose", "0 lines .* write at least one"),
    ],
)
def test_markers_that_cannot_be_filled_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        page.filled(text, [Table("main", "", "", ("Arm",), ())])


def test_a_finished_experiment_becomes_a_page_that_stands_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pictures, html, prose = (tmp_path / name for name in ("results", "pictures", "out.html", "results.md"))
    folder.mkdir()
    write_everything(folder, pictures)
    prose.write_text("mine\n<!-- table collapse -->\n<!-- end -->\n")
    page.publish(folder, pictures, html, prose)
    text = html.read_text()
    assert len(text) < 1_500_000 and "<script" not in text
    assert "shows no pictures of redness-vipo, redness-deviation: give --pictures" in capsys.readouterr().out
    assert not re.search(r'(src|href)="(?!data:|#|https://arxiv\.org)', text)
    assert text.count("data:image/webp;base64,") == 6 * 5 + page.STRIP_ROWS * 2
    assert "a &lt;b&gt;fox&lt;/b&gt; 0" in text and "<b>fox" not in text
    assert "not trained yet" not in text and "not measured yet" not in text.lower()
    assert prose.read_text().startswith("mine\n") and "edges_kept" in prose.read_text()
    found = results.read(folder)
    check_cells(found)
    assert [len(panels(found)) for panels in PANELS] == [3, len(tables.STRUCTURE), 2]
    assert [mark.name for mark in plots.forest(found)] == ["clear", results.SCALAR, "unclear"]


def test_a_page_made_again_without_pictures_keeps_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, pictures, html = (tmp_path / name for name in ("results", "pictures", "out.html"))
    folder.mkdir()
    write_everything(folder, pictures)
    page.publish(folder, pictures, html, None)
    first = html.read_text()
    write_gains(folder, "sample", {0: 0.777})
    page.publish(folder, None, html, None)
    again = html.read_text()
    assert re.findall('data:image/webp[^"]*', again) == re.findall('data:image/webp[^"]*', first)
    assert again.count("<figure><div") == first.count("<figure><div") > 0
    assert again != first and "keeps the pictures that it had" in capsys.readouterr().out
    page.publish(folder, None, tmp_path / "new.html", None)
    assert "<img" not in (tmp_path / "new.html").read_text()
    assert "shows no pictures of groups-untrained" in capsys.readouterr().out


def check_cells(found: results.Results) -> None:
    for table in [*tables.tables(found), verdicts.claims_table(verdicts.claims(found))]:
        assert {len(line) for line in table.lines} <= {1, len(table.columns)}, table.name


PANELS: tuple[Callable[[results.Results], list[Any]], ...] = (
    plots.gain_panels,
    plots.structure_panels,
    plots.clipping_panels,
)


def test_nothing_trained_yet_is_a_page_too(tmp_path: Path) -> None:
    check_cells(results.read(tmp_path))
    text = page.render(results.read(tmp_path), None)
    assert "7 not measured yet" in text and "0 of " in text
    assert all(not panels(results.read(tmp_path)) for panels in PANELS)


def test_arms_share_the_pool_of_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = [run.Job("vipo", seed, tmp_path / "results" / f"vipo-{seed}.json") for seed in range(3)]
    made = run.task(waiting[0], SETTING, 3, tmp_path)
    assert made.environment["OMP_NUM_THREADS"] == "3" and made.command[2:4] == ["vipo", "0"]

    def task(job: run.Job, *_: object) -> run.Task:
        return run.Task(
            job.name, ["sh", "-c", f"echo $TOLD; exit {job.seed % 2}"], job.result.with_suffix(".log"), {"TOLD": "told"}
        )

    monkeypatch.setattr(run, "task", task)
    assert run.work(waiting, SETTING, 3, 1, tmp_path) == 1
    said = capsys.readouterr().out
    assert said.count(": done, ") == 2 and "vipo seed 1: FAILED, see" in said and "[3/3]" in said
    assert (tmp_path / "results" / "vipo-1.log").read_text() == "told\n"


def test_bands_reach_from_the_smallest_to_the_largest_seed(tmp_path: Path) -> None:
    write_untrained(tmp_path)
    write_gains(tmp_path, "vipo", {0: 0.2, 1: 0.4})
    found = plots._gain_curve(results.read(tmp_path), "vipo", "s0", "emoji_match")
    assert found is not None and found.name == "vipo (2 seeds)"
    assert found.x == [0.0, 12.0, 24.0]
    assert (found.low, found.high) == (pytest.approx([0, 0.1, 0.2]), pytest.approx([0, 0.2, 0.4]))


def test_forests_share_one_scale_with_the_rule_on_it() -> None:
    rows = {"left": (-1.0, 0.0, 1.0), "right": (2.0, 2.5, 3.0)}
    made = plots.marks(rows, 0.0, {"left": "0", "right": "2.5"})
    rules, dots = (re.findall(pattern, "".join(mark.svg for mark in made)) for pattern in (ZERO, DOT))
    assert rules == ["78.0", "78.0"] and dots == ["78.0", "258.0"]  # -1 to 3 on 6 to 294 pixels


def test_differences_are_from_the_twin_and_where_training_ended(tmp_path: Path) -> None:
    write_untrained(tmp_path)
    write_gains(tmp_path, "vipo", {0: 0.4, 1: 0.4})
    write_gains(tmp_path, "average", {0: 0.1, 1: 0.1}, iterations=12)
    write_gains(tmp_path, "uniform-clip-1e-4", {0: 0.1}, iterations=12)  # its twin is not trained
    found = plots.differences(results.read(tmp_path), ["average", "first", "uniform-clip-1e-4"], "vipo")
    assert [(mark.name, mark.text) for mark in found] == [("average, 12 iterations, 2 seeds", "\N{MINUS SIGN}0.100")]


ZERO, DOT = r'class="zero" x1="([\d.]+)"', r'circle cx="([\d.]+)"'


def test_sources_beside_the_methods_are_those_that_rose_most(tmp_path: Path) -> None:
    write_untrained(tmp_path)
    for arm, gain in (("vipo", 0.3), ("source-text", 0.2), ("source-gradient", 0.4), ("source-deviation", 0.1)):
        write_gains(tmp_path, arm, {0: gain})
    write_gains(tmp_path, "source-disagreement", {0: 0.9}, iterations=12)  # not trained as long
    assert plots.best_sources(results.read(tmp_path)) == ["source-gradient", "source-text"]


def test_pictures_are_those_of_the_last_shared_iteration_of_the_first_seed(tmp_path: Path) -> None:
    first, *others = page.COMPARED_ARMS.values()
    for name in ("groups-untrained-0-000", f"{first}-0-024", f"{first}-0-048", f"{others[0]}-1-048"):
        write_sheet(tmp_path / f"{name}.png")
    assert page.compared(tmp_path) is None
    for arm in others:
        write_sheet(tmp_path / f"{arm}-0-024.png")
    found = page.compared(tmp_path)
    assert found is not None and found.title == "After 24 iterations" and len(found.rows) == 6
    assert found.columns == ("untrained", *page.COMPARED_ARMS)
    assert sorted(page.sheets_of(tmp_path, first)) == [24, 48]
    write_sheet(tmp_path / f"{first}-0-024.png", "another")
    with pytest.raises(UserError, match="are of different prompts"):
        page.compared(tmp_path)


EMPTY = {"arm": "vipo", "seed": 0, "evaluations": {}, "training": {}, "seconds": 1}
EMPTY |= {"recipe": "quickstart.yaml", "overrides": []}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("vipo-0", "{", "is not JSON"),
        ("vipo-0", "{}", "is not the result of an arm"),
        ("odd-0", json.dumps(EMPTY | {"arm": "odd"}), "matrix.py does not"),
        ("vipo-0", json.dumps(EMPTY | {"overrides": 3}), "is not the result of an arm"),
        ("gradient", "[", "is not JSON"),
    ],
)
def test_files_that_are_no_results_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(UserError, match=f"{name}.json.*{message}"):
        results.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": "average"}, "structuring.aggregation was the recipe's and is average; delete it and train it again"),
        ({"arm": "vipo-rate-1e-3"}, "optimizer.learning_rate was 2e-3 and is 1e-3;.*--only vipo-rate-1e-3"),
        ({"overrides": (*ARMS["vipo"].overrides, "credit=sample")}, "credit was sample and is the recipe's; delete"),
        ({"recipe": "redness.yaml"}, "recipe was redness.yaml and is quickstart.yaml; delete"),
        (
            {"overrides": (*ARMS["vipo"].overrides, "rewards={emoji_clean: 1.0}")},
            r"rewards was \{emoji_clean: 1.0\} and",
        ),
    ],
)
def test_a_result_that_was_trained_otherwise_than_its_arm_says_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "it.json").write_text(json.dumps(EMPTY | {"overrides": ARMS["vipo"].overrides} | changes))
    with pytest.raises(UserError, match=f"it.json' was trained otherwise than matrix.py says of .* now: {message}"):
        results.read(tmp_path)


def test_what_is_published_was_trained_as_the_arms_say_and_a_later_pin_of_what_the_recipe_said_is_none() -> None:
    found = results.read(Path(results.__file__).parent / "results")
    assert {"vipo", "groups-sample-1e-3"} <= found.arms.keys()


def test_arms_of_other_prompts_and_missing_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        results.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="does not exist; write it, with"):
        page.publish(tmp_path, None, None, tmp_path / "none.md")
    write_untrained(tmp_path)
    write(tmp_path, "vipo", 0, {12: {"emoji_match": [0.1, 0.2]}})
    with pytest.raises(UserError, match=r"2 prompts \(vipo-0\), 12 prompts \(untrained-0\)"):
        results.read(tmp_path)


def test_seeds_of_an_arm_count_up_to_what_all_of_them_have(tmp_path: Path) -> None:
    write_gains(tmp_path, "vipo", {0: 0.1}, iterations=24)
    write_gains(tmp_path, "vipo", {1: 0.1}, iterations=12)
    assert results.read(tmp_path).iterations("vipo") == [12]
    assert SETTING.seeds == results.planned_seeds("source-deviation") < results.planned_seeds("vipo")


def test_the_pictures_to_a_level_are_read_off_the_curve(tmp_path: Path) -> None:
    write_untrained(tmp_path)
    base = "groups-sample-1e-3"
    write_gains(tmp_path, base, {0: 0.1, 1: 0.1})
    write_gains(tmp_path, "groups-consensus-1e-3", {0: 0.2, 1: 0.2, 2: 9.0})  # it is linear, so half of the iterations
    write_gains(tmp_path, "groups-noise", {0: -0.1, 1: 0.0})
    found = results.read(tmp_path)
    faster = results.reach(found, "groups-consensus-1e-3", base, "emoji_match")
    assert faster is not None and faster.seeds == 2  # the third has no twin
    assert faster.times == pytest.approx(2, abs=0.01) and 1.8 < faster.low <= faster.high < 2.3
    never = results.reach(found, "groups-noise", base, "emoji_match")
    assert never is not None and never.times == never.high == 0
    assert results.reach(found, "groups-shuffled", base, "emoji_match") is None


def test_a_level_is_what_the_other_arm_had_gained_then_in_the_same_draw_of_seeds(tmp_path: Path) -> None:
    """The other gains 0.1 by half time and 0.2 in the end; the arm twice each seed's, which differ a lot."""
    write_untrained(tmp_path)
    base, arm, gains = "groups-sample-1e-3", "groups-consensus-1e-3", {0: 0.02, 1: 0.2, 2: 0.38}
    for name, times in ((base, 1.0), (arm, 2.0)):
        for seed, gain in gains.items():
            at = {k: {"emoji_match": START + times * gain * k / 24} for k in (12, 24)}
            write(tmp_path, name, seed, at)
    found = results.read(tmp_path)
    for after in (12, 24):
        reached = results.reach(found, arm, base, "emoji_match", after)
        assert reached is not None  # of each draw's own level it always takes half, whichever seeds are drawn
        assert (reached.times, reached.low, reached.high) == pytest.approx((2.0, 2.0, 2.0))
    half = results.reach(found, base, base, "emoji_match", 12)
    assert half is not None and half.times == pytest.approx(1.0)


def test_coverage_is_measured_on_data_of_the_variances_that_it_finds() -> None:
    wanted = torch.tensor([0.4, 0.3, 0.2], dtype=torch.double)
    found = torch.stack([coverage.variances(coverage.made(wanted, 40, number)) for number in range(40)]).mean(0)
    assert torch.allclose(found, wanted.float(), rtol=0.1)
    only_seeds = coverage.covered(torch.tensor([1.0, 1e-6, 1e-6], dtype=torch.double), 3, 100)
    assert only_seeds["t"][0] > 0.9 > 0.85 > only_seeds["now"][0]  # three draws say little of their own spread
    assert only_seeds["now"][1] < only_seeds["stretched"][1] < only_seeds["t"][1]
