"""The folder of an evaluation: killed and resumed it holds the same bytes, and it takes no other evaluation in."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import gloo
from vipo.errors import UserError
from vipo.evaluation.evaluator import Evaluator
from vipo.evaluation.folder import EvaluationFolder, _csv
from vipo.evaluation.records import Evaluation
from vipo.media.sheets import load_sheet
from vipo.rewards.answer import RewardUnavailable
from vipo.rewards.suite import RewardSuite
from vipo.types import Prompt, Scores

pytestmark = pytest.mark.on_cpu

PROMPTS = [Prompt(f"prompt, number {k}", k, {"tag": k % 3}) for k in range(20)]
SETTINGS: dict[str, Any] = {"model": "here", "lora": None, "weights": "abc", "rewards": {"red": {}}, "steps": 3}
GAIN = {"base": 0.0, "policy": 0.125}


class Killed(Exception):  # noqa: N818
    """As if the process had been killed."""


class Models:
    """Samples grey pictures by number, brighter under the policy; dies at the prompt ``dies_at``. Scores them too."""

    samples_per_prompt = 2

    def __init__(self, dies_at: int = 10_000) -> None:
        self.present, self.dies_at, self.sampled = "base", dies_at, 0
        self.models = {name: self._switch(name) for name in GAIN}

    def _switch(self, name: str) -> Any:
        def switch() -> Any:
            self.present = name
            return nullcontext()

        return switch

    def __call__(self, prompts: Sequence[Prompt], first: int = 0) -> Any:
        if first + len(prompts) > self.dies_at and self.present == "policy":
            raise Killed
        self.sampled += len(prompts)
        grey = torch.arange(2 * first, 2 * (first + len(prompts))) / 64 + GAIN[self.present]
        media = grey[:, None, None, None, None].expand(-1, 3, 1, 4, 6).contiguous()
        return SimpleNamespace(media=media, prompts=tuple(prompt for prompt in prompts for _ in range(2)))

    def score(self, media: Tensor, _prompts: Sequence[Prompt]) -> Scores:
        grey = media[:, 0, 0, 0, 0]
        red = grey.masked_fill((grey - GAIN[self.present]) * 64 == 7, torch.nan)
        failures = {"red": "no luck"} if bool(red.isnan().any()) else {}
        return Scores({"red": red, "grey": grey}, {}, failures)


def run(root: Path, models: Models, **options: Any) -> Evaluation:
    folder = EvaluationFolder(root, SETTINGS, **options)
    evaluate = Evaluator(models.models, models, models.score, prompts_at_once=3)
    evaluation = evaluate(PROMPTS, keeper=folder)
    folder.finish(evaluation)
    return evaluation


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation, to be looked at only."""
    root = tmp_path_factory.mktemp("evaluation") / "whole"
    run(root, Models(), pictures=True)
    return root


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """The same, to do things to."""
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_a_killed_evaluation_resumes_to_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "killed", Models(dies_at=11), pictures=True)
    done = sorted(part.name for part in (tmp_path / "killed" / "parts").iterdir())
    assert done == ["000000", "000003", "000006"] and not (tmp_path / "killed" / "evaluation.json").exists()
    rest = Models()
    run(tmp_path / "killed", rest, pictures=True, resume=True)
    assert rest.sampled == 2 * (20 - 9)  # the prompts that were not done, for two models
    assert contents(tmp_path / "killed") == contents(whole)


def test_a_finished_evaluation_is_read_not_sampled_again(whole: Path, copied: Path) -> None:
    again = Models()
    evaluation = run(copied, again, resume=True)
    assert again.sampled == 0 and contents(copied) == contents(whole)
    assert torch.equal(evaluation.scores["policy"]["grey"], torch.arange(40) / 64 + 0.125)


def test_pictures_that_are_asked_for_later_are_all_there(whole: Path, tmp_path: Path) -> None:
    """Parts that were kept without are done again, as no picture of them is anywhere."""
    with pytest.raises(Killed):
        run(tmp_path / "run", Models(dies_at=11))
    run(tmp_path / "run", Models(), pictures=True, resume=True)
    assert contents(tmp_path / "run") == contents(whole)
    (tmp_path / "run" / "pictures" / "base" / "00004-1.png").unlink()
    again = Models()
    run(tmp_path / "run", again, pictures=True, resume=True)
    assert again.sampled == 6 and contents(tmp_path / "run") == contents(whole)


def test_everything_is_in_the_files(whole: Path) -> None:
    found = json.loads((whole / "evaluation.json").read_text())
    assert found["scores"]["base"]["red"][3] == [6 / 64, None] and found["prompts"][4]["metadata"] == {"tag": 1}
    assert found["settings"]["weights"] == "abc" and "torch" in found["environment"]["packages"]
    assert found["failures"] == [
        f"{model}: red has no score for 1 of 6 samples from prompt 3 on: no luck" for model in GAIN
    ]
    with (whole / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 80 and rows[7] == {
        "model": "base", "prompt_index": "3", "prompt": "prompt, number 3", "sample": "1",
        "red": "", "grey": str(7 / 64)
    }  # fmt: skip
    with (whole / "summary.csv").open(newline="") as file:
        summary = {(row["reward"], row["model"]): row for row in csv.DictReader(file)}
    assert summary["red", "policy"]["scored"] == "39" and summary["red", "policy"]["samples"] == "40"
    assert float(summary["grey", "policy"]["gain_mean"]) == 0.125 and summary["grey", "base"]["gain_mean"] == ""
    assert len(list((whole / "pictures" / "base").glob("*.png"))) == 40
    with Image.open(whole / "pictures" / "policy" / "00002-1.png") as picture:
        assert picture.size == (6, 4) and picture.getpixel((0, 0)) == (round(255 * (5 / 64 + 0.125)),) * 3


def test_sheets_show_the_first_sample_of_the_first_prompts(whole: Path) -> None:
    for model, gain in GAIN.items():
        named = json.loads((whole / f"sheet-{model}.json").read_text())
        assert named["prompts"] == [prompt.text for prompt in PROMPTS[:16]]
        assert named["scores"]["grey"] == [2 * k / 64 + gain for k in range(16)]
        tiles, _ = load_sheet(whole / f"sheet-{model}.png")
        assert len(tiles) == 16 and tiles[9].size == (6, 4)
        assert tiles[9].getpixel((0, 0))[0] == round(255 * (2 * 9 / 64 + gain))
    with Image.open(whole / "before-after.png") as shown:
        assert shown.width > 2 * 6 and shown.height > 16 * 4


@pytest.mark.parametrize("key", ["weights", "rewards", "steps"])
def test_another_evaluation_in_the_same_folder_is_refused(copied: Path, key: str) -> None:
    with pytest.raises(UserError, match=f"its {key} differ") as raised:
        EvaluationFolder(copied, {**SETTINGS, key: "other"}, resume=True)
    assert "--output" in str(raised.value) and "\n" not in str(raised.value)


def test_another_version_of_a_library_is_another_evaluation(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vipo.evaluation.folder.environment", lambda: {"packages": {"torch": "1.0"}})
    with pytest.raises(UserError, match="its packages differ"):
        EvaluationFolder(copied, SETTINGS, resume=True)


def test_the_same_model_under_another_path_goes_on(copied: Path) -> None:
    assert EvaluationFolder(copied, {**SETTINGS, "model": "./here"}, resume=True).settings["model"] == "here"


def test_without_resume_an_evaluation_is_not_touched(copied: Path) -> None:
    with pytest.raises(UserError, match="already holds an evaluation; add --resume"):
        EvaluationFolder(copied, SETTINGS)


def test_what_failed_before_its_first_part_can_be_begun_again(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, Models(dies_at=1))
    assert not list(tmp_path.iterdir())
    run(tmp_path, Models())


def test_a_table_gives_back_every_cell_it_was_given() -> None:
    rows = [["a", "b"], *([f"x{odd}y", 'say "cat"'] for odd in ("\r", "\n", "\r\n", ",", "\u2028", "\x85", "\x0b"))]
    table = _csv(rows)
    assert list(csv.reader(io.StringIO(table, newline=""))) == rows
    assert table.startswith('a,b\n"x')  # a newline alone after each row


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        EvaluationFolder(tmp_path / "taken", SETTINGS)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json' cannot be read"):
        EvaluationFolder(tmp_path, SETTINGS, resume=True)


def some_of(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return torch.tensor([torch.nan if "blank" in prompt.text else 1.0 for prompt in prompts]) + media.mean() * 0


def evaluation_scorer(**reward: Any) -> RewardSuite:
    return RewardSuite(reward, dict.fromkeys(reward, 1.0), trains=False, must_reach=True, retries=0)


def test_holes_are_left_even_where_a_whole_part_has_no_score() -> None:
    media, prompts = torch.zeros(2, 3, 1, 4, 4), [Prompt("blank"), Prompt("a cat")]
    scores = evaluation_scorer(some=some_of)(media, prompts)
    assert scores.by_name["some"].isnan().tolist() == [True, False]
    assert scores.failures == {"some": "the score was not finite"}
    assert evaluation_scorer(some=some_of)(media, prompts[:1] * 2).by_name["some"].isnan().all()


def away(_media: Tensor, _prompts: Sequence[Prompt]) -> Tensor:
    raise RewardUnavailable("nobody listens on port 9")


def test_a_reward_that_cannot_be_reached_stops_the_evaluation() -> None:
    with pytest.raises(UserError, match=r"'away' cannot be reached \(nobody listens on port 9\); bring it back"):
        evaluation_scorer(away=away)(torch.zeros(1, 3, 1, 4, 4), [Prompt("a cat")])


@pytest.mark.long
def test_two_processes_fill_one_folder_with_what_one_would(model_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {k}" for k in range(5)))
    plain = [str(model_folder), "--size", "32", "--steps", "1", "--rewards", "redness", "--prompts", str(prompts)]
    command = ["evaluate", *plain, "--batch", "2", "--pictures", "--json", "--output"]

    def told(processes: int, *words: str | Path) -> str:
        first, *others = gloo.vipo(*command, *words, processes=processes)
        assert first.code == 0 and all(other.code == 0 and not other.stdout for other in others), first.stderr[-3000:]
        return first.stdout

    both, alone = tmp_path / "both", tmp_path / "alone"
    by_both = told(2, both)
    assert json.loads(by_both) == json.loads(told(1, alone))  # one process speaks
    assert contents(both) == contents(alone) and len(list((both / "parts").iterdir())) == 5
    shutil.rmtree(both / "parts" / "000001")
    shutil.rmtree(both / "parts" / "000004")
    assert told(2, both, "--resume") == by_both and contents(both) == contents(alone)
