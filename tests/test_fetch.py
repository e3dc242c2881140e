"""``vipo fetch``: what a recipe needs, what is there, what gets the rest; downloads from a hub on loopback."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

import tiny
from fake_hub import COMMIT, fake_hub
from terminal import Vipo, assert_refused
from vipo import rewards
from vipo.fetch.models import lacking_parts, pipeline_need, published
from vipo.fetch.need import Need, merged
from vipo.fetch.needs import needs
from vipo.plan.blueprint import empty_network
from vipo.plan.published import table
from vipo.recipe import load_recipe, shipped_recipes

CLIP = "openai/clip-vit-large-patch14"
HPD = f"hub:ymhao/HPDv2/train.json@{COMMIT}?column=prompt"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub" / "hub"))
    return tmp_path / "hub" / "hub"


def by_name(recipe: str, *overrides: str) -> dict[str, Need]:
    return {need.name: need for need in needs(load_recipe(recipe, overrides))}


def keep(cache: Path, repository: str, *files: str) -> Path:
    """Files of a model as the hub's client keeps them."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(COMMIT)
    for file in files:
        target = place / "snapshots" / COMMIT / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("{}")
    return place / "snapshots" / COMMIT


def test_a_recipe_with_all_that_ships_is_complete(vipo: Vipo) -> None:
    said = vipo("fetch", "quickstart", "--offline")
    assert said.code == 0 and "Everything is there." in said.out and "embedded:emoji-flux" in said.out
    document = json.loads(vipo("fetch", "quickstart", "--json").out)
    assert document["complete"] and document["bytes_to_download"] == 0


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_says_what_it_needs(name: str) -> None:
    found = by_name(name)
    recipe = load_recipe(name)
    assert recipe.generator.path in found and any("prompts.file" in need.used_by for need in found.values())
    for need in found.values():
        assert need.is_here or need.command or need.hint, need
        if recipe.generator.path.startswith("embedded:"):
            assert need.state == "there", need


def test_a_full_size_recipe_lists_sizes_licences_and_commands(vipo: Vipo) -> None:
    said = vipo("fetch", "flux1-dev-vipo-hpsv2", "--offline")
    assert said.code == 1
    flux = by_name("flux1-dev-vipo-hpsv2")["black-forest-labs/FLUX.1-dev"]
    assert (flux.gated, flux.licence, flux.at_least) == (True, "FLUX.1 [dev] Non-Commercial License", True)
    assert flux.size == 2 * (11901408320 + 83819683 + 123060480 + 4762310656)
    assert f"\n  {flux.command}\n" in said.out  # in one line, to be copied
    assert "accept its licence at https://huggingface.co/black-forest-labs/FLUX.1-dev, then `hf auth login`" in said.out
    assert "hub:ymhao/HPDv2/train.json@COMMIT" in said.out and "To download: at least 44.6 GB;" in said.out
    words = shlex.split(str(flux.command))
    assert words[:3] == ["hf", "download", "black-forest-labs/FLUX.1-dev"] and "transformer/*" in words


def test_the_commands_are_ones_that_hf_takes() -> None:
    """Without a network it goes as far as asking the hub; a wrong option would end it before."""
    pytest.importorskip("huggingface_hub.cli.hf")
    command = shlex.split(str(by_name("flux1-dev-vipo-hpsv2")[CLIP].command))
    call = "import sys; from huggingface_hub.cli.hf import main; main()"
    done = subprocess.run([sys.executable, "-c", call, *command[1:]], capture_output=True, text=True, timeout=120)
    assert "No such option" not in done.stderr and "Usage" not in done.stderr and "ffline" in done.stderr


def test_what_is_in_the_cache_is_found_part_by_part(cache: Path) -> None:
    name = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert pipeline_need(name, "generator").state == "missing"
    folder = keep(cache, name, "vae/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json")
    index = {part: ["diffusers", "X"] for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")}
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline", "image_encoder": [None], **index})
    )
    need = pipeline_need(name, "generator")
    assert (need.state, need.lacking) == ("in part", ("transformer/*", "vae/*", "text_encoder/*"))
    keep(cache, name, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
    shards = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    keep(cache, name, "transformer/one.safetensors")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(shards))
    assert pipeline_need(name, "generator").lacking == ("transformer/two.safetensors",)
    keep(cache, name, "transformer/two.safetensors")
    assert pipeline_need(name, "generator").state == "there"


def test_a_real_pipelines_folder_is_whole_until_a_part_goes(model_folder: Path, tmp_path: Path) -> None:
    import shutil

    assert pipeline_need(str(model_folder), "generator").state == "there"
    copy = Path(shutil.copytree(model_folder, tmp_path / "copy"))
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(copy / "tokenizer")
    assert set(lacking_parts(copy, {})) == {"vae/*", "tokenizer/*"}
    assert pipeline_need(str(tmp_path / "nowhere"), "generator").state == "missing"


def test_options_say_where_else_weights_are(cache: Path, tmp_path: Path) -> None:
    own = tmp_path / "hps.safetensors"
    own.write_bytes(b"")
    asked = f"rewards={{hpsv2.1: {{weight: 1.0, options: {{pretrained: {own}, tokenizer: {tmp_path}/none}}}}}}"
    found = by_name("flux1-dev-vipo-hpsv2", asked, "judges=[]")
    assert found[str(own)].state == "there" and found[f"{tmp_path}/none"].state == "missing"
    assert "xswu/HPSv2" not in found
    keep(cache, "facebook/dinov2-large", "config.json", "model.safetensors")
    assert by_name("flux1-dev-vipo-hpsv2")["facebook/dinov2-large"].state == "there"
    assert "facebook/dinov2-large" not in by_name("flux1-dev-grpo-hpsv2")  # scalar: no map, no backbone
    template = by_name("wan2.1-1.3b-vipo-videoalign")["template"]
    assert template.used_by == ("reward visual", "reward motion") and "template=FILE" in str(template.hint)


def test_a_reward_of_ones_own_a_served_one_and_a_lora_are_needs_too(tmp_path: Path) -> None:
    served = "rewards={mine.py:score: 1.0, remote: {weight: 1.0, options: {url: 'http://127.0.0.1:1'}}}"
    found = by_name("quickstart", served, f"policy={{init: {tmp_path}/lora}}")
    assert found["mine.py"].state == found[f"{tmp_path}/lora"].state == "missing"
    assert found["http://127.0.0.1:1"].state == "not checked"


def test_a_slip_is_refused_as_everywhere(vipo: Vipo) -> None:
    assert_refused(vipo("fetch", "nowhere.yaml"), "'nowhere.yaml' does not exist")
    assert_refused(vipo("fetch", "quickstart", "rewards={emoji_mach: 1.0}"), "no reward 'emoji_mach'")
    assert_refused(vipo("fetch", "quickstart", "prompts.file=hub:a/b"), "is not pinned")


def test_one_thing_that_two_need_is_told_once() -> None:
    one = Need("a/b", "model", ("reward x",), "there", files=("x",), size=5)
    two = Need("a/b", "model", ("judge y",), "missing", lacking=("y",), files=("y",))
    (both,) = merged([one, two])
    assert (both.used_by, both.state, both.lacking, both.files, both.size) == (
        ("reward x", "judge y"), "in part", ("y",), ("x", "y"), 5
    )  # fmt: skip


def test_the_table_of_models_is_that_of_the_plans_configs() -> None:
    """The weights counted are those of networks built from the published configs."""
    counts: dict[str, int] = {}

    def count(part: str) -> int:
        if part not in counts:
            with torch.device("meta"):
                counts[part] = sum(p.numel() for p in empty_network(table("parts")[part], torch.bfloat16).parameters())
        return counts[part]

    for name, model in table("models").items():
        parts = {
            part: count(value) if isinstance(value, str) and value in table("parts") else 0
            for part, value in model.items()
            if part not in ("pipeline", "options")
        }
        assert published()[name]["parts"] == parts, name
    for size in ("small", "base", "large"):
        assert published()[f"facebook/dinov2-{size}"]["weights"] == count(f"dinov2-{size}")


def test_every_reward_that_downloads_says_how_much() -> None:
    from vipo.fetch.needs import _bytes

    assert all(_bytes(entry.size) for entry in rewards.REWARDS.values() if entry.weights)


def run_fetch(home: Path, endpoint: str, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """A process of its own: the hub's client reads its environment once."""
    environment = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    for name in ("HF_HUB_CACHE", "HF_TOKEN"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "vipo", "fetch", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def test_downloads_come_from_the_hub_and_what_is_gated_is_told(tmp_path: Path) -> None:
    prompts = json.dumps([{"prompt": "a cat"}, {"prompt": "a cat"}, {"prompt": "a dog"}]).encode()
    repositories = {
        CLIP: {"config.json": b"{}", "model.safetensors": b"x" * 1000, "pytorch_model.bin": b"y" * 5000},
        "datasets/ymhao/HPDv2": {"train.json": prompts, "train.tar": b"z" * 9000},
        "facebook/dinov2-base": {"config.json": b"{}", "model.safetensors": b"w" * 10},
    }
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"extends: quickstart\nname: mine\njudges: [clipscore]\nprompts: {{file: '{HPD}'}}\n"
        "structuring: {backbone: dinov2, backbone_options: {}}\n"
    )
    home = tmp_path / "home"
    with fake_hub(repositories, gated=("facebook/dinov2-base",)) as (endpoint, asked):
        code, before, _ = run_fetch(home, endpoint, str(recipe))
        assert code == 1 and not any("/resolve/" in one for one in asked)
        sizes = {need["name"]: (need["state"], need["size"], need["gated"]) for need in before["needs"]}
        assert sizes[CLIP] == ("missing", 1000 + 2, False)  # not the pickle beside it
        assert sizes["ymhao/HPDv2"] == ("missing", len(prompts), False)
        assert {need["name"]: need["revision"] for need in before["needs"]}[CLIP] == COMMIT
        code, after, told = run_fetch(home, endpoint, str(recipe), "--download")
        assert not any(one.endswith((".bin", ".tar")) for one in asked), told
    states = {need["name"]: need["state"] for need in after["needs"]}
    assert code == 1 and states[CLIP] == states["ymhao/HPDv2"] == "there"
    assert states["facebook/dinov2-base"] == "missing"
    assert "gated: accept its licence at https://huggingface.co/facebook/dinov2-base and log in" in told
    assert f"{HPD}: 2 prompts" in told
    snapshot = home / "hub" / f"models--{CLIP.replace('/', '--')}" / "snapshots" / COMMIT
    assert (snapshot / "model.safetensors").read_bytes() == b"x" * 1000
    # The hub is gone: what was downloaded is there, and nothing waits for it.
    code, again, _ = run_fetch(home, endpoint, str(recipe))
    assert code == 1 and {need["name"]: need["state"] for need in again["needs"]} == states


def test_without_a_hub_everything_stays_as_it_was_known(tmp_path: Path) -> None:
    code, found, told = run_fetch(tmp_path / "home", "http://nowhere.invalid", "sd3.5-medium-lora")
    assert code == 1 and "Traceback" not in told
    states = {need["name"]: (need["state"], need["revision"]) for need in found["needs"]}
    assert states["stabilityai/stable-diffusion-3.5-medium"] == ("missing", None)
    code, _, told = run_fetch(tmp_path / "home", "http://nowhere.invalid", "sd3.5-medium-lora", "--download")
    assert code == 1 and "Traceback" not in told and "cannot be downloaded: " in told


def test_a_run_trains_on_prompts_that_were_fetched(model_folder: Path, tmp_path: Path) -> None:
    """What fetch leaves is what a run reads."""
    from vipo.assemble import build
    from vipo.recipe import parse_recipe

    place = Path(constants.HF_HUB_CACHE) / "datasets--ymhao--HPDv2" / "snapshots" / COMMIT
    place.mkdir(parents=True)
    (place / "train.json").write_text(json.dumps([{"prompt": "a cat"}, {"prompt": "a dog"}]))
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", prompts__file=HPD, training__precision="no")
    session = build(parse_recipe(raw))
    assert {prompt.text for prompt in session.trainer.prompts.prompts} == {"a cat", "a dog"}
