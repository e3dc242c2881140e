"""``vipo export``: ComfyUI's names, which diffusers converts back; the card beside the weights; a hub on loopback."""

from __future__ import annotations

import html
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import Flux2KleinPipeline, WanPipeline
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load_file

import test_generators_flux2 as flux2
import tiny
import tiny_wan
from fake_hub import fake_hub
from terminal import Vipo, assert_refused
from test_generators_lora import weights
from vipo.errors import UserError
from vipo.generators.comfyui import FLUX2, comfyui_layers, family_of, rename_for_comfyui
from vipo.media.sheets import load_sheet
from vipo.policy import Policy
from vipo.report.outcome import changes
from vipo.report.run import read_run
from vipo.runs.card import base_licence, inert, write_card
from vipo.runs.exporting import write_export
from vipo.runs.trained import find_trained
from vipo.types import LoraLayer

FILE = "pytorch_lora_weights.safetensors"
RANK = 2
TOKEN = "hf_" + "loopback" * 3


def exported(model: Any, targets: str, folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a policy has learnt; its LoRA is in ``folder``, under ComfyUI's names in ``folder``/comfyui."""
    policy = tiny.nudged(Policy.lora(model.network, rank=RANK, alpha=3.0 * RANK, targets=targets, seed=0))
    policy.export(model, folder)
    shutil.copytree(folder, folder / "comfyui")
    rename_for_comfyui(folder / "comfyui", family_of(model))
    return weights(model.network)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=1e-5), name


def test_a_wan_lora_under_its_authors_names_is_the_same_lora_to_diffusers(tmp_path: Path) -> None:
    base = tiny_wan.save_pipeline(tmp_path / "base")
    targets = r"blocks\..*|proj_out|condition_embedder\..*"  # every linear layer
    trained = exported(tiny_wan.generator(base), targets, tmp_path / "lora")
    before, after = (load_file(place / FILE) for place in (tmp_path / "lora", tmp_path / "lora" / "comfyui"))
    back = WanPipeline.lora_state_dict(tmp_path / "lora" / "comfyui")
    assert back.keys() == before.keys() and all(torch.equal(back[name], value) for name, value in before.items())
    kept = {name.removesuffix(".lora_A.weight") for name in after if name.endswith("lora_A.weight")}
    layers = [f"{kind}.{part}" for kind in ("self_attn", "cross_attn") for part in "qkvo"] + ["ffn.0", "ffn.2"]
    rest = ["text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1"]
    names = [f"blocks.{k}.{layer}" for k in (0, 1) for layer in layers] + [*rest, "head.head"]
    assert kept == {f"diffusion_model.{name}" for name in names}
    pipeline = WanPipeline.from_pretrained(base)
    pipeline.load_lora_weights(str(tmp_path / "lora" / "comfyui"), adapter_name="default")
    same(weights(pipeline.transformer), trained)


def test_a_flux2_lora_has_its_queries_keys_and_values_in_one_layer(model_folder: Path, tmp_path: Path) -> None:
    base = flux2.save_pipeline(tmp_path / "base", model_folder)
    model = flux2.adapted(Flux2KleinPipeline.from_pretrained(base))
    trained = exported(model, model.lora_targets["blocks"], tmp_path / "lora")
    state = load_file(tmp_path / "lora" / "comfyui" / FILE)
    down = {name.removesuffix(".lora_A.weight"): value for name, value in state.items() if "lora_A" in name}
    double = ["img_attn.qkv", "txt_attn.qkv", "img_attn.proj", "txt_attn.proj"]
    double += [f"{side}_mlp.{k}" for side in ("img", "txt") for k in (0, 2)]
    expected = [f"double_blocks.0.{name}" for name in double] + ["single_blocks.0.linear1", "single_blocks.0.linear2"]
    assert down.keys() == {f"diffusion_model.{name}" for name in expected}
    assert {len(value) for name, value in down.items() if "qkv" in name} == {3 * RANK}
    pipeline = Flux2KleinPipeline.from_pretrained(base)
    pipeline.load_lora_weights(str(tmp_path / "lora" / "comfyui"), adapter_name="default")
    same(weights(pipeline.transformer), trained)


def test_a_layer_without_its_neighbours_and_one_without_a_name() -> None:
    values = LoraLayer(torch.ones(1, 4), torch.full((6, 1), 2.0))
    (joined,) = comfyui_layers({"transformer_blocks.3.attn.to_k": values}, FLUX2).values()
    assert (joined.up @ joined.down).tolist() == [[0.0] * 4] * 6 + [[2.0] * 4] * 6 + [[0.0] * 4] * 6
    with pytest.raises(UserError, match=r"name is not known for 1 layer \(norm_out\.linear\).*--format diffusers"):
        comfyui_layers({"norm_out.linear": values}, FLUX2)
    with pytest.raises(UserError, match="not known for a LoRA of Tensor"):
        family_of(torch.ones(1))


def test_families_that_comfyui_reads_as_they_are(vipo: Vipo, finished: Path, tmp_path: Path) -> None:
    said = vipo("export", finished, "--format", "comfyui", "--output", tmp_path / "comfyui")
    assert said.code == 0 and (tmp_path / "comfyui" / FILE).read_bytes() == (finished / "export" / FILE).read_bytes()
    card = ModelCard.load(tmp_path / "comfyui" / "README.md")
    assert "comfyui" in card.data.tags and "models/loras" in card.text
    trained = find_trained(finished)
    full = trained.recipe.model_copy(update={"policy": trained.recipe.policy.model_copy(update={"kind": "full"})})
    with pytest.raises(UserError, match="this run trained all weights"):
        write_export(replace(trained, recipe=full), tmp_path / "full", layout="comfyui", dtype=None)
    assert trained.export_folder("comfyui") == finished / "export-comfyui"


def test_the_card_has_recipe_scores_and_pictures_and_no_secret(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "a-secret-word")
    trained = find_trained(finished)
    named = trained.recipe.model_copy(update={"name": "<b>`a-secret-word`"})
    from diffusers import FluxPipeline

    write_card(tmp_path, replace(trained, recipe=named), 2, FluxPipeline, "diffusers")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "a-secret-word" not in text and str(finished.parent) not in text and "\n# &lt;b&gt;\\`\\*\\*\\*\\`\n" in text
    card = ModelCard(text)
    assert card.data.library_name == "diffusers" and card.data.license is None and "unknown: look at the base" in text
    run = read_run(finished)
    for change in changes(run):
        gain = f"{change.gain.mean:+.4g} [{change.gain.low:+.4g}, {change.gain.high:+.4g}] | {change.verdict}"
        assert f"| {change.name} | {change.role} |" in text and gain in text
    recipe = yaml.safe_load(text.rpartition("```yaml\n")[2].partition("\n```")[0])
    assert recipe["policy"]["rank"] == trained.recipe.policy.rank and recipe["generator"]["path"] == "flux"
    tiles, info = load_sheet(run.sheets[2])
    listed = [(entry["text"], tmp_path / entry["output"]["url"]) for entry in card.data.widget]
    assert [prompt for prompt, _ in listed] == info["prompts"][:4]
    for (_, file), tile in zip(listed, tiles, strict=False):
        with Image.open(file) as opened:
            assert opened.tobytes() == tile.tobytes()
        assert (
            f"(samples/{file.name})" in text and (tmp_path / "samples" / file.name.replace("after", "before")).is_file()
        )


def test_a_card_says_on_what_base_its_scores_are(finished: Path, tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    trained = find_trained(finished)
    for kinds, told in (
        ({}, ""),
        ({"quantization": "nf4"}, "trained with its base quantised (nf4), and so are the scores"),
        (
            {"quantization": "int8", "text_quantization": "nf4"},
            "trained with its base quantised (int8) and its text encoders quantised (nf4), and so",
        ),
    ):
        generator = trained.recipe.generator.model_copy(update=kinds)
        recipe = trained.recipe.model_copy(update={"generator": generator})
        write_card(tmp_path, replace(trained, recipe=recipe), 2, FluxPipeline, "diffusers")
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert told in text and bool(told) == ("quantised" in text)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_a_card_must_do_without_is_said(vipo: Vipo, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    log = run / "evaluations.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    last = f"samples/step-{json.loads(lines[-1])['iteration']:06d}.png"

    def told() -> str:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        said = vipo("export", run, "--output", tmp_path / "out")
        assert said.code == 0 and (tmp_path / "out" / "README.md").is_file(), said
        return " ".join(said.err.split())

    assert "the card" not in told()
    assert files(finished / "export") == files(tmp_path / "out") and "README.md" in files(finished / "export")
    (run / last).unlink()
    assert "the card has no pictures: those of an evaluation are not in samples/" in told()
    log.write_text("".join([lines[0].replace(":", ";", 1), *lines[1:]]))
    assert "the card leaves out 1 damaged line of evaluations.jsonl" in told()
    log.unlink()
    assert "the card has no scores: there is no evaluation on record" in told()


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script> & <b>",
        "`code` | *bold* _it_ ~~no~~ # [a](http://b) ![c](d)",
        "- a list",
        "1. another",
        "= a rule",
        "line one\n\n# line two",
        "see https://example.com or www.example.com, me@example.com",
        "\\*not\\* $x$ &lt; end\\",
    ],
)
def test_a_name_is_text_in_a_card_and_nothing_else(name: str) -> None:
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    plain = html.escape(" ".join(name.split()), quote=False).replace('"', "&quot;")
    assert reader.render(inert(name)) == f"<p>{plain}</p>\n"
    cells = reader.render(f"| a | b |\n|---|---|\n| {inert(name)} | 1 |")
    assert f"<td>{plain}</td>\n<td>1</td>" in cells


def test_whose_licence_holds(tmp_path: Path) -> None:
    def told(path: str) -> tuple[str, Any]:
        found = base_licence(path)
        return found.words, found.header and dict(found.header)

    assert told("embedded:emoji-flux") == ("apache-2.0", {"license": "apache-2.0"})
    assert told("Wan-AI/Wan2.1-T2V-14B-Diffusers") == ("Apache-2.0", {"license": "apache-2.0"})
    named = {"license": "other", "license_name": "stability-ai-community-license"}
    assert told("stabilityai/stable-diffusion-3.5-large") == ("Stability AI Community License", named)
    own = {"license": "other", "license_name": "mine", "license_link": "LICENSE.md"}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(own)}---\n# base\n")
    assert told(str(tmp_path)) == ("mine", own)
    for broken in ("---\nlicense: [\n---\n", "no header", "---\nlicense: 3\n---\n"):
        (tmp_path / "README.md").write_text(broken)
        assert told(str(tmp_path)) == ("unknown: look at the base", None)


def test_an_export_is_uploaded_when_that_is_asked_with_a_token(
    vipo: Vipo, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    ask = ("export", finished, "--output", tmp_path / "out", "--push")
    assert_refused(vipo(*ask, "me/lora"), "`hf auth login`, or set HF_TOKEN")
    assert_refused(vipo(*ask, "me/a b"), "'me/a b' is no repository of the hub; give --push OWNER/NAME")
    assert_refused(vipo(*ask[:4], "--public"), "give --push OWNER/NAME too")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_refused(vipo(*ask, "me/lora"), "nothing is exported", "ffline")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    out, repositories = tmp_path / "out", {"me/open": {}}
    with fake_hub(repositories, token=TOKEN) as (endpoint, asked):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert_refused(vipo(*ask, "me/open"), "me/open is there already and public; add --public")
        assert not any(one.startswith("POST") for one in asked) and not out.exists()
        said = vipo(*ask, "me/lora")
        assert said.code == 0 and said.out.split() == [str(out), f"{endpoint}/me/lora"], said
        assert "Uploading to me/lora (new, private):\n  README.md (" in said.err and TOKEN not in said.err
        written = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*.*")}
        assert repositories["me/lora"] == {".private": b"", **written} and {"README.md", FILE} < written.keys()
        assert_refused(vipo(*ask[:3], tmp_path / "again", "--push", "me/lora", "--public"), "already and private")
        shutil.rmtree(out)
        monkeypatch.setenv("HF_TOKEN", "hf_" + "another" * 3)
        said = vipo(*ask, "me/other")
        assert said.code == 2 and f"{str(out)!r} is written, but not uploaded to me/other: " in said.err, said
    assert (out / FILE).is_file() and "me/other" not in repositories
