"""The report: sheets that lose nothing, a page that stands alone, verdicts and differences that can be done by hand."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageSequence

from terminal import Vipo
from vipo.errors import UserError
from vipo.evaluation.estimate import Estimate
from vipo.evaluation.records import EvaluationRecord
from vipo.media.clips import cut, spaced
from vipo.media.map_sheets import BLAME, PRAISE, clip_map_sheet, heat, lit, map_sheet, shown_frames
from vipo.media.pictures import labelled_grid, to_uint8
from vipo.media.sheets import BETWEEN, contact_sheet, load_sheet, save_sheet
from vipo.report import figures, gallery, svg
from vipo.report.beside import PROMPTS as PROMPTS_BESIDE
from vipo.report.compare import compare_runs, markdown_table, text_table
from vipo.report.embed import clip_uri
from vipo.report.outcome import change_of, changes, headline, verdict_of
from vipo.report.page import write_report
from vipo.report.run import read_run
from vipo.report.together import render

PROMPTS, PER_PROMPT, ITERATIONS = 18, 2, 6
TEXTS = [f"a <b>thing</b> number {i // PER_PROMPT}" for i in range(PROMPTS * PER_PROMPT)]


def write_run(root: Path, *, gain: float = 0.3, name: str = "small", judge: float = 0.0, frames: int = 1) -> Path:
    """A finished run of 6 iterations, evaluated at 0, 3 and 6, whose reward rises by ``gain`` give or take 0.01."""
    recipe = {"name": name, "credit": "advantage_map", "seed": 3, "generator": {"name": "flux", "path": "embedded:x"}}
    recipe |= {"rewards": {"match": {"weight": 1.0}}, "judges": ["judge"], "training": {"iterations": ITERATIONS}}
    recipe["generator"] |= {"frames": frames, "fps": 4.0} if frames > 1 else {}
    root.mkdir(parents=True, exist_ok=True)
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (root / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2"}}))
    with (root / "metrics.jsonl").open("w") as metrics, (root / "timing.jsonl").open("w") as timing:
        for i in range(ITERATIONS):
            step = {
                "iteration": i,
                "reward": 0.1 * i,
                "reward/match": 0.1 * i,
                "grad_norm": None if i == 2 else 1.0 + i,
            }
            metrics.write(
                json.dumps({**step, "skipped": float(i == 4), "events": ["it was skipped"] * (i == 4)}) + "\n"
            )
            timing.write(json.dumps({"iteration": i, "rollout": 3.0, "update": 1.0}) + "\n")
    for iteration in (0, ITERATIONS // 2, ITERATIONS):
        write_evaluation(root, iteration, gain * iteration / ITERATIONS, judge * iteration / ITERATIONS, frames)
    sheet = map_sheet(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 2, 2), torch.rand(2, 4, 4), ["one", "two"])
    if frames > 1:
        clips, maps = torch.rand(2, 3, frames, 8, 8), torch.rand(2, frames, 4, 4)
        sheet = clip_map_sheet(clips, maps, ["one", "two"], temporal_stride=1)
    (root / "maps").mkdir(exist_ok=True)
    sheet.save(root / "maps" / "step-000000.png")
    return root


def write_evaluation(root: Path, iteration: int, gain: float, judge: float, frames: int) -> None:
    count = PROMPTS * PER_PROMPT
    ramp = torch.linspace(0, 1, count)
    wobble = 0.01 * torch.sin(torch.arange(count) * 1.7) * (iteration > 0)
    values = {"match": (ramp + gain + wobble).tolist(), "judge": (ramp + judge + wobble).tolist()}
    values["judge"][5] = None if iteration else values["judge"][5]
    media = torch.rand(count, 3, frames, 8, 8, generator=torch.Generator().manual_seed(iteration))
    scores = {key: [float("nan") if v is None else v for v in row] for key, row in values.items()}
    save_sheet(root / "samples" / f"step-{iteration:06d}.png", media, TEXTS, scores)
    record = {"iteration": iteration, "samples_per_prompt": PER_PROMPT, "prompts": TEXTS, "values": values}
    with (root / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_run(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_contact_sheet_gives_back_the_bytes_it_was_given(tmp_path: Path) -> None:
    media = torch.rand(5, 3, 1, 6, 9)
    prompts = ["a", "a", "b", "b", "c" * 200]
    save_sheet(tmp_path / "s.png", media, prompts, {"r": torch.tensor([1.0, 2, float("nan"), 4, 5])})
    tiles, info = load_sheet(tmp_path / "s.png")
    assert np.array_equal(np.stack([np.asarray(tile) for tile in tiles]), to_uint8(media)[:, 0])
    corners = info.pop("corners")
    assert info.pop("picture") and info.pop("sha256")
    assert info == {"tile": [6, 9], "frames": 1, "prompts": prompts, "scores": {"r": [1, 2, None, 4, 5]}}
    assert corners[1] == [corners[0][0] + 9 + BETWEEN, corners[0][1]] and corners[2] != [
        corners[1][0] + 9 + BETWEEN,
        corners[1][1],
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json", "s.png"]


def test_bytes_are_rounded_and_clamped() -> None:
    media = torch.tensor([-1.0, 0.5, 2.0]).reshape(1, 3, 1, 1, 1)
    assert to_uint8(media).ravel().tolist() == [0, 128, 255]


def test_a_sheet_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    media = torch.rand(2, 3, 1, 4, 4)
    with pytest.raises(ValueError, match="1 entries of 'prompts' for 2 pictures"):
        save_sheet(tmp_path / "s.png", media, ["one"], {})
    save_sheet(tmp_path / "s.png", media, ["one", "two"], {})
    contact_sheet(media[:1], ["one"])[0].save(tmp_path / "s.png")
    with pytest.raises(UserError, match="not as it was written"):
        load_sheet(tmp_path / "s.png")


@pytest.mark.parametrize("suffix", [".png", ".json"])
def test_another_bit_in_a_sheet_is_noticed(tmp_path: Path, suffix: str) -> None:
    save_sheet(tmp_path / "s.png", torch.rand(2, 3, 1, 4, 4), ["one", "two"], {"r": [0.25, 0.5]})
    file = tmp_path / f"s{suffix}"
    for place in range(0, file.stat().st_size, 7):
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        (tmp_path / f"t{suffix}").write_bytes(content)
        (other,) = {".png", ".json"} - {suffix}
        shutil.copy(tmp_path / f"s{other}", tmp_path / f"t{other}")
        with pytest.raises(UserError, match="cannot be read"):
            load_sheet(tmp_path / "t.png")


def test_a_labelled_grid_scales_and_takes_uneven_rows_and_long_words() -> None:
    tile = Image.new("RGB", (16, 16), "red")
    grid = labelled_grid([[tile, tile], [tile]], ["w" * 300, "two\ngrey"], ["left", "right"], 3.0, smooth=False)
    assert grid.width > 2 * 48 and np.asarray(grid).reshape(-1, 3).tolist().count([255, 0, 0]) == 3 * 48 * 48


@pytest.mark.parametrize(("height", "width"), [(64, 64), (300, 1000)])
def test_a_map_sheet_keeps_the_aspect_ratio_and_a_sane_size(height: int, width: int) -> None:
    pictures, maps = torch.rand(3, 3, height, width), torch.rand(3, 8, 8)
    sheet = map_sheet(pictures, torch.rand(3, 2, 4, 4), maps, ["a", "b", "c"], max_rows=2)
    rows = 2 * round(192 * height / max(height, width))
    assert sheet.width < 1200 and rows < sheet.height < rows + 200


def test_a_map_lights_what_it_weighs_and_darkens_the_rest() -> None:
    white = Image.new("RGB", (40, 40), "white")
    seen = np.asarray(lit(white, np.array([[0.0, 2.0], [0.0, 2.0]], np.float32)))[20]
    assert seen[-1].tolist() == [255] * 3 and seen[0].max() < 70
    assert (np.diff(heat(np.linspace(0, 1, 50)).astype(float) @ [0.2126, 0.7152, 0.0722]) > 0).all()
    assert heat(np.array([float("nan")]))[0].tolist() == [226, 227, 230]


def test_credit_is_as_strong_as_the_advantage_and_has_its_sign() -> None:
    pictures, maps = torch.zeros(3, 3, 8, 8), torch.ones(3, 4, 4)
    sheet = np.asarray(map_sheet(pictures, None, maps, ["a", "b", "c"], advantages=[2.0, -2.0, 0.02], tile=64))
    full = [int((sheet == colour).all(-1).sum()) for colour in (PRAISE, BLAME)]
    assert all(64 * 64 <= count < 64 * 64 + 200 for count in full), "a tile of each, and an end of the colour bar"


def test_a_map_that_is_not_finite_or_flat_still_makes_a_sheet() -> None:
    maps = torch.stack([torch.full((4, 4), float("nan")), torch.zeros(4, 4)])
    map_sheet(torch.rand(2, 3, 8, 8), torch.zeros(2, 3, 2, 2), maps, ["no map", "zeros"])
    with pytest.raises(ValueError, match="one per sample"):
        map_sheet(torch.rand(2, 3, 8, 8), list(torch.zeros(1, 3, 2, 2)), maps, [])


def test_a_finished_run_is_read_in_full(finished: Path) -> None:
    record = read_run(finished)
    assert (record.name, record.rewards, record.iterations_done) == ("small", {"match": 1.0}, ITERATIONS)
    assert record.series("grad_norm") == ([0, 1, 3, 4, 5], [1, 2, 4, 5, 6])  # null is left out
    assert record.steps[4].events == ("it was skipped",) and figures.skipped_updates(record) == 1
    assert list(record.sheets) == [0, 3, 6] and not record.unreadable
    assert [(p.name, p.share) for p in figures.phases(record)] == [("rollout", 0.75), ("update", 0.25)]


def test_a_killed_run_reads_without_its_half_written_line(run: Path) -> None:
    for name in ("metrics", "evaluations"):
        with (run / f"{name}.jsonl").open("a") as file:
            file.write('{"iteration": 6, "rew')
    record = read_run(run)
    assert (record.iterations_done, len(record.evaluations)) == (ITERATIONS, 3)
    assert not record.unreadable
    assert write_report(run).is_file()


@pytest.mark.parametrize("chunk", [0, 1])
def test_a_damaged_map_sheet_is_left_out_of_the_page(run: Path, chunk: int) -> None:
    shown, sheet = gallery.map_figures(read_run(run)).shown, min((run / "maps").glob("*.png"))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)).save(sheet)
    parts = sheet.read_bytes().split(b"IDAT")
    sheet.write_bytes(b"IDAT".join(parts[: chunk + 1]) + b"\0\0\0\0" + b"IDAT".join(parts[chunk + 1 :]))
    found = gallery.map_figures(read_run(run))
    assert len(found.shown) == len(shown) - 1 and found.unreadable == (0,)
    assert "The map sheet of iteration 0 cannot be read." in write_report(run).read_text()


def test_a_damaged_line_is_counted_and_a_repeated_iteration_replaced(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 6, "rew{"iteration": 5}\n{"iteration": 5, "reward": 7.0}\n')
    record = read_run(run)
    assert record.unreadable == {"metrics": 1} and record.steps[-1].metrics["reward"] == 7.0
    assert "1 damaged line of metrics.jsonl" in write_report(run).read_text()


def test_a_run_that_only_began_says_what_is_missing(run: Path) -> None:
    for name in ("metrics.jsonl", "timing.jsonl", "evaluations.jsonl", "environment.json"):
        (run / name).unlink()
    shutil.rmtree(run / "samples")
    shutil.rmtree(run / "maps")
    page = write_report(run).read_text()
    assert "There is no verdict yet" in page and "No iteration is on record yet" in page


def test_pictures_that_are_gone_leave_the_rest_of_the_page(run: Path) -> None:
    (run / "samples" / "step-000006.png").write_bytes(b"not a picture")
    (run / "maps" / "step-000000.png").write_bytes(b"")
    page = write_report(run).read_text()
    assert "The pictures cannot be shown" in page and "rose in this run" in page


@pytest.mark.parametrize("make", [lambda p: p / "missing", lambda p: p])
def test_what_is_not_a_run_directory_is_a_user_error(tmp_path: Path, make: object) -> None:
    folder = make(tmp_path)  # type: ignore[operator]
    for action in (write_report, read_run, lambda path: compare_runs([path])):
        with pytest.raises(UserError, match="is not a run directory"):
            action(folder)
    assert not list(tmp_path.iterdir())


def test_the_page_needs_nothing_from_outside(finished: Path) -> None:
    page = write_report(finished).read_text()
    references = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", page)
    outside = {r for r in references if not r.startswith(("data:", "#"))}
    assert outside == {"https://arxiv.org/abs/2511.18719"}
    assert not re.search(r"url\(|@import|<script|<link (?!rel=\"icon\" href=\"data:)", page)


def test_the_page_escapes_prompts_describes_pictures_and_keeps_its_order(finished: Path) -> None:
    page = write_report(finished).read_text()
    assert "<b>thing</b>" not in page and "a &lt;b&gt;thing&lt;/b&gt; number 0" in page
    assert all("alt=" in tag for tag in re.findall(r"<img[^>]+>", page))
    assert all("aria-label=" in tag for tag in re.findall(r"<svg[^>]+>", page))
    sections = re.findall(r'<section id="(\w+)"', page)
    assert sections == ["run", "outcome", "curve", "pictures", "maps", "health"]
    assert "it was skipped" in page and "first 16 prompts" in page


@pytest.mark.parametrize(
    ("low", "high", "prompts", "verdict"),
    [
        (0.01, 0.20, 40, "rose in this run"),
        (-0.01, 0.20, 40, "within noise"),
        (-0.20, -0.01, 40, "fell in this run"),
        (0.0, 0.0, 40, "within noise"),
        (0.01, 0.20, 5, "too few prompts to tell"),
    ],
)
def test_the_verdict_is_where_the_interval_lies(low: float, high: float, prompts: int, verdict: str) -> None:
    assert verdict_of(Estimate((low + high) / 2, 0.1, low, high), prompts) == verdict


def test_changes_are_paired_and_missing_scores_leave_both_sides(finished: Path) -> None:
    trained, judge = changes(read_run(finished))
    assert (trained.name, trained.role, trained.verdict) == ("match", "trained on", "rose in this run")
    assert trained.gain.mean == pytest.approx(0.3, abs=0.01) and trained.gain.high - trained.gain.low < 0.02
    assert (judge.role, judge.verdict, judge.scored) == ("held-out judge", "within noise", 35)
    assert judge.trained.mean - judge.base.mean == pytest.approx(judge.gain.mean)


def test_pairing_sees_a_gain_that_the_spread_between_prompts_would_hide() -> None:
    base = torch.linspace(0, 100, 20, dtype=torch.float64)
    records = [EvaluationRecord(i, 1, ("p",) * 20, {"r": base + 0.1 * i}) for i in range(2)]
    change = change_of("r", "trained on", *records)
    assert change is not None and change.verdict == "rose in this run" and change.gain.mean == pytest.approx(0.1)


def test_a_falling_judge_beside_a_rising_reward_is_called_reward_hacking(tmp_path: Path) -> None:
    hacked = changes(read_run(write_run(tmp_path / "hacked", judge=-0.2)))
    assert hacked[1].verdict == "fell in this run" and "reward hacking" in headline(hacked)
    assert "reward hacking" not in headline(changes(read_run(write_run(tmp_path / "fair", judge=0.2))))


def test_the_extremes_are_the_extremes(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    lines[-1]["values"]["match"] = [
        v + 0.5 * (i == 7) - 0.5 * (i == 9) for i, v in enumerate(lines[0]["values"]["match"])
    ]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = read_run(run)
    found = gallery.gallery(record)
    assert found is not None and len(found.first) == 16 and found.one_per_prompt
    prompts = {title: [group.prompt for group in groups] for title, groups in found.groups.items()}
    assert prompts == {
        "Prompts that gained most": [TEXTS[7]],
        "Prompts that lost most": [TEXTS[9]],
        "Best prompt after training": [TEXTS[-1]],
        "Worst prompt after training": [TEXTS[9]],
    }
    (reward,) = record.rewards
    assert f"the mean over a prompt's pictures of {reward}." in write_report(run).read_text()
    rose = found.groups["Prompts that gained most"][0]
    assert len(rose.pairs) == PER_PROMPT and rose.scores[0].after - rose.scores[0].before == pytest.approx(0.25)


def test_the_pictures_of_every_evaluation_can_be_slid_through(finished: Path) -> None:
    page = write_report(finished).read_text()
    found = gallery.gallery(read_run(finished))
    assert found is not None and found.iterations == (3, 6)
    assert page.count('type="radio"') == 2 and '<input type="radio" name="at" id="at-1" checked>' in page
    first = found.first[0]
    assert f'class="s0" src="{first.later[0]}"' in page and f'class="s1" src="{first.later[1]}"' in page
    assert len({first.before, *first.later}) == 3


def test_a_comparison_is_the_mean_of_paired_differences(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a", gain=0.1), write_run(tmp_path / "b", gain=0.4)]
    first, second = compare_runs(folders)
    finals = [json.loads((f / "evaluations.jsonl").read_text().splitlines()[-1])["values"]["match"] for f in folders]
    by_hand = sum(b - a for a, b in zip(*finals, strict=True)) / len(finals[0])
    cell = second.cells["match"]
    assert cell.difference is not None and cell.difference.mean == pytest.approx(by_hand)
    assert (cell.role, cell.verdict, first.cells["match"].difference) == ("trained on", "rose in this run", None)
    for table in (text_table, markdown_table):
        assert "+0.3000" in table([first, second]) and "held-out judge" in table([first, second])


def test_a_comparison_says_what_it_leaves_out(vipo: Vipo, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    log = runs[1] / "evaluations.jsonl"
    log.write_text(log.read_text().replace('{"iteration": 6', '{"iteration": 6;', 1))
    said = vipo("compare", *runs)
    assert said.code == 0 and "left out 1 damaged line of evaluations.jsonl" in " ".join(said.err.split()), said
    assert not vipo("compare", runs[0], runs[0]).err


def test_runs_on_different_prompts_are_not_compared(run: Path, finished: Path) -> None:
    text = (run / "evaluations.jsonl").read_text()
    (run / "evaluations.jsonl").write_text(text.replace("number 3", "number three"))
    with pytest.raises(UserError, match="different prompts"):
        compare_runs([finished, run])
    (run / "evaluations.jsonl").unlink()
    with pytest.raises(UserError, match="has no evaluation yet"):
        compare_runs([run])


def test_numbers_read_well() -> None:
    assert [svg.number(v) for v in (0, 0.12345, -1234.5, 2e-7, 1.5e6)] == ["0", "0.123", "−1234", "2e−7", "1.5e6"]  # noqa: RUF001
    assert (svg.fixed(-0.001, 2), svg.signed(0.001, 2), svg.signed(0.5, 2), svg.fixed(float("nan"))) == (
        "0.00",
        "0.00",
        "+0.50",
        "n/a",
    )
    assert svg.ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert svg.tick_labels([0.0, 0.25, 0.5]) == ["0", "0.25", "0.50"]


def test_smoothing_keeps_a_constant_and_long_lines_are_thinned() -> None:
    assert svg.smooth([2.0] * 30, 4.0) == pytest.approx([2.0] * 30)
    x, y = svg.thinned(list(range(1000)), [1.0] * 1000)
    assert len(x) <= svg.MOST_POINTS and set(y) == {1.0}


@pytest.mark.parametrize("y", [[1.0], [0.0, 0.0, 0.0], [5.0, 5.0], [-1e-9, 1e-9], [1e7, -1e7]])
def test_any_line_can_be_drawn(y: list[float]) -> None:
    drawn = svg.chart([svg.Line(list(range(len(y))), y, "raw")], label='odd "line"', from_zero=True)
    assert "nan" not in drawn and "&#34;line&#34;" in drawn


def pixels(clip: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(frame.convert("RGB")) for frame in clip])


def unpacked(uri: str) -> list[Image.Image]:
    """All frames of a picture or clip that a page holds."""
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as opened:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(opened)]


def test_a_sheet_of_clips_gives_back_every_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    media = torch.rand(3, 3, 5, 6, 9)
    save_sheet(tmp_path / "s.png", media, list("abc"), {})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's guard, which a sheet of clips soon exceeds
    strips, info = load_sheet(tmp_path / "s.png")
    assert Image.MAX_IMAGE_PIXELS == 100
    assert np.array_equal(np.stack([pixels(cut(strip, 5)) for strip in strips]), to_uint8(media))
    assert (info["tile"], info["frames"], info["prompts"]) == ([6, 9], 5, list("abc"))
    with pytest.raises(ValueError, match="45 pixels does not hold 4 frames"):
        cut(strips[0], 4)


def test_evenly_spaced_values_have_both_ends() -> None:
    assert spaced(range(9), 3) == [0, 4, 8] and spaced(range(2), 3) == [0, 1] and spaced(range(9), 1) == [4]


def noise_clip(frames: int, width: int, height: int) -> list[Image.Image]:
    levels = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in levels]


def test_a_clip_in_the_page_is_lossless_if_it_fits_and_never_larger_than_its_room() -> None:
    clip = noise_clip(5, 24, 16)
    assert np.array_equal(pixels(unpacked(clip_uri(clip, 8, 10_000))), pixels(clip))
    for room in (5_000, 2_500):
        uri = clip_uri(noise_clip(8, 64, 40), 8, room)
        assert len(uri) * 3 / 4 < room + 40 and len(unpacked(uri)) in (2, 4)  # of noise only some frames fit
    assert len(unpacked(clip_uri(noise_clip(8, 64, 40), 8, 400))) == 1  # the least that can be shown


def test_a_long_clip_in_the_page_plays_at_the_same_speed() -> None:
    uri = clip_uri(noise_clip(60, 8, 8), 10, 100_000)
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as opened:
        assert opened.n_frames == 20
        opened.load()
        assert opened.info["duration"] == 300


@pytest.fixture(scope="module")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: a run whose samples are clips of 5 frames."""
    return write_run(tmp_path_factory.mktemp("runs") / "filmed", frames=5)


def test_the_page_of_a_video_run_plays_the_clips_and_can_hold_them_still(filmed: Path, finished: Path) -> None:
    page, still = (write_report(folder).read_text() for folder in (filmed, finished))
    figures_ = re.findall(r'<figure class="pair clip">(.*?)</figure>', page, re.S)
    assert len(figures_) in range(9, 17) and all(figure.count("<img") == 3 for figure in figures_)
    before = unpacked(re.findall(r'src="([^"]+)"', figures_[0])[0])
    strips, _ = load_sheet(filmed / "samples" / "step-000000.png")
    assert np.array_equal(pixels(before), pixels(cut(strips[0], 5)))
    assert len(unpacked(re.findall(r'src="([^"]+)"', figures_[0])[2])) == 1
    for words in ('id="hold"', "prefers-reduced-motion: reduce", "first clip of each of the first 8 prompts"):
        assert words in page and words not in still
    assert all("alt=" in tag for tag in re.findall(r"<img[^>]+>", page))
    assert "<script" not in page and len(page) < 6_000_000


def test_beside_others_clips_play_and_stand_still_for_who_asked_for_it(filmed: Path) -> None:
    recipe = yaml.safe_load((filmed / "recipe.yaml").read_text())
    structuring = {"sources": ["consensus"], "normalization": "mean"}
    page = render([replace(read_run(filmed), recipe={**recipe, "structuring": structuring})])
    tiles = re.findall(r'<source media="\(prefers-reduced-motion: reduce\)" srcset="([^"]+)"><img src="([^"]+)"', page)
    assert len(tiles) == page.count("<img") > 2 * PROMPTS_BESIDE and "The first clip of each" in page
    assert (len(unpacked(tiles[0][0])), len(unpacked(tiles[0][1]))) == (1, 5)


def test_the_strip_of_a_video_run_shows_middle_frames(filmed: Path) -> None:
    found = gallery.strip(read_run(filmed))
    assert found is not None and found.iterations == (0, 3, 6)
    strips, _ = load_sheet(filmed / "samples" / "step-000003.png")
    assert np.array_equal(pixels(unpacked(found.rows[1][1][1])), pixels([cut(strips[2], 5)[2]]))


def test_all_clips_of_a_page_share_one_room(filmed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "CLIP_ROOM", 16_000)
    record = read_run(filmed)
    found = gallery.gallery(record)
    assert found is not None and len(found.first) == 8
    pairs = [*found.first, *(pair for groups in found.groups.values() for group in groups for pair in group.pairs)]
    assert sum(len(pair.before) + len(pair.later[-1]) for pair in pairs) * 3 / 4 < 16_000 + 40 * 2 * len(pairs)


def test_the_map_sheet_of_a_clip_shows_the_middle_frame_of_each_latent_frame() -> None:
    assert shown_frames(4, 4) == [0, 2, 6, 10] and shown_frames(3, 1) == [0, 1, 2]
    clip = (torch.arange(13) / 15 + 0.2).reshape(1, 1, 13, 1, 1).expand(1, 3, 13, 16, 16).contiguous()
    maps = torch.zeros(1, 4, 4, 4)
    maps[0, 2] = 2.0
    sheet = np.asarray(clip_map_sheet(clip, maps, ["grey"], temporal_stride=4))
    left, top, step = 24 + 190 + 16 + 96, 24 + 38 + 8 + 96, 192 + 8  # the middle of the first tile
    rows = [[sheet[top + row * step, left + column * step].tolist() for column in range(4)] for row in range(3)]
    levels = [round(255 * (frame / 15 + 0.2)) for frame in (0, 2, 6, 10)]
    assert rows[0] == [[level] * 3 for level in levels]
    assert rows[1] == [heat(np.array(share)).tolist() for share in (0.0, 0.0, 1.0, 0.0)]
    assert rows[2] == [[level if k == 2 else round(level * 0.22)] * 3 for k, level in enumerate(levels)]


@pytest.mark.usefixtures("unchecked")
def test_a_map_sheet_refuses_maps_of_another_clip() -> None:
    with pytest.raises(ValueError, match=r"temporal_stride=4 has 9 frames"):
        clip_map_sheet(torch.rand(1, 3, 5, 8, 8), torch.rand(1, 3, 4, 4), ["a"], temporal_stride=4)


def test_a_recipe_without_what_every_run_writes_is_named(filmed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(filmed, tmp_path / "run"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    for section, key, change in (
        ("generator", "fps", {"generator": {"frames": 5}}),
        ("structuring", "sources", {"structuring": {"backbone": "dinov2"}}),
    ):
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | change))
        with pytest.raises(UserError, match=rf"has no {section}\.{key}; put back what `vipo train` wrote"):
            write_report(folder)
