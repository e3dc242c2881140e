"""Plans against what really happens: passes counted while sampling, memory measured while training, at tiny size."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import tiny
from vipo.errors import UserError
from vipo.generators.flux import FluxText
from vipo.options import BUCKET, Solver, Window
from vipo.plan import Ledger, Machine, Plan, advise, plan, propose
from vipo.plan.account import Accountant
from vipo.plan.batches import HEADROOM
from vipo.plan.judging import judges_of
from vipo.plan.meter import Meter
from vipo.plan.published import table
from vipo.plan.show import memory_size, plan_view
from vipo.plan.work import work_of
from vipo.recipe import load_recipe, parse_recipe
from vipo.rollout import sample_groups
from vipo.schema import Recipe
from vipo.training.losses import LOSSES
from vipo.types import Batched, Prompt, Rollout, Transitions


@pytest.fixture
def recipe_of(model_folder: Path, tmp_path: Path) -> Any:
    def make(**changes: Any) -> Recipe:
        return parse_recipe(tiny.recipe(model_folder, tmp_path / "prompts.txt", **changes))

    return make


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    return Ledger()


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_predicted_memory_is_what_training_takes(recipe_of: Any, kind: str, checkpointing: bool) -> None:
    recipe = recipe_of(policy__kind=kind, training__gradient_checkpointing=checkpointing, prompts__group_size=8)
    module = tiny.benchmark("plan_memory")
    assert module.predicted(recipe) == pytest.approx(module.measured(recipe), rel=0.15)


GUARD = {"clip_range": 0.2, "loss": "guard"}
MATCHING = {"clip_range": 0.2, "loss": "matching", "matching_draws": 3}
COMPARED = {"clip_range": 0.2, "kl_weight": 0.1}


OBJECTIVES = [pytest.param(GUARD, id="guard"), pytest.param(COMPARED, id="compared", marks=pytest.mark.long)]
OBJECTIVES += [pytest.param(MATCHING, id="matching", marks=pytest.mark.long)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_predicted_memory_is_what_any_loss_takes(recipe_of: Any, objective: dict[str, Any]) -> None:
    recipe = recipe_of(objective=objective, policy__kind="full", prompts__group_size=8, training__replay_batch_size=8)
    module = tiny.benchmark("plan_memory")
    assert module.predicted(recipe) == pytest.approx(module.measured(recipe), rel=0.15)


def test_a_plan_knows_what_each_loss_records_and_trains(recipe_of: Any, ledger: Ledger) -> None:
    plans = {
        name: plan(recipe_of(objective=objective, solver__steps=5), Machine(operator=0), ledger)
        for name, objective in {"clipped": {"clip_range": 0.2}, "guard": GUARD, "matching": MATCHING}.items()
    }
    latents, samples, steps = 4 * 4 * 6 * 10, 2 * 3, 4
    clipped, guard, matching = plans["clipped"].resident, plans["guard"].resident, plans["matching"].resident
    assert clipped["recorded transitions"] == samples * steps * (2 * latents + latents // 4)
    assert guard["recorded transitions"] - clipped["recorded transitions"] == samples * steps * latents
    assert "recorded transitions" not in matching and "drawn rows" not in plans["clipped"].phases["update"]
    for phase in ("update", "step"):
        assert plans["matching"].phases[phase]["drawn rows"] == samples * 3 * 2 * latents
    assert plans["matching"].seconds["update"] == pytest.approx(plans["clipped"].seconds["update"] * 3 / 4, rel=1e-3)


def test_the_rows_of_one_drawn_step_are_bounded(recipe_of: Any) -> None:
    recipe = recipe_of(objective=MATCHING, solver__steps=20, prompts__group_size=40)
    work, empty = work_of(recipe, 1), torch.empty(0)
    assert work.trained == 240 and 12 < work.replayed_at_once < 40
    loss = LOSSES["matching"](recipe.objective, replace(recipe.solver, shift=1.0))
    latents, nothing = torch.zeros(80, 1, 1, 1, 1), torch.zeros(0, 1, 1, 1, 1)
    recorded = Transitions(empty.long(), empty.long(), empty, empty, nothing, nothing, nothing[:, 0], nothing)
    sigmas, media = torch.linspace(1, 0, 21), torch.zeros(80, 3, 1, 1, 1)
    rollout = Rollout((Prompt("a"),) * 80, 40, Batched(), latents, media, recorded, model_passes=0, sigmas=sigmas)
    for iteration in range(30):
        counts = loss.rows(rollout, seed=0, iteration=iteration).step.bincount()
        assert counts.max() <= work.replayed_at_once and len(counts) <= loss.by_step(80).steps == 20


@pytest.mark.parametrize("window", [None, Window(size=1, starts=1, first=2), Window(size=2, starts=2, first=1)])
@pytest.mark.parametrize("same_noise", [True, False])
def test_passes_are_those_of_a_rollout(recipe_of: Any, model_folder: Path, window: Any, same_noise: bool) -> None:
    raw = None if window is None else {name: getattr(window, name) for name in ("size", "starts", "first")}
    work = work_of(recipe_of(solver__steps=5, solver__same_noise=same_noise, solver__window=raw), 1)
    generator, starts = tiny.generator(model_folder), window.starts if window else 1
    solvers = [
        Solver(
            steps=5,
            shift=3.0,
            window=window and Window(size=window.size, first=window.first + place, schedule="fixed"),
            same_noise=same_noise,
        )
        for place in range(starts)
    ]
    rollouts = [sample_groups(generator, [Prompt("a"), Prompt("b")], s, group_size=3, seed=0) for s in solvers]
    assert work.passes == pytest.approx(sum(rollout.model_passes for rollout in rollouts) / starts)
    assert work.recorded == len(rollouts[0].transitions.sample)


def test_work_is_dealt_to_processes(recipe_of: Any) -> None:
    recipe = recipe_of(
        prompts__per_iteration=4,
        prompts__group_size=6,
        solver__steps=6,
        solver__train_fraction=0.6,
        training__keep_per_group=4,
        training__rollout_batch_size=5,
        optimizer__per_iteration=2,
    )
    work = work_of(recipe, 2)
    assert (work.samples, work.groups, work.recorded, work.trained) == (12, 2, 12 * 3, 8 * 3)
    assert (work.sampled_at_once, work.replayed_at_once) == (5, 4)
    with pytest.raises(UserError, match=r"prompts.per_iteration=4 must be a multiple of 3 processes.*=6"):
        work_of(recipe, 3)


def test_training_costs_three_passes_and_checkpointing_a_fourth(recipe_of: Any, ledger: Ledger) -> None:
    recipe = recipe_of(policy__kind="full")
    again = recipe_of(policy__kind="full", training__gradient_checkpointing=True)
    once = ledger.cost(recipe, "sampling", 4).flops
    assert ledger.cost(recipe, "replaying", 4).flops / once == pytest.approx(3, rel=0.1)
    assert ledger.cost(again, "replaying", 4).flops / once == pytest.approx(4, rel=0.1)
    assert ledger.cost(recipe, "sampling", 8).flops == pytest.approx(2 * once, rel=0.05)


def test_a_full_fine_tune_is_held_four_times_and_once_more_for_reference(recipe_of: Any, ledger: Ledger) -> None:
    plain = recipe_of(policy__kind="full", policy__ema_decay=0.9)
    recipe = plain.model_copy(update={"objective": replace(plain.objective, kl_weight=0.1)})
    assert "reference copy" not in plan(plain, Machine(), ledger).resident  # nothing is compared with it
    found = plan(recipe, Machine(), ledger)
    weights = 4 * sum(p.numel() for p in ledger.drawn(recipe)[1].network.parameters())
    assert found.resident["trained weights"] == found.resident["moving average"] == weights
    assert found.resident["reference copy"] == found.phases["update"]["gradients"] == weights
    assert found.resident["AdamW state"] == 2 * weights
    assert "frozen weights" not in found.resident
    small = recipe.model_copy(update={"training": recipe.training.model_copy(update={"replay_batch_size": 1})})
    worst = plan(small, Machine(), ledger).phases["update"]["forward and backward"]
    # The untrained weights are asked while a copy of the present ones waits.
    assert worst == weights + ledger.cost(small, "sampling", 1).bytes > ledger.cost(small, "replaying", 1).bytes


def test_sharding_divides_what_belongs_to_the_network(recipe_of: Any, ledger: Ledger) -> None:
    recipe = recipe_of(policy__kind="full", prompts__per_iteration=8)
    whole = plan(recipe, Machine(gpus=8), ledger)
    cut = recipe_of(policy__kind="full", prompts__per_iteration=8, training__sharding="fsdp2")
    parts = plan(cut, Machine(gpus=8), ledger)
    for name in ("trained weights", "AdamW state"):
        assert parts.resident[name] == pytest.approx(whole.resident[name] / 8, abs=1)
    assert parts.resident["autoencoder"] == whole.resident["autoencoder"]
    assert whole.resident["gradient buckets"] == whole.resident["trained weights"]
    assert "gradient buckets" not in parts.resident
    assert parts.seconds["communicate"] > whole.seconds["communicate"]
    apart = plan(cut, Machine(gpus=4, nodes=2), ledger)
    assert apart.resident == parts.resident and apart.phases == parts.phases
    assert apart.seconds["communicate"] == pytest.approx(9 * parts.seconds["communicate"])  # 450 GB/s against 50
    alone = plan(cut, Machine(), ledger)
    assert alone.sharding == "none" and alone.launch == f"vipo train {cut.name}"
    assert whole.launch == f"torchrun --nproc_per_node 8 -m vipo train {cut.name}"
    assert apart.launch == (
        "torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint HOST:29500 --nproc_per_node 4 -m vipo train"
        f" {cut.name} training.sharding=fsdp2"
    )


def test_zero_cuts_what_the_optimiser_keeps_and_with_stage_3_the_weights(recipe_of: Any, ledger: Ledger) -> None:
    def planned(sharding: str) -> Any:
        recipe = recipe_of(policy__kind="full", prompts__per_iteration=8, training__sharding=sharding)
        return plan(recipe, Machine(gpus=8), ledger)

    whole, second, third, fsdp = (planned(name) for name in ("none", "zero2", "zero3", "fsdp2"))
    weights = whole.resident["trained weights"]
    assert second.resident["trained weights"] == weights and third.resident == {
        **second.resident, "trained weights": fsdp.resident["trained weights"],
        **{name: fsdp.resident[name] for name in ("reference copy", "moving average") if name in fsdp.resident},
    }  # fmt: skip
    for cut in (second, third):
        assert cut.resident["AdamW state"] == fsdp.resident["AdamW state"]
        assert cut.resident["weights to step"] == cut.phases["update"]["gradients"] == pytest.approx(weights / 8, abs=1)
        assert cut.resident["gradient buckets"] == 4 * BUCKET
    assert "gathered weights" not in second.phases["update"]
    assert third.phases["update"]["gathered weights"] == fsdp.phases["update"]["gathered weights"]
    assert whole.seconds["communicate"] < third.seconds["communicate"] == fsdp.seconds["communicate"]
    assert second.launch.endswith(" training.sharding=zero2")


def test_what_training_refuses_is_neither_planned_nor_advised(recipe_of: Any, ledger: Ledger) -> None:
    two = Machine(gpus=2)
    compiled = recipe_of(training__compile=True, training__sharding="zero3")
    with pytest.raises(UserError, match=r"training\.compile=true .* sharding=zero3"):
        plan(compiled, two, ledger)
    assert plan(compiled, Machine(), ledger).sharding == "none"  # one process cuts nothing
    least = Machine(gpus=2, memory=1)  # everything is tried
    for sharding, offered in (("none", True), ("fsdp2", False), ("zero3", False)):
        recipe = recipe_of(training__sharding=sharding, training__compile=sharding != "zero3")
        advised = map(str, advise(recipe, least, ledger).changes)
        assert any("generator.quantization=nf4" in change for change in advised) == offered


def test_what_compares_a_group_is_not_planned_on_more_processes_than_groups(recipe_of: Any, ledger: Ledger) -> None:
    compares = recipe_of(credit="signed_consensus", prompts__per_iteration=1, prompts__group_size=4)
    with pytest.raises(UserError, match=r"2 processes split 1 groups; take another, or prompts\.per_iteration=2"):
        plan(compares, Machine(gpus=2), ledger)
    assert plan(compares, Machine(), ledger).sharding == "none"


def test_advice_passes_over_what_the_recipe_itself_refuses(recipe_of: Any, ledger: Ledger) -> None:
    shared = {"training__context_parallel": 2, "training__context_exchange": "ring"}
    ring = recipe_of(**shared, generator__attention="_native_flash")
    machine = Machine(gpus=2, memory=plan(ring, Machine(gpus=2), ledger).peak - 1)  # a little is enough
    advised = advise(ring, machine, ledger).changes
    assert advised and not any(change.path[-1] == "gradient_checkpointing" for change in advised)


def test_an_own_generator_is_not_advised_to_keep_text_which_it_may_not_know_how(recipe_of: Any, ledger: Ledger) -> None:
    own = recipe_of(generator__name="own.py:Flux")
    advised = [change.path[-1] for change in advise(own, Machine(memory=1), ledger).changes]  # everything is tried
    assert "quantization" in advised and "offload_text" not in advised


def test_samples_are_shared_in_a_plan_by_the_attention_of_the_recipe(recipe_of: Any, ledger: Ledger) -> None:
    exact = recipe_of(training__context_parallel=2, generator__attention="_native_math")
    with pytest.raises(UserError, match=r"cannot be had with diffusers' attention backend '_native_math'"):
        plan(exact, Machine(gpus=2), ledger)


def test_advice_fits_and_nothing_in_it_can_be_left_out(recipe_of: Any, ledger: Ledger) -> None:
    recipe = recipe_of(prompts__group_size=8)
    machine = Machine(memory=int(plan(recipe, Machine(), ledger).peak * 0.7))
    found = advise(recipe, machine, ledger)
    assert found.changes and found.plan.fits
    for left_out in found.changes:
        changed = recipe
        for change in found.changes:
            changed = changed if change is left_out else change.apply(changed)
        assert not plan(changed, machine, ledger).fits, str(left_out)


def test_free_changes_come_before_costly_ones(recipe_of: Any, ledger: Ledger) -> None:
    recipe = recipe_of(prompts__group_size=8)
    found = advise(recipe, Machine(memory=plan(recipe, Machine(), ledger).peak - 1, operator=0), ledger)
    assert len(found.changes) == 1 and "checkpointing" not in str(found.changes[0])
    assert found.plan.fits and found.seconds == pytest.approx(0, abs=1e-9)


def test_what_can_be_turned_off_is_said(recipe_of: Any, ledger: Ledger) -> None:
    recipe = recipe_of(training__gradient_checkpointing=True)
    machine = Machine(memory=10**9)
    found = advise(recipe, machine, ledger)
    assert [str(change) for change in found.changes] == ["training.gradient_checkpointing=false"]
    assert found.seconds < 0
    console = Console(width=200, record=True, file=None, quiet=False)
    console.print(plan_view(plan(recipe, machine, ledger), found))
    said = console.export_text()
    assert "tiny fits" in said and "room to be faster" in said and "trained weights" in said


def test_a_plan_prints_names_that_look_like_markup_as_they_are(recipe_of: Any, ledger: Ledger) -> None:
    recipe = recipe_of(name="[bold]:heart:", judges=["[/x].py:[red]"])
    console = Console(width=200, record=True)
    console.print(plan_view(plan(recipe, Machine(), ledger), advise(recipe, Machine(), ledger)))
    said = console.export_text()
    assert "[bold]:heart: fits" in said and "not counted: reward [/x].py:[red]" in said


def test_proposed_batches_are_the_largest_divisors_that_leave_room(recipe_of: Any, ledger: Ledger) -> None:
    recipe = recipe_of(prompts__group_size=6)

    def sizes(memory: float) -> tuple[int, int]:
        found = propose(recipe, Machine(memory=int(memory)), ledger)
        assert found.as_json()["plan"]["fits"] == found.plan.fits
        return found.rollout, found.replay

    def needs(rollout: int, replay: int) -> Plan:
        training = recipe.training.model_copy(update={"rollout_batch_size": rollout, "replay_batch_size": replay})
        return plan(recipe.model_copy(update={"training": training}), Machine(), ledger)

    assert sizes(80e9) == (6, 6) and sizes(1000) == (1, 1)
    update = needs(1, 3).total("update") / (1 - HEADROOM)
    assert sizes(update + 10)[1] == 3 and sizes(update - 10)[1] == 2
    sample = needs(2, 1).total("sample") / (1 - HEADROOM)
    assert sizes(sample + 10)[0] == 2 and sizes(sample - 10)[0] == 1


def test_a_pass_lasts_as_long_as_its_operators_are_called(recipe_of: Any, ledger: Ledger) -> None:
    recipe = recipe_of()
    quick, slow = Machine(operator=0), Machine(operator=1.0)
    cost = ledger.cost(recipe, "replaying", 1)
    assert cost.operators > 100 and slow.lasts(cost) == cost.operators
    assert quick.lasts(cost) == quick.seconds(cost.flops)


def test_what_cannot_fit_is_said(recipe_of: Any, ledger: Ledger) -> None:
    machine = Machine(memory=1000)
    found, advice = plan(recipe_of(), machine, ledger), advise(recipe_of(), machine, ledger)
    assert not found.fits and not advice.plan.fits
    console = Console(width=200, record=True)
    console.print(plan_view(found, advice))
    assert "Nothing that vipo can change makes it fit" in console.export_text()
    document = json.loads(json.dumps(advice.as_json()))
    assert document["plan"]["fits"] is False and document["plan"]["peak_bytes"] == advice.plan.peak


def test_rewards_and_backbone_are_weighed(recipe_of: Any, ledger: Ledger) -> None:
    recipe = recipe_of(
        credit="advantage_map",
        rewards={"hpsv2.1": 1.0, "mine.py:mine": 1.0},
        structuring={
            "backbone": "dinov2",
            "backbone_options": {"pretrained": "facebook/dinov2-small", "resolution": 28},
        },
    )
    found = plan(recipe, Machine(), ledger)
    assert found.resident["rewards and judges"] == 4 * 986_109_441
    assert found.resident["backbone"] == pytest.approx(4 * 22.06e6, rel=0.01)
    assert found.phases["score"]["network pass"] > 0 and found.phases["map"]["network pass"] > 0
    assert found.notes == ("not counted: reward mine.py:mine",)


@pytest.mark.parametrize("name", ["hpsv2.1", "pickscore", "clipscore", "aesthetic"])
def test_a_reward_looks_at_every_frame_of_a_clip_unless_told_to_take_the_first(recipe_of: Any, name: str) -> None:
    def flops(length: int, **options: Any) -> float:
        recipe = recipe_of(rewards={name: {"options": options}}, generator__frames=length)
        ((judge,), _) = judges_of(recipe)
        return judge.flops

    assert flops(5) == pytest.approx(5 * flops(1)) and flops(5, frames="first") == pytest.approx(flops(1))


def test_the_meter_counts_what_is_alive() -> None:
    start = torch.zeros(100)
    with Meter([start]) as meter:
        one = start + 1  # 400 bytes
        two = one @ one.reshape(1, 100).T  # 4 bytes, 200 operations
        del one
        three = torch.zeros(50)  # 200 bytes
        start.add_(1)
    assert meter.live == 204 and meter.peak == 404 and meter.flops == 200
    assert len(two) == 1 and len(three) == 50


def test_config_files_are_enough(model_folder: Path, tmp_path: Path, recipe_of: Any, ledger: Ledger) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert (
        plan(recipe_of(generator__path=str(bare)), Machine(), ledger).peak == plan(recipe_of(), Machine(), ledger).peak
    )


def test_a_folder_that_is_not_whole_is_one_sentence(model_folder: Path, tmp_path: Path, recipe_of: Any) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "flux")

    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words) as raised:
            plan(recipe_of(generator__path=str(folder)), Machine(), Ledger())
        assert "\n" not in str(raised.value)

    for file, changes, words in (
        ("transformer/config.json", {"num_layers": "one"}, "the transformer of .* cannot be built from its config"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderOfTomorrow"]}, "the vae of .* cannot be built"),
        ("model_index.json", {"_class_name": "LTXPipeline"}, "is a LTXPipeline; vipo adapts .*FluxPipeline"),
    ):
        before = (folder / file).read_text()
        (folder / file).write_text(json.dumps(json.loads(before) | changes))
        refused(words)
        (folder / file).write_text(before)
    (folder / "model_index.json").write_text("{}")
    refused("names no pipeline class")
    (folder / "model_index.json").write_text('{"a":')
    refused("is not a diffusers pipeline; .*valid JSON")


def test_an_unknown_model_is_refused(recipe_of: Any, ledger: Ledger) -> None:
    with pytest.raises(
        UserError, match=r"'someone/else' cannot be planned.*folder that holds.*black-forest-labs/FLUX.1-dev"
    ):
        plan(recipe_of(generator__path="someone/else"), Machine(), ledger)
    with pytest.raises(UserError, match=r"generator\.name=flux reads FluxPipeline, but .* is a WanPipeline.*to wan"):
        named = {"path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "height": 32, "width": 48, "name": "flux"}
        plan(recipe_of(generator=named), Machine(), ledger)
    with pytest.raises(UserError, match="takes no option 'guidance'"):
        plan(recipe_of(generator__options={"guidance": 3.0}), Machine(), ledger)


def test_an_adapter_whose_text_cannot_be_blank_says_what_to_add(
    recipe_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(FluxText, "blank")
    with pytest.raises(UserError, match=r"a FluxPipeline cannot be planned: its adapter's FluxText has no blank\(rows"):
        plan(recipe_of(), Machine(), Ledger())


@pytest.mark.long
@pytest.mark.parametrize("path", ["Qwen/Qwen-Image", "Tongyi-MAI/Z-Image-Turbo"])
def test_the_published_models_with_padded_text_are_planned(recipe_of: Any, path: str) -> None:
    section = {"path": path, "height": 64, "width": 64, "dtype": "bfloat16"}
    found = plan(
        recipe_of(generator=section, prompts__group_size=2, training__precision="bf16"), Machine(memory=10**12)
    )
    weights = 2e9 * table("parts")[table("models")[path]["transformer"]]["billions"]
    assert found.resident["frozen weights"] == pytest.approx(weights, rel=0.01)
    assert found.phases["sample"]["network pass"] > 0 and found.phases["update"]["forward and backward"] > 0


def test_sizes_as_people_write_them() -> None:
    assert memory_size("80GB") == 80 * 10**9 and memory_size("1.5 GiB") == 3 * 2**29 and memory_size("7") == 7
    with pytest.raises(UserError, match="'eighty' is not understood; give it like 80GB"):
        memory_size("eighty")


def test_published_models_name_parts_that_exist() -> None:
    for hub, entry in table("models").items():
        names = [value for name, value in entry.items() if isinstance(value, str) and name != "pipeline"]
        assert set(names) <= set(table("parts")), hub
    assert {entry["part"] for entry in table("judges").values()} <= set(table("parts"))
    assert all(entry["source"].startswith("https://") for entry in table("parts").values())


@pytest.mark.slow
def test_the_quickstart_fits_a_laptop() -> None:
    found = plan(load_recipe("quickstart"), Machine(memory=8 * 10**9))
    assert found.fits and Accountant(load_recipe("quickstart"), Machine(), Ledger()).work.samples == 96
