"""Generators, map sources, backbones, credits and losses of the user's own, by ``file.py:thing``."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
import vipo as package
from terminal import Vipo, assert_refused
from vipo import backbones
from vipo.assemble import build_generator, build_map_source
from vipo.cli.catalogue import CATALOGUES
from vipo.cli.listing import OWN
from vipo.errors import UserError
from vipo.fetch.needs import needs
from vipo.options import Objective, Solver
from vipo.recipe import load_recipe
from vipo.runs.inputs import fingerprints
from vipo.schema import GeneratorSection, Recipe
from vipo.sde import Transition
from vipo.structuring.sources import Own
from vipo.training import losses
from vipo.training.credit import OwnCredit
from vipo.types import Generator, Scores, TrainStep
from vipo.user_file import CREDIT, SOURCE, load_part

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "parts-your-own.md").read_text()
COMMANDS = {
    key: shlex.split(line)[3:-2]
    for key in ("generator.name", "sources", "backbone", "credit", "loss")
    for line in re.findall(
        rf"^vipo train quickstart \S*{key}=.*$|^vipo train quickstart \"\S*{key}=.*$", PAGE, re.MULTILINE
    )
}
PARTS = """
from pathlib import Path
import torch
from vipo.types import FeatureMap
from vipo.generators.flux import FluxGenerator
from vipo.generators.wan import WanGenerator
from vipo.training.losses import Clipped, Cost
Path(__file__).with_name("ran").touch()

def source(rollout, advantage, scores):
    return torch.ones(len(advantage), *rollout.latent_grid)

def backbone(images):
    return FeatureMap(images[:, :, ::8, ::8], 8)

def credit(advantage):
    return advantage

def reward(media, prompts):
    return media.mean((1, 2, 3, 4))

class Loss(Clipped):
    pass

class Flux(FluxGenerator):
    pass

def plain(path, *, height, width, options=None):
    return FluxGenerator.from_pretrained(path, device="cpu", dtype=torch.float32, height=height, width=width)

def short(rollout, advantage, scores): return torch.ones(2, 1, 1, 1)
def negative(rollout, advantage, scores): return -source(rollout, advantage, scores)
def unbounded(rollout, advantage, scores): return source(rollout, advantage, scores) / 0
def listed(rollout, advantage, scores): return [1.0]
def broken(rollout, advantage, scores): raise KeyError("colour")
def features(images): return images
def blank(images): return FeatureMap(images[:, :, ::8, ::8] * torch.nan, 8)
def flat(advantage): return advantage[:, None]
def whole(advantage): return advantage.long()
def infinite(advantage): return advantage + torch.inf
def asking(rewards): return rewards

class Number(Clipped):
    def cost(self, answer, rows, weight): return weight.mean()
class Detached(Clipped):
    def surrogate(self, new, old, weight):
        cost = super().surrogate(new, old, weight)
        return Cost(cost.loss.detach(), cost.numbers, cost.deviation)
class Infinite(Clipped):
    def surrogate(self, new, old, weight):
        cost = super().surrogate(new, old, weight)
        return Cost(cost.loss * torch.inf, cost.numbers, cost.deviation)
class NoLoss:
    def __init__(self, objective, solver): pass

class Listing(FluxGenerator):
    def encode(self, prompts): return list(prompts)
class OneRow(FluxGenerator):
    def encode(self, prompts): return super().encode(prompts[:1])
class Flat(FluxGenerator):
    def velocity(self, *given): return super().velocity(*given)[:, :, 0]
class Half(FluxGenerator):
    def velocity(self, *given): return super().velocity(*given).half()
class Raising(FluxGenerator):
    def velocity(self, *given): raise KeyError("sigma")
class Bright(FluxGenerator):
    def decode(self, latents): return super().decode(latents) * 255
class Large(FluxGenerator):
    def decode(self, latents): return super().decode(latents).repeat(1, 1, 1, 2, 2)
class Film(WanGenerator): pass
class NoGenerator:
    def __init__(self, path): self.network, self.shift = torch.nn.Linear(1, 1), 1.0
class NoNetwork(FluxGenerator):
    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.network = lambda: None
class Shapeless(FluxGenerator):
    def latent_shape(self): return self.grid
"""
PLACES = {
    "generator.name": ("Flux", "generator.name={}"),
    "rewards": ("reward", "rewards={{{}: 1.0}}"),
    "judges": ("reward", "judges=[{}]"),
    "credit": ("credit", "credit={}"),
    "objective.loss": ("Loss", "objective.loss={}"),
    "structuring.sources": ("source", "structuring.sources=[{}]"),
    "structuring.backbone": ("backbone", "structuring.backbone={}"),
}  # wherever a recipe takes file.py:thing


@pytest.fixture
def parts(tmp_path: Path) -> str:
    (tmp_path / "parts.py").write_text(PARTS)
    return f"{tmp_path}/parts.py"


@pytest.fixture
def written(tmp_path: Path, model_folder: Path) -> Path:
    changes = {"credit": "advantage_map", "structuring": {"sources": ["deviation"]}, "training__iterations": 1}
    return tiny.write_recipe(tmp_path / "recipe.yaml", tiny.recipe(model_folder, tmp_path / "prompts.txt", **changes))


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> TrainStep:
    folder = tmp_path_factory.mktemp("step")
    raw = tiny.recipe(model_folder, folder / "prompts.txt", training__iterations=1)
    return one_step(tiny.write_recipe(folder / "recipe.yaml", raw))


def one_step(recipe: Path, *overrides: str) -> TrainStep:
    (step,) = package.train(load_recipe(recipe, overrides))
    return step


@pytest.mark.parametrize("place", PLACES)
def test_code_that_a_recipe_names_anywhere_needs_a_word_of_the_user(
    tmp_path: Path, written: Path, parts: str, vipo: Vipo, place: str
) -> None:
    thing, how = PLACES[place]
    override = how.format(f"{parts}:{thing}")
    recipe = load_recipe(written, [override])
    theirs = tiny.write_recipe(tmp_path / "theirs.yaml", recipe.model_dump(mode="json"))
    said = vipo("train", theirs, "--output", tmp_path / "run")
    assert_refused(said, "--allow-code", f"parts.py:{thing}", place.replace("judges", "rewards") + "=")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()
    assert load_recipe(theirs, [override], allow_code=False) == load_recipe(theirs) == recipe  # named by the user


def test_every_place_of_the_schema_that_takes_a_file_is_among_those_tested() -> None:
    told = {row["key"] for row in CATALOGUES["keys"]() if "file.py:" in row["meaning"]}
    options = {key for key in told if "options" in key}
    assert told - options == set(PLACES) - {"judges"}  # judges are rewards


def test_every_list_of_parts_says_how_one_of_your_own_begins(vipo: Vipo) -> None:
    kinds = [kind for kind in CATALOGUES if kind not in ("prompts", "recipes", "keys")]
    assert kinds == list(OWN)
    for kind in kinds:
        said = vipo("list", kind).out
        assert "file.py:thing" in said and OWN[kind].example in said
    assert "file.py:thing" not in vipo("list", "losses", "--json").out


@pytest.mark.parametrize("name", ["generator", "source", "backbone", "credit", "loss"])
def test_the_page_shows_the_examples_as_they_are(name: str) -> None:
    assert (ROOT / f"docs/examples/my_{name}.py").read_text() in PAGE


def test_every_command_of_the_page_trains(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert len(COMMANDS) == 5 and all(COMMANDS.values())
    step = one_step(written, *COMMANDS["sources"])
    bright = torch.nn.functional.adaptive_avg_pool2d(step.rollout.media.mean(1), step.maps.shape[-2:])
    assert torch.corrcoef(torch.stack([step.maps.flatten(), bright.flatten()]))[0, 1] > 0.5
    assert step.metrics["grad_norm"] > 0
    joined = [word for key in ("generator.name", "backbone", "credit", "loss") for word in COMMANDS[key]]
    step = one_step(written, "structuring.sources=[perceptual]", *joined)
    assert step.metrics["grad_norm"] > 0 and step.metrics["map/mean"] == pytest.approx(1, abs=1e-5)
    on_white = tiny.generator(Path(load_recipe(written).generator.path)).encode(["a cat on a white background"])
    (row,) = [n for n, prompt in enumerate(step.rollout.prompts) if prompt.text == "a cat"][:1]
    assert torch.equal(step.rollout.conditioning.prompt_embeds[row], on_white.prompt_embeds[0])
    assert backbones.build("docs/examples/my_backbone.py:Colours", cell=4)(torch.rand(2, 3, 8, 12)).features.shape == (
        *(2, 6, 2, 3),
    )


def test_a_part_that_does_what_vipos_does_trains_bit_for_bit_the_same(written: Path, parts: str) -> None:
    ones = [f"structuring.sources=[{parts}:source]", f"objective.loss={parts}:Loss"]
    assert one_step(written, *ones).metrics["grad_norm"] == one_step(written, "credit=uniform").metrics["grad_norm"]
    mine = one_step(written, f"credit={parts}:credit", f"generator.name={parts}:Flux")
    assert mine.metrics == one_step(written, "credit=sample").metrics and mine.maps is None
    plain = one_step(written, "credit=sample", f"generator.name={parts}:plain", "generator.options={options: null}")
    assert plain.metrics == mine.metrics


WRONG = {
    "source": {
        "short": r"\(2, 1, 1, 1\)",
        "negative": "below 0",
        "unbounded": "not finite",
        "listed": "a list",
        "broken": "KeyError: 'colour'",
        "gone": "has no 'gone'",
    },
    "backbone": {"features": "a Tensor", "blank": "not finite"},
    "credit": {
        "flat": "the shape",
        "whole": "int64",
        "infinite": "not finite",
        "asking": "asks for 'rewards'",
    },
    "loss": {
        "Number": "a Tensor from cost",
        "Detached": "without a gradient",
        "Infinite": "not finite",
        "NoLoss": "keep_steps",
        "credit": "does not take",
    },
    "generator": {
        "Listing": "a list from encode",
        "OneRow": "1 rows from encode.* here 2",
        "Flat": r"the shape \(2, 4, 6, 10\)",
        "Half": "float16 from velocity",
        "Raising": "raised KeyError: 'sigma'",
        "Bright": "media from",
        "Large": r"\(2, 3, 1, 48, 80\)",
        "Film": "reads a WanPipeline, but",
        "NoGenerator": "it has no temporal_stride, .* velocity",
        "NoNetwork": "is a function",
        "Shapeless": r"latent_shape\(\) \(6, 10\)",
        "credit": "made a str",
    },
}


def asked(kind: str, name: str, step: TrainStep, model: Path) -> Any:
    """What training asks of a part, with the samples of a real step."""
    rollout, rows = step.rollout, step.rollout.transitions
    if kind == "generator":
        return through(own_generator(name, model))
    if kind == "source":
        return Own(name, load_part(SOURCE, name))(rollout, step.advantage, step.scores)
    if kind == "backbone":
        return backbones.build(name)(rollout.media[:, :, 0])
    if kind == "credit":
        credit = OwnCredit(name, load_part(CREDIT, name))
        return credit(Objective(0.1), step.scores, step.advantage, None, rollout, torch.ones(3))
    loss = losses.build(Objective(0.1, loss=name), Solver(3))
    answer = Transition(rows.next_latents.clone().requires_grad_(), torch.ones(len(rows.sigma), 1, 1, 1, 1))
    return loss.cost(answer, rows, torch.ones_like(rows.log_prob))


def own_generator(name: str, path: Path, **settings: Any) -> Generator:
    section = GeneratorSection(name=name, path=str(path), height=tiny.HEIGHT, width=tiny.WIDTH, **settings)
    return build_generator(section, device="cpu")


def through(generator: Generator) -> torch.Tensor:
    """All that a rollout asks of it, once."""
    latents = torch.zeros(2, *generator.latent_shape())
    velocity = generator.velocity(latents, torch.full((2,), 0.5), generator.encode(["a cat", "a car"]))
    return generator.decode(velocity)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("kind", "thing"), [(kind, thing) for kind, wrong in WRONG.items() for thing in wrong])
def test_a_wrong_part_is_told_by_its_file_and_name(
    step: TrainStep, parts: str, model_folder: Path, kind: str, thing: str
) -> None:
    right = {"loss": "Loss", "generator": "Flux"}.get(kind, kind)
    asked(kind, f"{parts}:{right}", step, model_folder)
    with pytest.raises(UserError, match=WRONG[kind][thing]) as told:
        asked(kind, f"{parts}:{thing}", step, model_folder)
    assert "parts.py" in str(told.value) and thing in str(told.value) and "\n" not in str(told.value)


@pytest.mark.usefixtures("unchecked")
def test_a_signed_source_keeps_its_sign_or_is_refused(step: TrainStep, parts: str) -> None:
    """A product of maps is cut at 0, which must not happen without a word."""
    stands_for: Any = SimpleNamespace(temporal_stride=1)

    def made(*sources: str) -> torch.Tensor:
        section = load_recipe("quickstart", [f"structuring.sources=[{', '.join(sources)}]"]).structuring
        source = build_map_source(section, stands_for, stands_for, "cpu", signed=True)
        return source(step.rollout, step.advantage, step.scores)

    assert (made(f"{parts}:negative") < 0).all()
    with pytest.raises(UserError, match=r"below 0 .* is cut where sources are multiplied"):
        made(f"{parts}:negative", "deviation")


def test_the_command_line_ends_with_that_sentence(tmp_path: Path, written: Path, parts: str, vipo: Vipo) -> None:
    said = vipo("train", written, f"credit={parts}:flat", "--no-report", "--output", tmp_path / "run")
    assert said.code == 2 and "parts.py:flat" in said.err and "Traceback" not in said.err


def test_a_credit_is_given_what_it_asks_for_and_an_unscored_sample_weighs_nothing(step: TrainStep) -> None:
    scores = Scores({"a": torch.tensor([1.0, torch.nan, 3.0, -4.0, 0.1, 0.2])}, {"a": 1.0})
    credit = OwnCredit("mine.py:mine", lambda scores: scores.total * 10)
    found = credit(Objective(0.1), scores, torch.zeros(6), None, step.rollout, torch.ones(2))
    assert found.local.tolist() == [5.0, 0.0, 5.0, -5.0, 1.0, 2.0]  # within advantage_clip


def test_options_reach_a_source_beside_those_of_others(tmp_path: Path, written: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "class Level:\n"
        "    def __init__(self, *, level, normalization): self.level, self.how = level, normalization\n"
        "    def __call__(self, rollout, advantage, scores):\n"
        "        assert self.how == 'unit_mean' and set(scores.by_name) == {'redness'}\n"
        "        return torch.full((len(advantage), *rollout.latent_grid), self.level)\n"
    )
    name = f"{tmp_path}/own.py:Level"
    given = [
        f"structuring.sources=[{name}]",
        f"structuring.source_options={{deviation: {{power: 0.5}}, {name}: {{level: 2.0}}}}",
    ]
    assert one_step(written, *given).metrics["map/mean"] == 2
    recipe = load_recipe(written, given)
    assert recipe.structuring.source_options.deviation.power == 0.5
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    with pytest.raises(UserError, match="height"):
        one_step(written, given[0], f"structuring.source_options={{{name}: {{height: 2.0}}}}")


def test_a_generator_is_not_asked_for_what_it_does_not_take(parts: str, model_folder: Path) -> None:
    for key, value in {"dtype": "bfloat16", "quantization": "nf4", "frames": 5}.items():
        with pytest.raises(UserError, match=f"takes no {key}, so generator.{key}={value}"):
            own_generator(f"{parts}:plain", model_folder, **{key: value})
    pipeline = tiny.generator(model_folder).pipeline
    section = GeneratorSection(name=f"{parts}:Flux", path="-", height=tiny.HEIGHT, width=tiny.WIDTH)
    made = build_generator(section, device="cpu", pipeline=pipeline)
    assert made.network is pipeline.transformer and made.encode(prompts=["a cat"])
    with pytest.raises(UserError, match="loads its model itself"):
        build_generator(section.model_copy(update={"name": f"{parts}:plain"}), device="cpu", pipeline=pipeline)


def test_text_that_a_file_reads_is_not_taken_for_that_of_another_state_of_it(
    tmp_path: Path, parts: str, model_folder: Path
) -> None:
    def encoded() -> int:
        kept = own_generator(f"{parts}:Flux", model_folder).keep_text(["a cat"], folder=tmp_path / "text")  # type: ignore[attr-defined]
        return kept.counts.encoded

    assert [encoded(), encoded()] == [1, 0]
    Path(parts).write_text(PARTS + "\n")
    assert encoded() == 1


def test_a_run_with_a_generator_by_file_is_resumed_sampled_and_exported(
    tmp_path: Path, written: Path, parts: str, vipo: Vipo
) -> None:
    run, named = tmp_path / "run", f"generator.name={parts}:Flux"
    few = ["evaluation.limit=1", "prompts.per_iteration=1", "prompts.group_size=2"]
    assert vipo("train", written, named, *few, "--no-report", "--output", run).code == 0
    (tmp_path / "ran").unlink()
    for command in (["sample", run, "--output", tmp_path / "s"], ["export", run], ["evaluate", run]):
        assert_refused(vipo(*command), "--allow-code", "parts.py:Flux")
    assert not (tmp_path / "ran").exists()
    for command in (["sample", run, "--output", tmp_path / "s", "--prompts", "a cat"], ["export", run]):
        said = vipo(*command, "--allow-code")
        assert said.code == 0, said
    assert (run / "export" / "README.md").is_file() and list((tmp_path / "s").glob("*.png"))
    Path(parts).write_text(PARTS + "\n")
    again = ["train", written, named, *few, "training.iterations=2", "--no-report", "--output", run, "--resume"]
    assert_refused(vipo(*again), "inputs.generator.name", "--allow-changes")
    assert_refused(vipo(*again, "generator.name=flux"), "generator.name", "can never change")


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("credit=mine", "'advantage_map', .* or file.py:thing"),
        ("objective.loss=mine", "'clipped', .* or file.py:thing"),
        ("structuring.sources=[mine]", "'perceptual', .* or file.py:thing"),
        ("credit_options={a: 1}", "credit=advantage_map is not"),
        ("objective.loss_options={a: 1}", "objective.loss=clipped is not"),
        ("structuring.source_options={mine.py:x: {}}", "do not name"),
        ("structuring.source_options={own: 3}", "own"),
        ("structuring.backbone=mine", "file.py:thing"),
        ("generator.name=mine", "no generator 'mine'; .* or give file.py:thing"),
    ],
)
def test_a_recipe_says_what_it_takes(written: Path, override: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        one_step(written, override, *(["structuring.sources=[perceptual]"] if "backbone" in override else []))


def test_a_resume_notices_that_a_part_has_changed(written: Path, parts: str) -> None:
    overrides = [how.format(f"{parts}:{thing}") for thing, how in PLACES.values() if thing != "reward"]
    recipe = load_recipe(written, overrides)
    before = fingerprints(recipe)
    Path(parts).write_text(PARTS + "\n")
    after = fingerprints(recipe)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"generator.name", "credit", "objective.loss", "structuring.backbone", "structuring.sources.0"}


def test_a_loss_that_records_steps_needs_a_solver_with_a_likelihood(parts: str) -> None:
    with pytest.raises(UserError, match="keep_steps"):
        losses.build(Objective(0.1, loss=f"{parts}:Loss"), Solver(3, kind="ode"))
    plain = losses.without_code(Objective(0.1, loss="nowhere.py:Loss"), Solver(3))
    assert isinstance(plain, losses.Clipped)


def test_a_plan_and_a_fetch_run_none_of_the_code(tmp_path: Path, written: Path, parts: str, vipo: Vipo) -> None:
    overrides = [how.format(f"{parts}:{thing}") for thing, how in PLACES.values() if thing != "reward"]
    planned = vipo("plan", written, *overrides)
    assert planned.code == 0, planned
    said = " ".join((planned.out + planned.err).split())
    assert f"generator {parts}:Flux is counted as flux" in said
    assert "parts.py:source" in said and "parts.py:Loss" in said and "parts.py:credit" in said
    here = next(
        need
        for need in needs(load_recipe(written, [*overrides, f"rewards={{{parts}:reward: 1.0}}"]))
        if need.name == parts
    )
    assert here.state == "there" and set(here.used_by) == {
        "generator",
        "credit",
        "loss",
        "map source",
        f"reward {parts}:reward",
    }
    assert not (tmp_path / "ran").exists()
