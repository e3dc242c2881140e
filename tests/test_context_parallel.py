"""Samples over several processes, each with its part of the tokens, against one process; and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor

import tiny
import tiny_sd3
import tiny_wan
from gloo import allow_context_parallel_on_cpu, together
from test_sharded import TOLERANCE, Case, assert_exported, assert_same, furthest, run, scores, trained, wan
from vipo.assemble import build, build_generator
from vipo.engine import Engine
from vipo.errors import UserError
from vipo.generators import context
from vipo.plan import Ledger, Machine, plan
from vipo.recipe import parse_recipe
from vipo.schema import GeneratorSection
from vipo.workload import teams_of

ITERATIONS = 2


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.save_pipeline(tmp_path_factory.mktemp("tiny") / "wan")


def shared(folder: Path, scratch: Path, **changes: Any) -> dict[str, Any]:
    return wan(
        folder, scratch, **{"training__context_parallel": 2, "training__gradient_checkpointing": True, **changes}
    )


def alone(raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "training": {**raw["training"], "context_parallel": 1}}


def on_a_cpu(work: Any, *given: Any) -> Any:
    """Module-level, so that a child process can be sent it."""
    allow_context_parallel_on_cpu()
    return work(*given)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.long)])
def test_teams_train_as_one_process(wan_folder: Path, tmp_path: Path, processes: int) -> None:
    lora = {"kind": "lora", "rank": 2, "ema_decay": 0.5}
    in_parts = {"prompts__per_iteration": 1, "prompts__group_size": 8, "credit": "reward_map"}
    cases: dict[str, Case] = {
        "lora": (shared(wan_folder, tmp_path, policy=lora), "none", ITERATIONS),
        "cut": (shared(wan_folder, tmp_path), "fsdp2", ITERATIONS),
    }
    if processes == 4:  # two teams of two, and a group over both
        cases = {"split": (shared(wan_folder, tmp_path, **in_parts), "none", ITERATIONS)}
    found = together(on_a_cpu, processes, trained, list(cases.values()))
    ones = trained([(alone(raw), sharding, iterations) for raw, sharding, iterations in cases.values()])
    for place, (name, one) in enumerate(zip(cases, ones, strict=True)):
        assert_same([rank[place] for rank in found], one, split=name == "split")
        first = found[0][place]["metrics"][0]
        assert first["ratio_deviation"] == one["metrics"][0]["ratio_deviation"] < 1e-5
        assert first["grad_norm"] == pytest.approx(one["metrics"][0]["grad_norm"], rel=1e-4) and first["grad_norm"] > 0


@pytest.mark.long
def test_a_shared_run_is_evaluated_saved_and_exported_as_one(wan_folder: Path, tmp_path: Path) -> None:
    raw = shared(wan_folder, tmp_path)
    raw["training"] |= {"iterations": 1}
    raw["evaluation"] |= {"limit": 3, "samples_per_prompt": 2, "every": None}
    one = run(alone(raw), tmp_path / "alone")
    both = together(on_a_cpu, 2, run, raw, tmp_path / "both")
    assert all(furthest(rank["weights"], one["weights"]) < TOLERANCE for rank in both)
    for ours, theirs in zip(scores(tmp_path / "both"), scores(tmp_path / "alone"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert_exported(tmp_path / "both", both[0]["averages"], WanPipeline)


def gradients(folder: Path, exchange: Any, *, shares: bool) -> dict[str, Tensor]:
    """Of one velocity, and that itself; summed over the processes that share it."""
    section = GeneratorSection(
        path=str(folder), **dict(zip(("height", "width"), tiny_wan.SIZES["2.1"], strict=True)), frames=tiny_wan.FRAMES
    )
    generator: Any = build_generator(section, device="cpu")
    network = generator.network.requires_grad_(True)
    network.set_attention_backend("_native_flash")
    if shares:
        engine = Engine(context_parallel=2)
        context.check(network, 2, exchange)
        context.install(network, engine.context_mesh(exchange), exchange)
    noise = torch.randn(2, *tiny_wan.shape(), generator=torch.Generator().manual_seed(0))
    velocity = generator.predict(noise, torch.tensor([0.3, 0.7]), generator.encode(tiny.PROMPTS[:2]))
    (velocity * noise).sum().backward()
    found = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
    if shares:
        for gradient in found.values():
            torch.distributed.all_reduce(gradient)
    return {**found, "velocity": velocity.detach()}


def of_both(folder: Path) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The gradients of one process and of two, for each way to exchange."""
    kinds = ("ulysses", "ring")
    return [tuple(gradients(folder, kind, shares=shares) for shares in (False, True)) for kind in kinds]  # type: ignore[misc]


def test_gradients_of_a_teams_parts_add_up(wan_folder: Path) -> None:
    for rank in together(on_a_cpu, 2, of_both, wan_folder):
        for one, both in rank:
            assert one.keys() == both.keys() and len(one) > 30
            for name, whole in one.items():
                assert float((whole - both[name]).norm()) <= 1e-5 * float(whole.norm()) + 1e-7, name


def refusals(raws: list[dict[str, Any]]) -> list[str]:
    found = []
    for raw in raws:
        try:
            build(parse_recipe(raw))
        except UserError as error:
            found.append(str(error))
    return found


def test_what_cannot_be_shared_is_refused_before_anything_is_sampled(
    model_folder: Path, wan_folder: Path, tmp_path: Path
) -> None:
    sd3 = tiny_sd3.save_pipeline(tmp_path / "sd3", model_folder)
    flux = tiny.recipe(sd3, tmp_path / "prompts.txt", training__context_parallel=2)
    odd = shared(wan_folder, tmp_path, generator__width=32)  # latents 4 x 4
    odd["generator"] |= {"height": 48, "width": 48, "frames": 1}  # 3 x 3 tokens
    exact = shared(wan_folder, tmp_path, generator__attention="_native_math")
    ring = {"training__context_exchange": "ring", "training__gradient_checkpointing": False}
    raws = [flux, odd, exact, shared(wan_folder, tmp_path, **ring)]
    for plan_, tokens, backend, sums in together(on_a_cpu, 2, refusals, raws):
        assert plan_.startswith("training.context_parallel=2: SD3Transformer2DModel has no plan (_cp_plan)")
        assert tokens.startswith("training.context_parallel=2 cannot cut the tokens of a sample, or of its prompt")
        assert "backend '_native_math'; set generator.attention to auto, or one of " in backend
        assert "context_exchange=ring cannot be had with diffusers' attention backend 'native'" in sums
        assert "_native_flash" in sums and "sage" not in sums
    cpu = together(refusals, 2, [shared(wan_folder, tmp_path)])[0][0]
    assert cpu.startswith("training.context_parallel=2 cannot be had on a CPU")


def test_processes_that_make_no_teams_are_refused(wan_folder: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(shared(wan_folder, tmp_path))
    with pytest.raises(
        UserError, match=r"context_parallel=2 shares .* but there is 1; start a multiple of 2 with torch"
    ):
        build(recipe)
    with pytest.raises(UserError, match=r"context_parallel=2, but the engine has teams of 1 process"):
        build(recipe, engine=Engine())
    assert teams_of(6, 2) == 3
    with pytest.raises(UserError, match=r"but there are 3;"):
        teams_of(3, 2)
    for change, said in (
        ({"training__compile": True}, r"compile=true does not go with training\.context_parallel=2"),
        ({"training__context_exchange": "ring"}, r"exchange=ring does not go with training\.gradient_checkpointing"),
    ):
        with pytest.raises(UserError, match=said):
            parse_recipe(shared(wan_folder, tmp_path, **change))


class Heads(torch.nn.Module):
    """As much of a network as is looked at."""

    _cp_plan: Mapping[str, Any] = {}
    config: Mapping[str, int] = {"num_attention_heads": 12}

    def enable_parallelism(self) -> None:
        raise NotImplementedError


def test_heads_and_masks_decide_whether_a_network_is_shared() -> None:
    network = Heads()
    context.check(network, 4, "ulysses")
    context.check(network, 5, "ring")
    with pytest.raises(UserError, match=r"deals attention heads, and Heads has 12; take a divisor.*exchange=ring"):
        context.check(network, 5, "ulysses")
    with pytest.raises(UserError, match=r"the prompts of Heads have any length"):
        context.check(network, 4, "ulysses", masked=True)


def test_a_plan_deals_to_teams_and_cuts_what_a_pass_needs(model_folder: Path, wan_folder: Path, tmp_path: Path) -> None:
    raw, ledger = shared(wan_folder, tmp_path), Ledger()
    one, two = (plan(parse_recipe(r), Machine(gpus=g), ledger) for r, g in ((alone(raw), 1), (raw, 2)))
    assert two.resident["latents"] == one.resident["latents"]  # a team of two has what one process had
    half = one.phases["update"]["forward and backward"] / 2
    assert two.phases["update"]["forward and backward"] == pytest.approx(half, abs=1)
    assert two.seconds["decode"] == one.seconds["decode"]
    assert "training.context_parallel=2" in two.launch
    with pytest.raises(UserError, match="context_parallel=2 shares each sample"):
        plan(parse_recipe(raw), Machine(gpus=3), ledger)
    sd3 = tiny.recipe(
        tiny_sd3.save_pipeline(tmp_path / "sd3", model_folder), tmp_path / "prompts.txt", training__context_parallel=2
    )
    with pytest.raises(UserError, match=r"SD3Transformer2DModel has no plan"):
        plan(parse_recipe(sd3), Machine(gpus=2), ledger)
