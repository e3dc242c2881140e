"""``make gpu-check`` at toy size on a CPU: what is measured, the killed run, the page, and that a worse ratio fails."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"))
import case_plan
import case_run
import check
import device_tests
import figures
import gpu_page
import jobs
import kill_resume
import random_weights
from published_cases import CASES, COMPILED, CREDITS, Case
from vipo.backbones.dinov2 import DinoV2
from vipo.plan.work import work_of
from vipo.schema import TrainingSection

HERE = Path(check.__file__).parent

# As measured once, see docs/gpu.md; both credits took the same but for 0.3 s, here ViPO's is the longer iteration.
MEASURED: dict[str, Any] = {
    "sample": {
        "iterations": 2, "iteration": 18.1, "seconds": dict.fromkeys(gpu_page.PHASES, 4.6), "first_ratio": 0.0,
        "clipped_share": 0.6, "skipped": 0.0, "peak_allocated": 28.3e9, "peak_reserved": 28.7e9,
    },
    "bare": {
        "batch": 4, "replay_batch": 4, "forward": 0.265, "forward_backward": 0.854, "forward_untrained": 0.251,
        "forward_one": 0.105, "forward_backward_one": 0.614, "forward_untrained_one": 0.080, "decode": 0.068,
        "bare_passes": 16.6, "bare_passes_one": 39.6,
    },
    "planned": {
        "peak_bytes": dict.fromkeys(CREDITS, 28.3e9), "iteration_seconds": {"sample": 6.8, "update": 10.5},
        "utilisation": 0.31, "forward_flops": 86.5e12, "forward_backward_flops": 269e12,
    },
    "kill": {"signal": 9, "iterations_done": 3, "finished": False, "differences": [], "equal": True},
    "quickstart": {
        "gains": {"emoji_match": 0.225, "emoji_judge": 0.048, "emoji_layout": 0.032}, "seconds": 57.0, "iterations": 36,
        "iteration_seconds": 16.0, "skipped": 0.0, "first_ratio": 0.0,
    },
    "tests": {
        "device": {"complete": True, "passed": 2, "skipped": 1, "failed": [], "seconds": 1.0, "device_visible": True},
    },
}  # fmt: skip


def records() -> dict[str, Any]:
    """What the parts of a check at full size leave."""
    flux: dict[str, Any] = {
        "title": "FLUX.1-dev",
        "computes_in": {"frozen weights": "bfloat16", "passes": "bfloat16 autocast"},
        "bare": MEASURED["bare"],
        "credits": {"sample": MEASURED["sample"], "advantage_map": MEASURED["sample"] | {"iteration": 18.4}},
    }
    other = {name: MEASURED[name] for name in ("kill", "quickstart", "tests")}
    plans = {"plan-flux": MEASURED["planned"], "plan-wan": MEASURED["planned"]}
    compiled = flux | {"bare": flux["bare"] | {"bare_passes": 12.4}, "credits": {"sample": MEASURED["sample"]}}
    compiled["credits"]["sample"] = MEASURED["sample"] | {"iteration": 13.1}
    whole = {
        "case-flux": flux,
        "case-flux-compiled": compiled,
        "case-wan": flux | {"title": "Wan2.1-14B"},
        **plans,
        **other,
    }
    return json.loads(json.dumps(whole))  # nothing of it is shared


def run_check(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["check.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        check.main()
    return int(stopped.value.code or 0)


def checked(monkeypatch: pytest.MonkeyPatch, out: Path, found: dict[str, Any], *arguments: str) -> int:
    """The check at full size on a GPU whose parts leave ``found``."""

    def leave(_stages: object, folder: Path, *_: object) -> dict[str, Any]:
        for name, record in found.items():
            (folder / f"{name}.json").write_text(json.dumps(record))
        return {name: {"outcome": "done", "seconds": 1.0} for name in found}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        check, "machine", lambda _: {"device": "NVIDIA H100 80GB HBM3", "memory": 85e9, "torch": "2.11"}
    )
    monkeypatch.setattr(check, "run", leave)
    return run_check(monkeypatch, "--out", out, *arguments)


# --- without a GPU, and worse than before -----------------------------------------------------------------------------


def test_without_a_gpu_it_is_skipped_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["check.py", "--out", str(tmp_path / "out")])
    check.main()
    said = capsys.readouterr().out
    assert said.startswith("gpu-check is skipped: torch ") and said.count("\n") == 1 and "--device cpu" in said
    assert not (tmp_path / "out").exists()


def test_what_was_measured_once_is_well_and_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = records()
    found["case-wan"]["bare"] |= {"forward": 0.871, "forward_untrained": 0.810, "bare_passes": 12.9}
    found["case-wan"]["credits"]["sample"] |= {"iteration": 14.2, "peak_allocated": 36.9e9, "peak_reserved": 37.9e9}
    found["case-wan"]["credits"]["advantage_map"] |= found["case-wan"]["credits"]["sample"] | {"iteration": 15.4}
    found["plan-wan"]["peak_bytes"] = dict.fromkeys(CREDITS, 37.4e9)
    assert checked(monkeypatch, tmp_path, found) == 0
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    assert result["ok"] and result["machine"]["device"] == "NVIDIA H100 80GB HBM3"
    assert len(result["comparison"]) == len(check.expected(HERE / "baseline.json", "full"))  # no line of it is dead
    page = (tmp_path / "gpu-check.md").read_text()
    assert (
        page.startswith("# gpu-check: NVIDIA H100 80GB HBM3\n")
        and "|  | FLUX.1-dev | FLUX.1-dev, training.compile | Wan2.1-14B |" in page
    )
    assert "| forward; forward and backward | 0.265 s (326 TFLOP/s); 0.854 s (315 TFLOP/s) |" in page
    assert "| iteration, scalar; ViPO | 18.1 s; 18.4 s | 13.1 s | 14.2 s; 15.4 s |" in page
    assert "| peak allocated | 28.3 GB; 28.3 GB |" in page and "emoji_match +0.225" in page and "bit for bit" in page


@pytest.mark.parametrize(
    ("part", "keys", "value", "named"),
    [
        ("case-flux", ("credits", "sample", "iteration"), 19.2, ["flux.sample.iteration_over_bare"]),
        ("case-flux", ("credits", "advantage_map", "first_ratio"), 6e-4, ["flux.advantage_map.first_ratio"]),
        ("case-flux", ("credits", "advantage_map", "first_ratio"), float("nan"), ["flux.advantage_map.first_ratio"]),
        ("case-flux", ("credits", "sample", "peak_reserved"), 45e9, ["flux.sample.reserved_over_allocated"]),
        ("plan-flux", ("peak_bytes", "sample"), 25e9, ["flux.sample.allocated_over_planned"]),
        ("case-flux", ("credits", "sample", "skipped"), 1.0, ["flux.sample.skipped"]),
        ("quickstart", ("gains", "emoji_match"), 0.05, ["quickstart.gain.emoji_match"]),
        ("kill", ("equal",), False, ["kill.equal"]),
        ("tests", ("device", "failed"), ["tests.test_sde::test_x"], ["tests.failed"]),
    ],
)
def test_a_worse_ratio_fails_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, keys: tuple[str, ...], value: Any, named: list[str]
) -> None:
    found = {name: record for name, record in records().items() if not name.endswith("-wan")}
    *parents, leaf = keys
    node = found[part]
    for key in parents:
        node = node[key]
    node[leaf] = value
    assert checked(monkeypatch, tmp_path, found) == 1
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [row["figure"] for row in result["comparison"] if not row["ok"]] == named
    assert named[0] in result["verdict"] and "**worse**" in (tmp_path / "gpu-check.md").read_text()


def test_a_small_gpu_leaves_the_large_cases_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "NEEDED", 90 * 10**9)
    assert checked(monkeypatch, tmp_path, {"kill": MEASURED["kill"]}) == 0
    page = (tmp_path / "gpu-check.md").read_text()
    assert "left out: it needs 90 GB of GPU memory" in page and "**Left out: full.**" in page


# --- the parts as processes -------------------------------------------------------------------------------------------


def test_a_part_that_fails_or_hangs_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "HERE", tmp_path)
    monkeypatch.setattr(jobs, "GRACE", 0.2)
    (tmp_path / "good.py").write_text("import sys, pathlib; pathlib.Path(sys.argv[-1]).write_text('{}')")
    (tmp_path / "bad.py").write_text("raise SystemExit('no such luck')")
    child = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    (tmp_path / "hangs.py").write_text(f"import signal, time\nprint('asleep', flush=True)\n{child}\n")
    stages = [[jobs.Job("hangs", "hangs.py", (), 1.0), jobs.Job("bad", "bad.py", (), 30.0)]]
    stages.append([jobs.Job("good", "good.py", (), 30.0)])
    out = tmp_path / "out"
    found = check.run(stages, out, "cpu", check.time.monotonic() + 60)
    assert found["good"]["outcome"] == "done" and found["bad"]["outcome"] == "failed with code 1"
    assert found["bad"]["said"] == ["no such luck"] and found["hangs"]["said"] == ["asleep"]
    assert found["hangs"]["outcome"].startswith("ended by its time limit")
    good, sentence = check.verdict(found, [])
    assert not good and sentence == "Did not come to their end: hangs, bad."
    late = check.run([[jobs.Job("late", "good.py", (), 30.0)]], out, "cpu", check.time.monotonic())
    assert late["late"]["outcome"] == "left out" and check.verdict(late, [])[0]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    arguments = ("--out", out, "--device", "cpu", "--size", "toy", "--only", "kill")
    code = run_check(monkeypatch, *arguments)
    assert code == 0, (out / "logs" / "kill.log").read_text()
    (record,) = json.loads((out / "gpu-check.json").read_text())["records"].values()
    assert record == {"signal": 9, "iterations_done": 3, "finished": False, "differences": [], "equal": True}
    page = (out / "gpu-check.md").read_text()
    assert "| kill.equal | 1 | 1 | at least 1 | ok |" in page and page.startswith("# gpu-check: CPU\n")

    # One bit of one number, or one more letter, is seen.
    whole, other = out / "runs" / "kill" / "unbroken", tmp_path / "other"
    shutil.copytree(whole, other)
    assert kill_resume.differences(whole, other) == []
    file = next(other.glob("export/*.safetensors"))
    tensors = load_file(file)
    next(iter(tensors.values())).view(torch.int32).flatten()[0] ^= 1
    save_file(tensors, file)
    with (other / "metrics.jsonl").open("a") as metrics:
        metrics.write(" ")
    assert kill_resume.differences(whole, other) == ["metrics.jsonl", str(file.relative_to(other))]


def test_the_counts_of_a_test_report(tmp_path: Path) -> None:
    assert device_tests.counted(tmp_path / "none.xml") == {"complete": False, "passed": 0, "skipped": 0, "failed": []}
    cases = "<testcase classname='a' name='x'/><testcase classname='a' name='y'><failure/></testcase>"
    more = "<testcase classname='a' name='z'><skipped/></testcase><testcase classname='b' name='x'><error/></testcase>"
    (tmp_path / "found.xml").write_text(f"<testsuites><testsuite>{cases}{more}</testsuite></testsuites>")
    found = device_tests.counted(tmp_path / "found.xml")
    assert found == {"complete": True, "passed": 1, "skipped": 1, "failed": ["a::y", "b::x"]}
    assert figures.of_tests({"device": found, "cpu": found})["tests.failed"] == 4


@pytest.mark.long
def test_the_suite_runs_and_is_counted(tmp_path: Path) -> None:
    chosen = [str(Path(__file__).parent / "test_registry.py")]
    found = device_tests.run("device", tmp_path, 1, 120.0, chosen)
    assert found["complete"] and found["passed"] > 5 and not found["failed"]
    assert found["device_visible"] == torch.cuda.is_available()


# --- the cases --------------------------------------------------------------------------------------------------------


def test_the_cases_of_published_size_are_what_their_titles_say(tmp_path: Path) -> None:
    flux, wan = (work_of(CASES["full"][case].load("advantage_map", tmp_path), 1) for case in ("flux", "wan"))
    assert (flux.passes, flux.trained, flux.sampled_at_once, flux.replayed_at_once) == (12 * 8, 12 * 4, 4, 4)
    assert (wan.passes, wan.trained, wan.sampled_at_once, wan.replayed_at_once) == (2 * 4, 2 * 1, 1, 1)
    for case in ("flux", "wan"):
        recipe = CASES["full"][case].load("sample", tmp_path)
        assert recipe.generator.quantization == recipe.training.sharding == "none"
    assert not recipe.generator.options["guidance_in_one_pass"]
    assert (recipe.generator.height, recipe.generator.width, recipe.generator.frames) == (240, 416, 53)
    assert recipe.policy.rank == 32 and recipe.training.gradient_checkpointing and list(recipe.rewards) == ["redness"]
    assert recipe.structuring.backbone_options["pretrained"] == str(tmp_path / "dinov2-large")


def test_a_pipeline_of_random_weights_has_no_text_encoders(tmp_path: Path) -> None:
    recipe = CASES["toy"]["flux"].load("sample", tmp_path)
    made = random_weights.pipeline(recipe.generator, "cpu")
    assert {part.device.type for part in (made.text_encoder, made.text_encoder_2)} == {"meta"}
    assert all(bool(weight.isfinite().all()) and weight.any() for weight in made.transformer.parameters())
    session = case_run.opened(recipe)
    once, again, other = (session.generator.encode([text]).prompt_embeds for text in ("a cat", "a cat", "a heart"))
    assert torch.equal(once, again) and not torch.equal(once, other) and bool(once.isfinite().all())


@pytest.mark.parametrize(("case", "parameters", "decoder"), [
    ("flux", 11.90e9, torch.bfloat16), ("wan", 14.29e9, torch.float32)
])  # fmt: skip
def test_a_pipeline_of_published_size_has_the_dtypes_of_a_loaded_one(
    tmp_path: Path, case: str, parameters: float, decoder: torch.dtype
) -> None:
    recipe = CASES["full"][case].load("sample", tmp_path)
    made = random_weights.pipeline(recipe.generator, "meta")
    assert sum(weight.numel() for weight in made.transformer.parameters()) == pytest.approx(parameters, rel=2e-3)
    assert {weight.dtype for weight in made.vae.parameters()} == {decoder}
    kept = {weight.dtype for weight in made.transformer.parameters()} - {torch.bfloat16}
    assert kept == (set() if case == "flux" else {torch.float32})  # Wan keeps its norms and its time in float32


def test_a_backbone_of_published_size_is_one_that_vipo_reads(tmp_path: Path) -> None:
    folder = random_weights.save_backbone(tmp_path, "dinov2-small", "cpu")
    assert folder.name == "dinov2-small"
    seen = DinoV2(pretrained=folder, resolution=None)(torch.rand(2, 3, 28, 42)).features
    assert seen.shape == (2, 384, 2, 3) and bool(seen.isfinite().all())


@pytest.mark.slow
def test_a_case_is_measured_and_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_run, "REPEATS", 1)
    case = CASES["toy"]["flux"]
    case_run.measure(case, tmp_path, compiled=False, wanted=1, limit=0.0, out=tmp_path / "case-flux.json")
    measured = json.loads((tmp_path / "case-flux.json").read_text())
    planned = case_plan.planned("toy", "flux")
    assert planned["forward_backward_flops"] > 2 * planned["forward_flops"] > 0
    assert all(peak > 2e7 for peak in planned["peak_bytes"].values())  # the weights alone, in bytes
    found = figures.figures({"case-flux": measured, "plan-flux": planned})
    for credit in CREDITS:
        assert measured["credits"][credit]["iterations"] == 1 and measured["credits"][credit]["gradient_norm"] > 0
        assert found[f"flux.{credit}.first_ratio"] <= 1e-6 and found[f"flux.{credit}.skipped"] == 0
        assert 0.3 < found[f"flux.{credit}.iteration_over_bare"] < 10  # a busy CPU keeps no time
        assert set(measured["credits"][credit]["seconds"]) == set(gpu_page.PHASES)
    assert found["flux.forward_tflops"] > 0 and found["flux.vipo_over_scalar"] > 0
    assert ("flux.sample.reserved_over_allocated" in found) == torch.cuda.is_available()  # a CPU keeps no such account


def test_bare_passes_are_the_passes_of_an_iteration() -> None:
    work = work_of(CASES["full"]["flux"].load("sample", Path("nowhere")), 1)
    bare = MEASURED["bare"]
    assert case_run.bare_passes(bare, work) == pytest.approx(16.6, abs=0.05)
    assert case_run.bare_passes(bare, work, "_one") == pytest.approx(39.6, abs=0.05)


def test_the_compiled_case_is_run_where_the_recipe_knows_the_key(tmp_path: Path) -> None:
    assert COMPILED in CASES["full"] and isinstance(CASES["full"][COMPILED], Case)
    stages = check.stages(check.PARTS, list(CASES["full"]), "full", tmp_path)
    names = [job.name for stage in stages for job in stage]
    assert ("case-flux-compiled" in names) == ("compile" in TrainingSection.model_fields)
    assert names[:4] == ["plan-flux", "plan-wan", "case-flux", "case-wan"] and all(job.hidden for job in stages[0])
    assert all((HERE / job.script).is_file() for stage in stages for job in stage)


def test_what_cannot_be_asked_for_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(monkeypatch, "--out", "x", "--only", "speed") == 2
    assert "'speed' is not one of full, quickstart, kill, tests" in capsys.readouterr().err
    assert run_check(monkeypatch, "--out", "x", "--device", "cpu") == 2
    assert "networks of published size need a GPU" in capsys.readouterr().err
