"""Several processes against one: DDP and FSDP2, whole groups and split ones, in what they train, save and export."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate.state
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

import tiny
import tiny_wan
from gloo import together
from test_generators_compiled import graphs_alone
from vipo.assemble import build
from vipo.engine import Engine
from vipo.errors import RunFailed, UserError
from vipo.files import write_text
from vipo.generators import in_parts
from vipo.generators.quantization import LIBRARIES
from vipo.plan import Ledger, Machine, plan
from vipo.recipe import parse_recipe
from vipo.runs.agreement import check_agreed
from vipo.runs.run import Run
from vipo.sharding import local, settle
from vipo.training.saved import list_checkpoints
from vipo.types import TrainStep

ITERATIONS = 5
TOLERANCE = 1e-4  # of weights after so many iterations at a learning rate of 1e-3; most differ by 1e-6
EXACT = ("reward", "spread/", "agreement/", "unscored/", "advantage_size", "flat_groups")


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.save_pipeline(tmp_path_factory.mktemp("tiny") / "wan")


def flux(model_folder: Path, scratch: Path, **changes: Any) -> dict[str, Any]:
    """Everything that processes could disagree in: full weights, an average, a reference, maps, two rewards."""
    usual: dict[str, Any] = {
        "credit": "advantage_map",
        "prompts__per_iteration": 4,
        "prompts__group_size": 2,
        "objective": {"clip_range": 0.2, "kl_weight": 0.1},
        "optimizer": {"learning_rate": 1e-3},
        "policy": {"kind": "full", "ema_decay": 0.5},
        "rewards": {f"{Path(tiny.__file__)}:redness": 1.0, f"{Path(tiny.__file__)}:brightness": 0.5},
        "structuring": {"sources": ["text_relevance"]},
        # Each network sees the same batches in any number of processes.
        "training": {"iterations": ITERATIONS, "precision": "no", "rollout_batch_size": 2, "checkpoint_every": 2},
    }
    return tiny.recipe(model_folder, scratch / "prompts.txt", **{**usual, **changes})


def wan(wan_folder: Path, scratch: Path, **changes: Any) -> dict[str, Any]:
    raw = flux(wan_folder, scratch, **changes)
    height, width = tiny_wan.SIZES["2.1"]
    raw["generator"] |= {"name": "wan", "height": height, "width": width, "frames": tiny_wan.FRAMES}
    return raw


Case = tuple[dict[str, Any], str, int]  # recipe, sharding, iterations


def trained(cases: list[Case]) -> list[dict[str, Any]]:
    """What every case's run comes to, as this process sees it."""
    found = []
    for raw, sharding, iterations in cases:
        session = build(parse_recipe({**raw, "training": {**raw["training"], "sharding": sharding}}))
        assert session.engine.in_step == (sharding != "none" and session.engine.ranks > 1)
        metrics = [dict(session.trainer.step().metrics) for _ in range(iterations)]
        weights, averages = session.policy.state(), session.policy.averages()
        found.append({"metrics": metrics, "weights": weights, "averages": averages})
    return found


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def assert_same(ours: list[dict[str, Any]], one: dict[str, Any], *, split: bool) -> None:
    """The scores and advantages of the first iteration bit for bit, the weights after the last within TOLERANCE."""
    for rank in ours:
        assert rank["metrics"] == ours[0]["metrics"]
        for kind in ("weights", "averages"):
            assert furthest(rank[kind], ours[0][kind]) == 0 and furthest(rank[kind], one[kind]) < TOLERANCE
    for k, (mine, theirs) in enumerate(zip(ours[0]["metrics"], one["metrics"], strict=True)):
        assert list(mine) == list(theirs)
        for key in mine:
            exact, near = k == 0 and key.startswith(EXACT), pytest.approx(theirs[key], abs=1e-3)
            if key == "weight_change":  # of a few elements of each part, and a process has other parts
                near = pytest.approx(theirs[key], rel=0.6)
            if key != "model_passes" or not split:  # a split group's first steps are made by each of its processes
                assert mine[key] == (theirs[key] if exact else near), (k, key)


def a_lora(model_folder: Path, output: Path) -> Path:
    """As a run exports it."""
    generator = tiny.generator(model_folder)
    tiny.nudged(tiny.lora(generator)).export(generator, output)
    return output


def cases_of(model_folder: Path, wan_folder: Path, scratch: Path) -> dict[str, Case]:
    lora = {"kind": "lora", "rank": 2, "ema_decay": 0.5}
    updates = {"learning_rate": 1e-3, "per_iteration": 2}
    split = {"prompts__per_iteration": 1, "prompts__group_size": 8, "credit": "reward_map"}
    several = flux(model_folder, scratch, optimizer=updates, solver__train_fraction=0.5)
    in_parts = flux(model_folder, scratch, **split, training__keep_per_group=4, training__replay_batch_size=3)
    adapted = flux(model_folder, scratch, policy=lora, training__gradient_checkpointing=True)
    begun = flux(model_folder, scratch, policy={"init": str(a_lora(model_folder, scratch / "lora")), "ema_decay": 0.5})
    return {
        "a lora that was there": (begun, "fsdp2", 2),
        "full": (flux(model_folder, scratch), "fsdp2", ITERATIONS),
        "several updates": (several, "fsdp2", 2),
        "several updates, whole": (several, "none", 2),
        "split groups": (in_parts, "fsdp2", 2),
        "lora": (adapted, "fsdp2", 2),
        "wan": (wan(wan_folder, scratch), "fsdp2", 2),
        "wan lora, whole": (wan(wan_folder, scratch, policy=lora), "none", 2),
    }


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_as_one(model_folder: Path, wan_folder: Path, tmp_path: Path, processes: int) -> None:
    cases = cases_of(model_folder, wan_folder, tmp_path)
    if processes == 4:  # the rest costs twice as much and says the same
        cases = {name: cases[name] for name in ("several updates", "split groups", "wan")}
    together_, alone = together(trained, processes, list(cases.values())), trained(list(cases.values()))
    for place, (name, one) in enumerate(zip(cases, alone, strict=True)):
        assert_same([rank[place] for rank in together_], one, split=name.startswith("split"))


def compiled(cases: list[Case]) -> list[dict[str, Any]]:
    """As ``trained``, by graphs of blocks whose weights an engine cuts."""
    real, made = torch.compile, list[Any]()
    torch.compile = graphs_alone(made, both_ways=True)  # type: ignore[assignment]
    try:
        found = trained(cases)
    finally:
        torch.compile = real
    # Replayed in other batches than it was sampled in, which some processors round otherwise.
    assert made and all(one["metrics"][0]["ratio_deviation"] < 1e-6 for one in found)
    return found


@pytest.mark.long
def test_compiled_blocks_are_cut_too(model_folder: Path, tmp_path: Path) -> None:
    raw = flux(model_folder, tmp_path, training__compile=True)
    checkpointed = flux(model_folder, tmp_path, training__compile=True, training__gradient_checkpointing=True)
    lora = {"kind": "lora", "rank": 2, "ema_decay": 0.5}
    cases = [(raw, "fsdp2", 2), ({**raw, "policy": lora}, "fsdp2", 2)]
    cases += [(checkpointed, "fsdp2", 2), ({**checkpointed, "policy": lora}, "fsdp2", 2)]
    (alone,), both = together(compiled, 1, cases), together(compiled, 2, cases)
    for place, one in enumerate(alone):
        assert_same([rank[place] for rank in both], one, split=False)


@pytest.fixture
def raw(model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of two iterations that is evaluated on three prompts: two processes have parts of two and of one."""
    raw = flux(model_folder, tmp_path)
    raw["training"] |= {"iterations": 2, "sharding": "fsdp2", "maps_every": 1}
    raw["evaluation"] |= {"limit": 3, "samples_per_prompt": 3, "every": None}
    return raw


def run(raw: dict[str, Any], root: Path, stop_after: int | None = None, **given: Any) -> dict[str, Any]:
    """Train to the end or to a stop; the weights as they are then, gathered."""
    going = Run(parse_recipe(raw), root, **given)
    for event in going:
        going.stop.asked = isinstance(event, TrainStep) and event.iteration + 1 == stop_after
    policy = going.session.policy
    return {"weights": policy.state(), "averages": policy.averages(), "sharded": going.engine.in_step}


def scores(root: Path) -> list[list[float]]:
    records = tiny.lines(root / "evaluations.jsonl")
    return [[score for values in record["values"].values() for score in values] for record in records]


@pytest.mark.slow
def test_a_sharded_run_is_saved_in_parts_and_goes_on_in_any_number_of_processes(
    tmp_path: Path, raw: dict[str, Any]
) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    one = run(raw, alone)
    half = together(run, 2, raw, both, 1)
    (saved,) = list_checkpoints(both / "checkpoints")
    names = [f"{kind}-{rank:05d}-of-00002.safetensors" for kind in ("ema", "optimizer", "policy") for rank in range(2)]
    assert sorted(path.name for path in saved.iterdir()) == sorted([*names, "state.json"]) and half[0]["sharded"]
    parts = [load_file(saved / f"policy-{rank:05d}-of-00002.safetensors") for rank in range(2)]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    assert furthest(joined, half[0]["weights"]) == 0  # the trained weights, gathered
    start = FluxPipeline.from_pretrained(raw["generator"]["path"]).transformer.state_dict()
    assert min(float((joined[name] - start[name]).abs().max()) for name in joined) > 1e-5  # and not the untrained ones

    for processes in (1, 2, 4):
        root = tmp_path / f"on{processes}"
        shutil.copytree(both, root)
        ends = together(resumed, processes, raw, root)
        for end in ends:
            assert furthest(end["weights"], one["weights"]) < TOLERANCE
            assert furthest(end["averages"], one["averages"]) < TOLERANCE
        assert_exported(root, ends[0]["averages"])
        for ours, theirs in zip(scores(root), scores(alone), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
    events = [event for line in tiny.lines(root / "metrics.jsonl") for event in line["events"]]
    assert events == ["resumed at iteration 1 with processes 2 -> 4"]


@pytest.mark.long
@pytest.mark.parametrize("kind", in_parts.KINDS)
def test_a_quantised_base_is_cut_too(model_folder: Path, tmp_path: Path, kind: str) -> None:
    if importlib.util.find_spec(LIBRARIES[kind]) is None:
        pytest.skip(f"{LIBRARIES[kind]} is not installed")
    training = {"iterations": 2, "precision": "no", "rollout_batch_size": 2, "checkpoint_every": 1}
    lora = {"kind": "lora", "rank": 2}
    raw = flux(model_folder, tmp_path, policy=lora, training=training, generator__quantization=kind)
    raw["evaluation"] |= {"limit": 2, "every": None}
    alone, both = tmp_path / "alone", tmp_path / "both"
    one = run(raw, alone)
    half = together(first_half, 2, {**raw, "training": {**training, "sharding": "fsdp2"}}, both)
    for rank in half:
        assert rank["sharded"] and rank["gathered"] == 0  # between passes
        assert rank["frozen"] == pytest.approx(rank["planned"], rel=0.02)
    copies = together(trained, 2, [(raw, "none", 1)])
    assert copies[0][0]["metrics"][0]["reward"] == tiny.lines(alone / "metrics.jsonl")[0]["reward"]  # nothing is sent
    end = run(raw, both, resume=True)
    assert tiny.lines(both / "metrics.jsonl")[0]["reward"] == tiny.lines(alone / "metrics.jsonl")[0]["reward"]
    assert furthest(end["weights"], one["weights"]) < TOLERANCE
    FluxPipeline.from_pretrained(model_folder).load_lora_weights(str(both / "export"))


def first_half(raw: dict[str, Any], root: Path) -> dict[str, Any]:
    """One iteration; bytes of the base that this process keeps, that are gathered, and that a plan says it keeps."""
    going = Run(parse_recipe(raw), root)
    for event in going:
        going.stop.asked = isinstance(event, TrainStep)
    network, recipe = going.session.model.generator.network, parse_recipe(raw)
    settle(network)
    frozen = [local(p) for p in network.parameters() if not p.requires_grad]
    gathered = [getattr(part, "_unsharded_param", None) for part in fsdp_parameters(network)]
    return {
        "sharded": going.engine.in_step,
        "frozen": sum(p.numel() * p.element_size() for p in frozen),
        "gathered": sum(p.untyped_storage().nbytes() for p in gathered if p is not None),
        "planned": plan(recipe, Machine(gpus=2), Ledger()).resident["frozen weights"],
    }


def fsdp_parameters(network: Any) -> list[Any]:
    groups = [m._get_fsdp_state()._fsdp_param_group for m in network.modules() if isinstance(m, FSDPModule)]
    return [parameter for group in groups if group for parameter in group.fsdp_params]


def resumed(raw: dict[str, Any], root: Path) -> dict[str, Any]:
    return run(raw, root, resume=True)


def assert_exported(root: Path, averages: dict[str, Tensor], pipeline: Any = FluxPipeline) -> None:
    """Whole, and read by plain diffusers."""
    for file in (root / "export" / "transformer" / "config.json", root / "export" / "model_index.json"):
        assert "FSDP" not in file.read_text()  # the class's own name, not that of its wrapper
    transformer = pipeline.from_pretrained(root / "export").transformer
    assert furthest(dict(transformer.state_dict()), averages) == 0


DAMAGE: dict[str, Any] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-4]),
    "another bit": lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
    "missing": lambda file: file.unlink(),
}


def refusals(raw: dict[str, Any], roots: list[Path], resume: bool) -> list[tuple[str, float]]:
    """What each is refused with in this process, and after how many seconds."""
    found = []
    for root in roots:
        mine = Path(str(root).replace("RANK", os.environ["RANK"]))
        begin = time.monotonic()
        try:
            Run(parse_recipe(raw), mine, resume=resume)
        except UserError as error:
            found.append((str(error), time.monotonic() - begin))
        else:
            found.append(("", 0.0))
    return found


@pytest.mark.slow
def test_processes_that_see_different_things_stop_with_the_reason(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["training"] |= {"iterations": 1, "checkpoint_every": 1}
    (tmp_path / "disk0").mkdir(), (tmp_path / "disk1").mkdir()
    together(run, 2, raw, tmp_path / "disk0" / "whole", 1)
    raw["training"] |= {"iterations": 2}
    for name in ("absent", "other"):
        shutil.copytree(tmp_path / "disk0" / "whole", tmp_path / "disk0" / name)
        shutil.copytree(tmp_path / "disk0" / "whole", tmp_path / "disk1" / name)
    shutil.rmtree(tmp_path / "disk1" / "absent" / "checkpoints")
    for name in DAMAGE:
        shutil.copytree(tmp_path / "disk0" / "whole", tmp_path / name)
        DAMAGE[name](tmp_path / name / "checkpoints" / "step-000001" / "optimizer-00001-of-00002.safetensors")
    apart = [tmp_path / "diskRANK" / name for name in ("absent", "other")]
    told = together(refusals, 2, raw, [*apart, *(tmp_path / name for name in DAMAGE)], True)
    assert all(seconds < 60 for rank in told for _, seconds in rank)
    assert [said for said, _ in told[0]] == [said.replace("disk1", "disk0") for said, _ in told[1]]
    absent, other, *damaged = [said for said, _ in told[0]]
    assert "rank 1 does not see" in absent and "on a disk that all processes share" in absent and "disk0" in absent
    assert "rank 1 does not see" in other
    for said, why in zip(
        damaged, ("is damaged: its SHA-256", "is damaged: its SHA-256", "cannot be read"), strict=True
    ):
        assert "its file 'optimizer-00001-of-00002.safetensors' " + why in said
    raw["optimizer"] |= {"per_iteration": 5}
    fresh = together(refusals, 2, raw, [tmp_path / "diskRANK" / "new", tmp_path / "fresh"], False)
    for new, few in fresh:
        assert "rank 1 does not see" in new[0]
        assert "optimizer.per_iteration=5 needs as many samples of an iteration on each process, but 2" in few[0]


def disagreements(raw: dict[str, Any], root: Path) -> list[str]:
    """What is said where the processes see another package, no checkpoint, and another one."""
    engine, found = Engine(), []
    absent, other = root / "step-000001" / "state.json", root / f"rank{engine.rank}" / "step-000002" / "state.json"
    for file in (absent, other) if engine.rank == 0 else (other,):
        write_text(file, f"{file.parent.name} {engine.rank}")
    for versions, state in (
        ({"packages.torch": f"2.{engine.rank}"}, None),
        ({}, absent if engine.rank == 0 else Path(f"{absent}.not-here")),
        ({}, other),
    ):
        try:
            check_agreed(engine, parse_recipe(raw), versions, root, shared=False, state=state)
        except UserError as error:
            found.append(str(error))
    return found


def test_what_processes_disagree_in_is_named(tmp_path: Path, raw: dict[str, Any]) -> None:
    package, absent, other = together(disagreements, 2, raw, tmp_path)[0]
    assert package.startswith("rank 1 has packages.torch 2.1, but rank 0 has 2.0: start every process with the same")
    assert absent.startswith("rank 1 sees no checkpoint 'step-000001' in") and "all processes share" in absent
    assert other.startswith("rank 1 sees another checkpoint 'step-000002' in") and "all processes share" in other


def waited(engine: Engine, ask: Callable[[], object]) -> tuple[str, float]:
    """Rank 1 hangs where the others ask it; what rank 0 says of it, and after how many seconds."""
    begin = time.monotonic()
    if engine.rank == 1:
        time.sleep(8)
        return "", 0.0
    try:
        with engine.waiting():
            ask()
    except RunFailed as error:
        return str(error), time.monotonic() - begin
    return "nothing", 0.0


def left_waiting() -> tuple[str, float]:
    engine = Engine(timeout=3)
    return waited(engine, lambda: engine.gather(torch.zeros(1)))


def test_a_process_that_hangs_ends_the_others_within_its_time_out() -> None:
    said, seconds = together(left_waiting, 2, grouped=False)[0]
    assert seconds < 7 and "did not answer for training.timeout=3 seconds" in said


def fsdp_without_an_accelerator() -> str:
    accelerate.state.AcceleratorState.__init__ = ORIGINAL
    try:
        Engine(sharding="fsdp2")
    except UserError as error:
        return str(error)
    return ""


ORIGINAL = accelerate.state.AcceleratorState.__init__


def test_sharding_on_a_cpu_is_refused() -> None:
    assert set(together(fsdp_without_an_accelerator, 2)) == {
        "training.sharding=fsdp2 cannot be had on cpu: Accelerate shards on accelerators only; take"
        " training.sharding=none, one whole copy of the weights per process"
    }
