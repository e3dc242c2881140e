"""What is evaluated: a run, a plain pipeline, a pipeline with a LoRA; in parts as in one go."""

from __future__ import annotations

import inspect
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tiny
import tiny_wan
from vipo import backbones, randomness, sde
from vipo.cli import app
from vipo.errors import UserError
from vipo.evaluation.estimate import summary
from vipo.evaluation.evaluator import Sampler, scored
from vipo.generators import GENERATORS
from vipo.generators.flux import FluxGenerator
from vipo.generators.wan import WanGenerator
from vipo.options import Solver
from vipo.recipe import parse_recipe, read_judges
from vipo.runs.plain import PLAIN_STEPS
from vipo.runs.run import Run
from vipo.runs.target import Target, fingerprint, open_target
from vipo.types import Prompt

pytestmark = pytest.mark.on_cpu

SIDE, STEPS = 32, 2
PROMPTS = [Prompt(text, k) for k, text in enumerate(tiny.PROMPTS)]
LORA = "pytorch_lora_weights.safetensors"


def fresh(folder: Path) -> FluxGenerator:
    return FluxGenerator.from_pretrained(folder, device="cpu", dtype=torch.float32, height=SIDE, width=SIDE)


@pytest.fixture(scope="module")
def trained(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """An exported LoRA, and what its policy and its base score, by the policy that was exported."""
    model = fresh(model_folder)
    policy = tiny.nudged(tiny.lora(model))
    folder = tmp_path_factory.mktemp("lora")
    policy.export(model, folder)

    def redness() -> torch.Tensor:
        solver, scorer = Solver(steps=STEPS, shift=model.shift), tiny.scorer(tiny.redness)
        return scored(Sampler(model, solver, 2), scorer, PROMPTS).scores["redness"]

    with policy.reference():
        base = redness()
    return folder, redness(), base


def test_a_lora_is_the_policy_and_the_base_is_without_it(
    model_folder: Path, trained: tuple[Path, torch.Tensor, torch.Tensor]
) -> None:
    folder, policy, base = trained
    for lora in (folder, folder / LORA):
        model = open_target(str(model_folder), size=SIDE, lora=lora)
        found = model.evaluate(PROMPTS, ["redness"], samples_per_prompt=2, steps=STEPS).scores
        assert torch.allclose(found["policy"]["redness"], policy, atol=1e-5)
        assert torch.allclose(found["base"]["redness"], base, atol=1e-5)
        assert (policy - base).abs().max() > 1e-3  # or the two could be swapped unseen
    plain = (
        open_target(str(model_folder), size=SIDE)
        .evaluate(PROMPTS, ["redness"], samples_per_prompt=2, steps=STEPS)
        .scores
    )
    assert list(plain) == ["base"] and torch.allclose(plain["base"]["redness"], base, atol=1e-5)


def test_parts_are_one_go(model_folder: Path) -> None:
    model = open_target(str(model_folder), size=SIDE)
    done: list[int] = []
    whole = model.evaluate(PROMPTS, ["redness"], samples_per_prompt=2, steps=STEPS)
    parts = model.evaluate(PROMPTS, ["redness"], samples_per_prompt=2, steps=STEPS, batch_size=3, progress=done.append)
    assert done == [1, 2, 3, 4]
    assert torch.allclose(parts.scores["base"]["redness"], whole.scores["base"]["redness"], atol=1e-5)
    sampled = [part.media for part in model.sample(PROMPTS, samples_per_prompt=2, steps=STEPS, seed=5, batch_size=4)]
    (together,) = model.sample(PROMPTS, samples_per_prompt=2, steps=STEPS, seed=5)
    assert len(sampled) == 2 and torch.allclose(torch.cat(sampled), together.media, atol=1e-4)


def test_settings_tell_models_prompts_and_rewards_apart(
    model_folder: Path, trained: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    reward = tmp_path / "mine.py"
    reward.write_text("def mine(media, prompts):\n    return media.mean((1, 2, 3, 4))\n")
    name, how = f"{reward}:mine", {"samples_per_prompt": 2, "steps": None, "batch_size": 64}
    plain = open_target(str(model_folder), size=SIDE)
    settings = plain.settings(PROMPTS, [name], **how)
    assert settings["steps"] == PLAIN_STEPS["flux"] and settings == plain.settings(PROMPTS, [name], **how)
    other = plain.settings(
        [*PROMPTS[:3], replace(PROMPTS[3], metadata={"tag": 1})], ["redness"], **{**how, "samples_per_prompt": 3}
    )
    assert {key for key in settings if settings[key] != other[key]} == {"prompts", "rewards", "samples_per_prompt"}
    with_lora = open_target(str(model_folder), size=SIDE, lora=trained[0]).settings(PROMPTS, [name], **how)
    assert {key for key in settings if settings[key] != with_lora[key]} == {"weights", "lora"}
    reward.write_text("def mine(media, prompts):\n    return media.amax((1, 2, 3, 4))\n")
    assert plain.settings(PROMPTS, [name], **how)["rewards"] != settings["rewards"]


def test_one_reward_scores_twice_with_other_options(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "judges.yaml"
    file.write_text(
        "coarse: {reward: jpeg_compressibility, options: {quality: 5}}\nfine: {reward: jpeg_compressibility}\n"
    )
    model = open_target(str(model_folder), size=SIDE).with_rewards(read_judges(file))
    scores = model.evaluate(PROMPTS[:2], ["coarse", "fine"], samples_per_prompt=1, steps=STEPS).scores["base"]
    assert (scores["coarse"] > scores["fine"]).all()  # fewer kilobytes
    told = model.settings(PROMPTS[:2], ["coarse", "fine"], samples_per_prompt=1, steps=STEPS, batch_size=4)["rewards"]
    assert told["coarse"]["options"] == {"reward": "jpeg_compressibility", "quality": 5} != told["fine"]["options"]


def test_a_fingerprint_sees_the_smallest_training_step() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 3))
    before = fingerprint(network)
    assert fingerprint(network) == before
    with torch.no_grad():
        network[1].bias += 1e-6
    assert fingerprint(network) != before


def test_a_run_keeps_the_options_of_its_rewards(model_folder: Path, tmp_path: Path) -> None:
    reward = {"jpeg_compressibility": {"weight": 1.0, "options": {"quality": 10}}}
    changes = {"training__iterations": 1, "rewards": reward, "evaluation__every": None}
    list(Run(parse_recipe(tiny.recipe(model_folder, tmp_path / "prompts.txt", **changes)), tmp_path / "run"))
    model = open_target(str(tmp_path / "run"))
    assert model.rewards["jpeg_compressibility"].options == {"quality": 10}
    logged = tiny.lines(tmp_path / "run" / "evaluations.jsonl")
    found = model.evaluate(model.evaluation_prompts(), list(model.rewards), samples_per_prompt=1, steps=None)
    for model_name, line in (("base", logged[0]), ("policy", logged[-1])):
        assert found.scores[model_name]["jpeg_compressibility"].tolist() == pytest.approx(
            line["values"]["jpeg_compressibility"], abs=0.02
        )
    assert len(summary(found)) == 2
    with pytest.raises(UserError, match="is a run and has a policy of its own"):
        open_target(str(tmp_path / "run"), lora=tmp_path)
    with pytest.raises(UserError, match="is a run and samples as it was trained; leave out --height and --frames"):
        open_target(str(tmp_path / "run"), height=64, frames=5)


def test_a_lora_that_does_not_fit_is_refused(model_folder: Path, trained: tuple[Path, object, object]) -> None:
    folder = trained[0].parent / "bad"
    folder.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=r"'lost\.safetensors' does not exist"):
        open_target(str(model_folder), size=SIDE, lora=Path("lost.safetensors"))
    (folder / LORA).write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a safetensors file that can be read") as raised:
        open_target(str(model_folder), size=SIDE, lora=folder)
    assert "\n" not in str(raised.value)


def test_a_generator_without_a_pipeline_takes_no_lora(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = fresh(model_folder)
    del bare.pipeline
    monkeypatch.setattr("vipo.runs.target.build_generator", lambda *_arguments, **_options: bare)
    with pytest.raises(UserError, match="FluxGenerator takes no LoRA"):
        open_target(str(model_folder), size=SIDE, lora=model_folder)


def test_the_base_stays_off_only_inside(model_folder: Path, trained: tuple[Path, object, object]) -> None:
    model = open_target(str(model_folder), size=SIDE, lora=trained[0])
    assert model.reference is not None

    def picture(present: Target) -> torch.Tensor:
        return next(present.sample(PROMPTS[:1], samples_per_prompt=1, steps=STEPS, seed=0)).media

    before = picture(model)
    with pytest.raises(RuntimeError), model.reference():
        assert not torch.equal(picture(model), before)
        raise RuntimeError
    assert torch.equal(picture(model), before) and model.models["policy"] is nullcontext


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.save_pipeline(tmp_path_factory.mktemp("wan") / "wan")


def test_a_plain_video_model_samples_clips_of_the_size_asked_for(video_folder: Path) -> None:
    model = open_target(str(video_folder), height=32, width=48, frames=9)
    (part,) = model.sample(PROMPTS[:1], samples_per_prompt=2, steps=1, seed=0)
    assert part.media.shape == (2, 3, 9, 32, 48)
    assert model.solver.steps == 50 and model.solver.shift == tiny_wan.SHIFT
    square = open_target(str(video_folder), size=32, frames=1)
    assert square.generator.latent_shape() == (4, 1, 4, 4)
    assert (square.batch_size, model.batch_size) == (64, 7)  # 64 frames


def test_the_command_line_hands_on_size_and_tail(video_folder: Path, tmp_path: Path) -> None:
    def vipo(command: str, *more: str | Path) -> BaseException | None:
        size = ["--height", "32", "--width", "48", "--steps", "1", "--prompts", "a cat"]
        return CliRunner().invoke(app, [command, str(video_folder), *size, *map(str, more)]).exception

    assert vipo("sample", "--frames", "5", "--output", tmp_path) is None
    (clip,) = (Image.open(file) for file in tmp_path.iterdir())
    assert clip.size == (48, 32) and clip.n_frames == 5
    assert "a base tail needs a policy" in str(vipo("sample", "--frames", "5", "--base-tail", "0.5"))
    assert "nearest is frames=5" in str(vipo("evaluate", "--rewards", "redness", "--frames", "6"))
    assert "give it or them" in str(vipo("evaluate", "--rewards", "redness", "--size", "32"))


@pytest.mark.parametrize(
    ("kind", "shape", "low"),
    [("2.1", (4, 21, 60, 104), (4, 21, 8, 104)), ("2.2-5B", (6, 31, 44, 80), (6, 31, 4, 80))],
    ids=["480p, 81 frames", "720p, 121 frames"],
)
def test_a_video_model_has_its_familys_size_unless_told(
    tmp_path: Path, kind: tiny_wan.Kind, shape: tuple[int, ...], low: tuple[int, ...]
) -> None:
    model = open_target(str(tiny_wan.save_pipeline(tmp_path, kind)))
    assert isinstance(model.generator, WanGenerator) and model.generator.latent_shape() == shape
    assert model.batch_size == 1
    assert open_target(str(tmp_path), height=64).generator.latent_shape() == low


def test_a_picture_model_takes_the_side_of_its_autoencoder_unless_told(model_folder: Path, tmp_path: Path) -> None:
    assert open_target(str(model_folder)).generator.latent_shape() == (4, 1, 8, 8)
    assert open_target(str(model_folder), width=48).generator.latent_shape() == (4, 1, 8, 12)
    silent = shutil.copytree(model_folder, tmp_path / "silent")
    config = silent / "vae" / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "sample_size"}))
    assert open_target(str(silent)).generator.latent_shape() == (4, 1, 256, 256)
    with pytest.raises(UserError, match=r"makes pictures: generator\.frames=5"):
        open_target(str(model_folder), frames=5)


def test_sizes_that_contradict_each_other_are_refused(model_folder: Path) -> None:
    with pytest.raises(UserError, match="--size is short for --height and --width"):
        open_target(str(model_folder), size=32, height=48)
    with pytest.raises(UserError, match=r"size: height: .*greater than 0"):
        open_target(str(model_folder), height=-8)


def test_every_family_has_the_steps_of_its_diffusers_pipeline() -> None:
    usual = {}
    for name, entry in GENERATORS.items():
        call = getattr(diffusers, entry.pipelines[0]).__call__
        usual[name] = inspect.signature(call).parameters["num_inference_steps"].default
    assert usual == PLAIN_STEPS


def test_what_is_no_pipeline_is_not_taken_for_one(video_folder: Path, tmp_path: Path) -> None:
    """A hub id is looked up, not guessed at: the tests are offline, so there is nothing to be seen."""
    for nothing, why in (
        (str(tmp_path), "Cause"),
        ("some-lab/a-model", "HF_HUB_OFFLINE is set, so the hub is not asked"),
    ):
        with pytest.raises(UserError, match=f"'{nothing}' is neither a run directory nor a diffusers pipeline.*{why}"):
            open_target(nothing)
    index = json.loads((video_folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "LTXPipeline"}))
    with pytest.raises(UserError, match=r"is a LTXPipeline; vipo adapts .*FluxPipeline.*WanPipeline"):
        open_target(str(tmp_path))


def test_a_hub_that_does_not_answer_is_told_at_once(monkeypatch: pytest.MonkeyPatch, silent_hub: str) -> None:
    """Without this, huggingface_hub tries for half a minute, for each file that is looked for."""
    waits: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    for _ in range(2):
        with pytest.raises(UserError, match=f"not in the hub's cache here, and {silent_hub} does not answer"):
            open_target("some-lab/a-model")
    with pytest.raises(UserError, match=r"found no config\.json at .* does not answer \(\w+\)$"):
        backbones.build("dinov2", pretrained="some-lab/a-model")
    assert not waits


def test_the_base_model_takes_the_tail(model_folder: Path, trained: tuple[Path, object, object]) -> None:
    model = open_target(str(model_folder), size=SIDE, lora=trained[0])
    assert model.reference is not None

    def latents(base_tail: float, steps: int = 4) -> torch.Tensor:
        return next(model.sample(PROMPTS[:2], samples_per_prompt=2, steps=steps, seed=3, base_tail=base_tail)).latents

    policy = next(model.sample(PROMPTS[:2], samples_per_prompt=2, steps=4, seed=3))
    with model.reference():
        base = next(model.sample(PROMPTS[:2], samples_per_prompt=2, steps=4, seed=3)).latents
    assert torch.equal(latents(0.0), policy.latents) and torch.equal(latents(1.0), base)
    assert (policy.latents - base).abs().max() > 1e-3

    keys = [(0, sample) for sample in range(4)]
    z = randomness.normal(model.generator.latent_shape(), keys, seed=3, purpose="initial noise")
    sigmas = sde.shifted_sigmas(4, model.solver.shift)
    for step in range(4):  # by hand: two steps each
        with torch.no_grad(), model.reference() if step >= 2 else nullcontext():
            velocity = model.generator.velocity(z, sigmas[step].expand(4), policy.conditioning)
        z = z + (sigmas[step + 1] - sigmas[step]) * velocity
    assert torch.allclose(latents(0.5), z, atol=1e-5)
    assert not torch.allclose(latents(0.25), z, atol=1e-3) and not torch.allclose(latents(0.75), z, atol=1e-3)
    assert torch.equal(latents(0.0), policy.latents)  # and it is switched back on


def test_a_tail_needs_a_base_model(model_folder: Path, trained: tuple[Path, object, object]) -> None:
    plain = open_target(str(model_folder), size=SIDE)
    with pytest.raises(UserError, match="a base tail needs a policy and its base model; give a run"):
        next(plain.sample(PROMPTS[:1], samples_per_prompt=1, steps=1, seed=0, base_tail=0.5))
    both = open_target(str(model_folder), size=SIDE, lora=trained[0])
    with pytest.raises(UserError, match=r"a base tail of 1\.5 is no share"):
        next(both.sample(PROMPTS[:1], samples_per_prompt=1, steps=1, seed=0, base_tail=1.5))


RATED = """
class Rated:
    def __init__(self, *, media_fps=1.0):
        self.rate = float(media_fps)
    def __call__(self, media, prompts):
        return media.new_full((len(media),), self.rate)
"""


@pytest.fixture
def rated(tmp_path: Path) -> str:
    (tmp_path / "rated.py").write_text(RATED)
    return f"{tmp_path / 'rated.py'}:Rated"


def test_rewards_of_a_plain_model_get_the_rate_of_its_clips(video_folder: Path, rated: str, tmp_path: Path) -> None:
    size = {"height": 32, "width": 48, "frames": 5}
    for fps, rate in ((None, 16.0), (12.0, 12.0)):
        model = open_target(str(video_folder), fps=fps, **size)
        scores = model.evaluate(PROMPTS[:1], [rated], samples_per_prompt=1, steps=1).scores["base"][rated]
        assert scores.tolist() == [rate] and model.fps == rate and model.notices(PROMPTS, [rated]) == []
    (tmp_path / "judges.yaml").write_text(
        f"a: {{reward: '{rated}'}}\nb: {{reward: '{rated}', options: {{media_fps: 3}}}}\n"
    )
    model = model.with_rewards(read_judges(tmp_path / "judges.yaml"))
    found = model.evaluate(PROMPTS[:1], ["a", "b"], samples_per_prompt=1, steps=1).scores["base"]
    assert (found["a"].item(), found["b"].item()) == (12.0, 3.0)
    assert model.notices(PROMPTS, ["a"]) == []
    assert model.notices(PROMPTS, ["a", "b"]) == [
        "reward 'b' has media_fps=3, but the clips have 12 frames per second; left out, it is theirs"
    ]
    slow, fast = (open_target(str(video_folder), fps=fps, **size) for fps in (8.0, 16.0))
    how = {"samples_per_prompt": 1, "steps": 1, "batch_size": 1}
    assert slow.settings(PROMPTS, [rated], **how) != fast.settings(PROMPTS, [rated], **how)


@pytest.mark.parametrize(("kind", "fps"), [("2.1", 16.0), ("2.2-5B", 24.0)])
def test_a_video_models_clips_have_its_familys_rate(tmp_path: Path, kind: tiny_wan.Kind, fps: float) -> None:
    assert open_target(str(tiny_wan.save_pipeline(tmp_path, kind)), height=64, width=96, frames=5).fps == fps


def test_the_command_line_tells_of_cut_prompts_and_rates_on_the_error_stream(
    video_folder: Path, rated: str, tmp_path: Path
) -> None:
    (tmp_path / "judges.yaml").write_text(f"b: {{reward: '{rated}', options: {{media_fps: 3}}}}\n")
    long = "a cat and a dog " * 9
    size = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "1", "--prompts", long, "--prompts", "a cat"]

    def vipo(command: str, *more: str) -> tuple[str, str]:
        result = CliRunner().invoke(app, [command, str(video_folder), *size, *more])
        assert result.exception is None
        return result.stdout, result.stderr

    told = "1 of 2 given prompts longer than the 16 tokens that UMT5 reads, the rest is cut; the first is 'a cat and"
    printed, warned = vipo(
        "evaluate", "--allow-code", "--rewards", str(tmp_path / "judges.yaml"), "--count", "1", "--json", "--fps", "4"
    )
    assert told in warned and "has media_fps=3, but the clips have 4 frames" in warned
    assert [row["reward"] for row in json.loads(printed)] == ["b"]
    printed, warned = vipo("sample", "--output", str(tmp_path / "clips"))
    assert told in warned and told not in printed
    with Image.open(sorted((tmp_path / "clips").iterdir())[0]) as clip:
        clip.load()
        assert clip.info["duration"] == 62  # Wan2.1's 16 frames per second, in milliseconds


def test_a_run_has_a_rate_of_its_own(model_folder: Path, tmp_path: Path) -> None:
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", training__iterations=1)
    raw["generator"]["fps"] = 5.0
    for _ in Run(parse_recipe(raw), tmp_path / "run"):
        pass
    assert open_target(str(tmp_path / "run")).fps == 5.0
    with pytest.raises(UserError, match="samples as it was trained; leave out --fps"):
        open_target(str(tmp_path / "run"), fps=8.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_plain_model_has_weights_of_the_type_asked_for(
    model_folder: Path, trained: tuple[Path, torch.Tensor, torch.Tensor], dtype: str
) -> None:
    model, plain = (open_target(str(model_folder), size=SIDE, dtype=kind, lora=trained[0]) for kind in (dtype, None))
    weight = model.generator.network.proj_out.weight
    assert weight.dtype == getattr(torch, dtype) and plain.generator.network.proj_out.weight.dtype == torch.float32
    how = {"samples_per_prompt": 2, "steps": STEPS}
    scores = model.evaluate(PROMPTS, ["redness"], **how).scores
    for found, exact in ((scores["policy"], trained[1]), (scores["base"], trained[2])):
        assert torch.allclose(found["redness"], exact, atol=0.02) and not torch.equal(found["redness"], exact)
    told, usual = (one.settings(PROMPTS, ["redness"], **how, batch_size=4) for one in (model, plain))
    assert told["generator"]["dtype"] == dtype and told != usual


def test_the_command_line_hands_on_the_type_of_the_weights(model_folder: Path, tmp_path: Path) -> None:
    def vipo(*arguments: str | Path) -> str:
        result = CliRunner().invoke(app, list(map(str, arguments)))
        return f"{result.stdout}{result.stderr}{result.exception}"

    plain = ["--size", SIDE, "--steps", 1, "--prompts", "a cat"]
    vipo("sample", model_folder, *plain, "--output", tmp_path / "exact")
    vipo("sample", model_folder, *plain, "--output", tmp_path / "half", "--dtype", "bfloat16")
    exact, half = (next((tmp_path / name).iterdir()).read_bytes() for name in ("exact", "half"))
    assert exact != half
    folder = tmp_path / "scores"
    vipo("evaluate", model_folder, *plain, "--rewards", "redness", "--dtype", "bfloat16", "--output", folder)
    assert json.loads((folder / "settings.json").read_text())["generator"]["dtype"] == "bfloat16"
    assert "float64" in vipo("sample", model_folder, *plain, "--dtype", "float64")
    (tmp_path / "recipe.yaml").write_text("")
    assert "samples as it was trained; leave out --dtype" in vipo("sample", tmp_path, "--dtype", "float16")
