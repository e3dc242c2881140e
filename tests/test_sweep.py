"""Sweeps: which runs, what is skipped, what fails; and what comparing over seeds says."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from terminal import Vipo, assert_refused
from vipo.connections import BoundedServer
from vipo.errors import UserError
from vipo.recipe import parse_recipe
from vipo.report.compare import comparable, group_table, verdict_words
from vipo.report.groups import groups, labels
from vipo.report.run import read_run
from vipo.report.watch import watching
from vipo.runs.combinations import Combination, combinations
from vipo.runs.pool import Pool
from vipo.runs.sweep import Sweep, state_of


def names(*given: str) -> list[str]:
    return [one.name for one in combinations("quickstart", given)]


def test_every_combination_is_named_by_the_keys_that_differ() -> None:
    assert names("credit=sample,advantage_map", "training.iterations=3", "seed=0..1") == [
        "credit=sample,seed=0",
        "credit=sample,seed=1",
        "credit=advantage_map,seed=0",
        "credit=advantage_map,seed=1",
    ]
    assert names("optimizer.learning_rate=5e-4,1e-3") == ["learning_rate=5e-4", "learning_rate=1e-3"]
    assert names("seed=1..2,7") == ["seed=1", "seed=2", "seed=7"] and names("seed=3") == ["run"]
    whole = combinations("quickstart", ["structuring.sources=[perceptual,deviation],[perceptual]"])
    assert [one.recipe.structuring.sources for one in whole] == [("perceptual", "deviation"), ("perceptual",)]
    assert len({one.name for one in whole}) == 2 and all(set(one.name).isdisjoint("[]/ ") for one in whole)
    assert [one.recipe.name for one in combinations("quickstart", ["seed=0,1"])] == ["seed=0", "seed=1"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["seed"], "not of the form"),
        (["seed=0..99999999"], "at most 1000"),
        (["seed=5..1"], "count up"),
        (["seed=0..99", "prompts.group_size=2..99"], "more than the 1000"),
        (["seed=1,1"], "twice"),
        (["seed=1,,2"], "none between two commas"),
        (["seed=1", "seed=2"], "stands once"),
        (["credit=sample,everything"], "everything"),
    ],
)
def test_a_slip_is_told_before_anything_runs(given: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        combinations("quickstart", given)


def run_of(folder: Path, source: Path, gains: list[float], copies: int = 1, **changes: Any) -> Path:
    """A run's folder with the evaluations moved by so much, at as many iterations, each prompt there so many times."""
    shutil.copytree(source, folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **changes}))
    first = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[0])
    first.pop("sha256", None)
    first |= {"prompts": first["prompts"] * copies, "values": {n: row * copies for n, row in first["values"].items()}}
    records = [
        {**first, "iteration": k, "values": {name: [v + gain for v in row] for name, row in first["values"].items()}}
        for k, gain in enumerate(gains)
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def six(tmp_path: Path, finished: Path) -> list[Path]:
    """Two credits, three seeds each; the second credit is twice as fast."""
    made = []
    for credit, speed in (("sample", 1.0), ("uniform", 2.0)):
        for seed in range(3):
            gains = [0.0, 0.1 * speed, 0.2 * speed + 0.01 * seed]
            folder = tmp_path / f"{credit}-{seed}"
            made.append(run_of(folder, finished, gains, credit=credit, seed=seed, name=folder.name))
    return made


def test_seeds_are_one_group_and_runs_are_named_by_what_differs(six: list[Path]) -> None:
    runs = [read_run(folder) for folder in six]
    assert labels(runs) == ["credit=sample"] * 3 + ["credit=uniform"] * 3
    scalar, other = groups(comparable(six))
    assert scalar.seeds == other.seeds == (0, 1, 2) and scalar.label == "credit=sample"
    a, b = scalar.scores["redness"], other.scores["redness"]
    assert (a.high - a.low, b.mean - a.mean) == pytest.approx((0.02, 0.2))
    assert b.difference is not None and b.difference.mean == pytest.approx(0.2) and a.difference is None
    assert b.by_seed == pytest.approx({0: 0.2, 1: 0.2, 2: 0.2})


def test_a_verdict_on_groups_is_over_seeds(tmp_path: Path, finished: Path) -> None:
    """One seed much better and two a little worse: every prompt says better, the seeds do not."""
    made, ends = [], {"sample": (0.0, 0.0, 0.0), "uniform": (0.9, -0.1, -0.2), "advantage_map": (0.3, 0.31, 0.29)}
    for credit in ends:
        for seed, end in enumerate(ends[credit]):
            folder = tmp_path / f"{credit}-{seed}"
            made.append(run_of(folder, finished, [0.0, end], copies=4, credit=credit, seed=seed, name=folder.name))
    _, uneven, even = found = groups(comparable(made))
    scores = [group.scores["redness"] for group in (uneven, even)]
    assert [verdict_words(score) for score in scores] == ["within noise", "better over seeds"]
    assert scores[0].difference is not None and scores[0].difference.mean == pytest.approx(0.2)
    assert "better over seeds" in group_table(found)
    _, pair = groups(comparable([made[0], made[6]]))
    assert verdict_words(pair.scores["redness"]) == "better in these runs"  # one seed says no more


def test_pictures_to_the_yardsticks_level_by_hand(six: list[Path]) -> None:
    scalar, other = groups(comparable(six))
    recipe = read_run(six[0]).recipe["prompts"]
    each = recipe["per_iteration"] * recipe["group_size"]
    fast, slow = other.scores["redness"].reach, scalar.scores["redness"].reach
    assert fast is not None and slow is not None
    # the yardstick's seeds end at 0.20, 0.21 and 0.22: the level is 0.21 above the start
    by_hand = [each * (1 + (0.21 - 0.2) / (0.2 + 0.01 * seed)) for seed in range(3)]
    assert list(fast.by_seed.values()) == pytest.approx(by_hand, rel=1e-3)
    assert fast.pictures is not None and fast.pictures.mean == pytest.approx(sum(by_hand) / 3, rel=1e-3)
    assert fast.pictures.low >= min(by_hand) * 0.999 and fast.pictures.high <= max(by_hand) * 1.001
    assert slow.by_seed[0] is None and slow.pictures is None  # its seed 0 ends below the mean of its seeds
    assert "2 of 3 seeds reached it" in group_table([scalar, other])


def test_compare_for_programs(six: list[Path], vipo: Vipo) -> None:
    document = json.loads(vipo("compare", *six, "--json").out)
    assert [run["label"] for run in document["runs"]][2:4] == ["credit=sample", "credit=uniform"]
    rows = list(csv.DictReader(io.StringIO(vipo("compare", *six, "--csv").out)))
    assert (rows[0]["score"], rows[0]["group"]) == ("redness", "credit=sample")
    assert document["groups"][1]["scores"]["redness"]["mean"] == pytest.approx(float(rows[2]["mean"]))
    assert "credit=uniform" in vipo("compare", *six).out
    assert_refused(vipo("compare", *six, "--csv", "--json"), "one format at a time")


def test_metrics_are_one_table(finished: Path, tmp_path: Path, vipo: Vipo) -> None:
    import pandas

    import vipo as package

    said = vipo("metrics", finished, "--csv").out
    rows, lines = list(csv.DictReader(io.StringIO(said))), tiny.lines(finished / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == ["0", "1", "2"]
    assert [float(row["loss"]) for row in rows[:2]] == [line["loss"] for line in lines] and rows[2]["loss"] == ""
    last = tiny.lines(finished / "evaluations.jsonl")[-1]["values"]["brightness"]
    assert float(rows[2]["evaluation/brightness"]) == pytest.approx(sum(last) / len(last))
    assert json.loads(vipo("metrics", finished, "--json").out)[1]["pictures"] == int(rows[1]["pictures"]) > 0
    frame = package.metrics_frame(finished)
    assert list(frame.columns) == list(rows[0]) and frame["loss"].isna().tolist() == [False, False, True]
    assert vipo("metrics", finished, "--parquet", tmp_path / "m.parquet").code == 0
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "m.parquet"), frame, check_dtype=False)
    assert "to iteration 2" in vipo("metrics", finished).out


@pytest.fixture
def watched(finished: Path, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    server = watching(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def fetched(url: str, **headers: str) -> str:
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return str(answer.read().decode())


def test_a_watched_page_is_another_once_the_log_has_grown(watched: tuple[Path, str]) -> None:
    folder, url = watched
    page, stamp = fetched(f"{url}/"), fetched(f"{url}/stamp")
    assert "ViPO run report" in page and f'"{stamp}"' in page and "location.reload()" in page
    assert fetched(f"{url}/stamp") == stamp
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({**line, "iteration": 2, "events": ["a guard fired"]}) + "\n")
    assert fetched(f"{url}/stamp") != stamp and "a guard fired" in fetched(f"{url}/")
    for path, host, code in (("/recipe.yaml", "", 404), ("/../x", "", 404), ("/", "evil.example:80", 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            fetched(url + path, **({"Host": host} if host else {}))
        assert refused.value.code == code
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("later", ["maps/step-000001.png", "checkpoints/step-000007/state.json", "timing.jsonl"])
def test_a_watched_page_is_another_once_what_its_log_told_of_is_there(watched: tuple[Path, str], later: str) -> None:
    """A run logs an iteration before its maps are written, and an evaluation before its weights are the best kept."""
    folder, url = watched
    fetched(f"{url}/")
    stamp, file = fetched(f"{url}/stamp"), folder / later
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as appended:
        appended.write("{}\n")
    changed = fetched(f"{url}/stamp")
    assert changed != stamp and f'"{changed}"' in fetched(f"{url}/")


def test_ctrl_c_ends_watching_with_0(finished: Path, vipo: Vipo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedServer, "serve_forever", lambda _server: signal.raise_signal(signal.SIGINT))
    said = vipo("watch", finished)
    assert said.code == 0 and "http://127.0.0.1:" in said.out
    assert_refused(vipo("watch", finished.parent), "not a run directory")


def test_a_reward_whose_file_was_edited_between_two_runs_is_told(tmp_path: Path, finished: Path, vipo: Vipo) -> None:
    a, b = (run_of(tmp_path / name, finished, [0.0, 0.1]) for name in "ab")
    for folder, file in ((a, "1"), (b, "2")):
        state = folder / "checkpoints" / "step-000002" / "state.json"
        told = {**json.loads(state.read_text()), "inputs": {"rewards.redness.reward": file, "packages.torch": file}}
        state.write_text(json.dumps(told))
    said = vipo("compare", a, b)
    assert said.code == 0 and "redness was scored with another redness.reward than in" in said.err
    assert "brightness was scored" not in said.err and "another redness" not in vipo("compare", a, a).err


def test_what_is_finished_is_known(tmp_path: Path, finished: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    raw = yaml.safe_load((folder / "recipe.yaml").read_text())
    (one,) = combinations(str(folder / "recipe.yaml"), [])
    assert state_of(one, folder) == "finished" and state_of(one, tmp_path / "none") == "to begin"
    longer = combinations(str(folder / "recipe.yaml"), ["training.iterations=9"])[0]
    other = combinations(str(folder / "recipe.yaml"), ["optimizer.learning_rate=0.5"])[0]
    assert state_of(longer, folder) == state_of(other, folder) == "broken off"
    ended = shutil.copytree(folder, tmp_path / "ended")  # by its stop_when, before the nine planned
    *lines, last = (folder / "metrics.jsonl").read_text().splitlines()
    told = json.dumps({**json.loads(last), "stopped": "a judge fell"})
    (ended / "metrics.jsonl").write_text("\n".join([*lines, told, ""]))
    assert state_of(longer, ended) == "finished"
    shutil.rmtree(folder / "export")
    assert state_of(one, folder) == "broken off" and parse_recipe(raw) == parse_recipe(raw)


def test_runs_side_by_side_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    two = Pool(jobs=2)
    assert [two.share(place).get("CUDA_VISIBLE_DEVICES") for place in range(2)] == ["3", "5"]
    assert int(two.share(0)["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 2)
    assert Pool().share(0) == {}


def test_one_that_fails_keeps_no_other_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vipo: Vipo
) -> None:
    def command(_sweep: Sweep, one: Combination, _state: str) -> list[str]:
        return ["sh", "-c", f"echo told {one.name}; exit {one.recipe.seed % 2 * 3}"]

    monkeypatch.setattr(Sweep, "_command", command)
    said = vipo("sweep", "quickstart", "seed=0..3", "--jobs", "2", "--output", tmp_path / "out")
    assert said.code == 3 and "2 of 4 runs failed: seed=1; seed=3" in said.err, said
    assert said.out.count("done in") == 2 and "told seed=3" in said.out and "told seed=2" not in said.out


def test_a_sweep_that_is_stopped_stops_its_runs_and_begins_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(_sweep: Sweep, one: Combination, _state: str) -> list[str]:  # one ends while the other still saves
        return ["sh", "-c", f"trap 'sleep 0.{4 * one.recipe.seed}; exit 130' TERM; while true; do sleep 0.05; done"]

    monkeypatch.setattr(Sweep, "_command", command)
    runs = Sweep("quickstart", combinations("quickstart", ["seed=0..2"]), tmp_path, jobs=2)
    begun: list[str] = []

    def begins(name: str) -> None:
        begun.append(name)
        if len(begun) == 2:
            threading.Timer(0.5, signal.raise_signal, [signal.SIGTERM]).start()

    assert [one.code for one in runs.run(begins)] == [130, 130] and len(begun) == 2 and runs.stop.asked


FAILS = """
import os
def reward(media, prompts):
    if os.path.exists(os.environ.get("BROKEN", "/nowhere/at/all")):
        raise SystemExit("told to fail")
    return media.mean((1, 2, 3, 4))
"""


@pytest.mark.long
def test_a_sweep_in_processes_of_its_own(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, vipo: Vipo
) -> None:
    (tmp_path / "fails.py").write_text(FAILS)
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", rewards={f"{tmp_path / 'fails.py'}:reward": 1.0})
    raw["training"]["iterations"] = 2
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", raw)
    arguments = ["sweep", recipe, "seed=0,1", "--output", tmp_path / "out", "--allow-code", "--no-report"]
    assert "seed=1: to begin" in vipo(*arguments, "--dry-run").out and not (tmp_path / "out").exists()
    (tmp_path / "broken").touch()
    monkeypatch.setenv("BROKEN", str(tmp_path / "broken"))
    failed = vipo(*arguments, "--jobs", 2)
    assert failed.code == 3 and "2 of 2 runs failed" in failed.err and "told to fail" in failed.out
    (tmp_path / "broken").unlink()
    tiny.run_all({**raw, "seed": 0, "name": "seed=0"}, tmp_path / "calm")
    first = vipo(*arguments)
    assert first.code == 0 and first.out.count("done in") == 2 and "range over seeds" in first.out, first
    for log in ("metrics.jsonl", "evaluations.jsonl"):
        assert (tmp_path / "out" / "seed=0" / log).read_bytes() == (tmp_path / "calm" / log).read_bytes()
    again = vipo(*arguments)
    assert again.code == 0 and again.out.count("was finished") == 2 and "begins" not in again.out


@pytest.mark.long
def test_a_stopped_sweep_saves_what_is_under_way_and_goes_on(tmp_path: Path, model_folder: Path, vipo: Vipo) -> None:
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt")
    raw["training"] |= {"iterations": 400, "checkpoint_every": 400}
    raw["evaluation"]["every"] = None
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", raw)
    out, arguments = tmp_path / "out", ["sweep", str(recipe), "seed=0,1", "--no-report"]
    command = [sys.executable, "-m", "vipo", *arguments, "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = out / "seed=0" / "metrics.jsonl"
    for _ in range(600):
        if log.exists() and log.stat().st_size:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 130 and "Call the same command again" in said, said
    assert list((out / "seed=0" / "checkpoints").iterdir()) and not (out / "seed=1").exists()
    assert "seed=0: broken off" in vipo(*arguments, "--output", out, "--dry-run").out
