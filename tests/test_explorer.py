"""The explorer without its page: what is looked at, what a run kept of its samples, who may ask the server."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from skimage import data as photos

import tiny
from terminal import Vipo, assert_refused
from vipo.assemble import build
from vipo.backbones import BACKBONES
from vipo.errors import UserError
from vipo.explorer import look, opened
from vipo.explorer.opened import Moment, OpenedRun, open_run
from vipo.explorer.serve import asked_here, taken
from vipo.explorer.settings import Settings, backbones, changed, chosen_of, recipe_lines, settings_of
from vipo.explorer.start import opening_of
from vipo.media.recordings import ENDINGS, PRODUCT, Recording, load_recording, prune_recordings, save_recording, small
from vipo.recipe import load_recipe, parse_recipe
from vipo.runs.run import Run
from vipo.runs.step_records import factors_of
from vipo.schema import StructuringSection
from vipo.structuring import oriented, principal_components

LITE = {"backbone": "efficientnet_lite", "backbone_options": {"resolution": 64}}


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return torch.from_numpy(photos.astronaut()[::4, ::4].copy()).permute(2, 0, 1)[:, None] / 255


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A run of two sources that trains on the best and the worst of each group."""
    folder = tmp_path_factory.mktemp("explored")
    raw = tiny.recipe(model_folder, folder / "prompts.txt", credit="advantage_map", judges=["brightness"])
    raw["structuring"] = {"sources": ["deviation", "perceptual"], **LITE}
    raw["prompts"] |= {"group_size": 4}
    raw["training"] |= {"iterations": 1, "keep_per_group": 2}
    raw["evaluation"] |= {"samples_per_prompt": 2, "every": 1}
    list(Run(parse_recipe(raw), folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def explored(run_folder: Path) -> OpenedRun:
    return open_run(run_folder)


def recording(**changes: Any) -> Recording:
    maps = torch.rand(4, 1, 6, 8) + 0.5
    scores = {"redness": torch.tensor([0.1, 0.2, torch.nan, 0.4])}
    made = Recording(
        iteration=7,
        group_size=2,
        first_sample=0,
        credit="advantage_map",
        prompts=("a cat", "a cat", "ein Füßchen", "ein Füßchen"),
        media=torch.rand(4, 3, 1, 12, 16),
        scores=scores,
        advantage=torch.tensor([-1.0, 1.0, 0.0, 0.5]),
        weight=torch.rand(4, 1, 6, 8) - 0.5,
        maps={"deviation": maps, "at/odd.py:thing": maps},
        taken="deviation",
    )
    return replace(made, **changes)


@pytest.mark.parametrize("clips", [False, True])
def test_a_recording_comes_back(tmp_path: Path, clips: bool) -> None:
    maps = {"deviation": torch.rand(4, 3, 6, 8)}
    changes: dict[str, Any] = {"media": torch.rand(4, 3, 3, 12, 16), "weight": torch.rand(4), "maps": maps}
    changes = changes if clips else {}
    given = recording(**changes)
    save_recording(tmp_path / "step-000007.png", given)
    found = load_recording(tmp_path / "step-000007.png")
    assert torch.allclose(found.media, given.media, atol=0.5 / 255 + 1e-6)
    assert torch.allclose(found.weight, given.weight, rtol=0.005) and torch.equal(found.advantage, given.advantage)
    assert found.maps.keys() == given.maps.keys() and torch.allclose(
        found.maps["deviation"], given.maps["deviation"], rtol=0.005
    )
    assert found.scores["redness"].isnan().tolist() == [False, False, True, False]
    same = ("iteration", "group_size", "credit", "prompts", "taken")
    assert all(getattr(found, name) == getattr(given, name) for name in same)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "numbers": lambda path: _flip(path.with_suffix(".safetensors")),
    "no numbers": lambda path: path.with_suffix(".safetensors").unlink(),
    "cut": lambda path: path.with_suffix(".safetensors").write_bytes(b"short"),
    "sheet": lambda path: _flip(path),
    "another's": lambda path: save_recording(path, recording(media=torch.zeros(4, 3, 1, 12, 16))),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_recording_is_one_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "step-000007.png"
    save_recording(path, recording())
    numbers = path.with_suffix(".safetensors").read_bytes()
    DAMAGE[kind](path)
    if kind == "another's":
        path.with_suffix(".safetensors").write_bytes(numbers)
    with pytest.raises(UserError, match="cannot be read"):
        load_recording(path)


def test_recordings_are_bounded_and_what_a_kill_left_of_one_goes_too(tmp_path: Path) -> None:
    for number in (0, 2, 4, 6, 1_000_000):
        save_recording(tmp_path / f"step-{number:06d}.png", recording(iteration=number))
    (tmp_path / "step-000004.safetensors").unlink()
    (tmp_path / "step-000004-mine.txt").touch()
    prune_recordings(tmp_path, 9)
    assert not (tmp_path / "step-000004.png").exists() and len(list(tmp_path.glob("*.png"))) == 4
    prune_recordings(tmp_path, 1)
    kept = {f"step-{number}{ending}" for number in ("000000", "1000000") for ending in ENDINGS}
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "step-000004-mine.txt"}
    assert load_recording(tmp_path / "step-1000000.png").iteration == 1_000_000


def test_a_factor_that_asks_the_generator_is_not_made_again(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are others by then, and where they are sharded one process would wait for all others."""
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", credit="advantage_map")
    raw["structuring"] = {"sources": ["deviation", "text_relevance"]}
    session = build(parse_recipe(raw))
    step = session.trainer.step(last=True)
    monkeypatch.setattr(session.generator, "velocity", None)
    assert set(factors_of(step, session)) == {"deviation"}


def test_what_is_kept_of_a_clip_is_the_frame_of_each_latent_one() -> None:
    media = torch.arange(9.0).reshape(1, 1, 9, 1, 1).expand(1, 3, 9, 6, 8) / 9
    kept = small(media, 3, 4, 4)
    assert kept.shape == (1, 3, 3, 3, 4) and torch.allclose(kept[0, 0, :, 0, 0] * 9, torch.tensor([0.0, 2.0, 6.0]))
    assert small(media, 3, 4, 8).shape == (1, 3, 3, 6, 8)


def test_a_run_keeps_its_first_groups_with_their_maps_and_what_the_update_weighed(run_folder: Path) -> None:
    told = load_recording(run_folder / "rollouts" / "step-000000.png")
    assert set(told.maps) == {PRODUCT, "deviation", "perceptual", "disagreement", "consensus"}
    product = told.maps["deviation"] * told.maps["perceptual"]
    product = product / product.mean((1, 2, 3), keepdim=True)
    assert told.taken == PRODUCT and torch.allclose(told.maps[PRODUCT], product, rtol=0.03, atol=0.01)
    shared = told.maps["disagreement"].unflatten(0, (2, 4))
    assert torch.equal(shared[:, :1].expand_as(shared), shared)
    assert (told.maps["consensus"].flatten(1).std(1) > 0).any()  # ones where nobody's advantage were known
    trained = told.weight.flatten(1).abs().sum(1) > 0
    assert trained.unflatten(0, (2, 4)).sum(1).tolist() == [2, 2]  # the best and the worst of four
    weight = (told.advantage[:, None, None, None] * told.maps[PRODUCT]).clamp(-5, 5)
    assert torch.allclose(told.weight[trained], weight[trained], rtol=0.03, atol=0.02)


def test_a_sample_is_shown_with_its_credit_and_every_map(explored: OpenedRun) -> None:
    trained, before, after = Moment(0, True), Moment(0, False), Moment(1, False)
    assert explored.moments == (before, trained, after) and not explored.notes
    samples = explored.samples(trained)
    told = samples.recording
    assert told is not None and len(samples.groups) == 2 and list(samples.of(1)) == [4, 5, 6, 7]
    best = int(told.advantage[:4].argmax())
    shown = opened.detail(explored, samples, best)
    assert "number 1 by advantage" in shown.rank and shown.advantage == float(told.advantage[best])
    assert opened.caption(explored, samples, best) == f"A {shown.advantage:+.2f}"
    assert [one.source for one in shown.maps if one.taken] == [PRODUCT] == [shown.maps[0].source]
    there = {one.source for one in shown.maps if one.picture is not None}
    missing = {one.source: one.meaning for one in shown.maps if one.picture is None}
    assert there == set(told.maps) and set(missing) == {"reward_gradient", "text_relevance", "evidence"}
    assert "gradient while the iteration runs" in missing["reward_gradient"]
    assert shown.pushed is not None and "made more likely" in shown.pushed_words
    red, blue = np.asarray(shown.pushed, np.float32)[..., 0], np.asarray(shown.pushed, np.float32)[..., 2]
    assert (blue - red).max() > 50 and (red - blue).max() < 5  # praised: blue, nowhere orange
    still = replace(explored.record.steps[0], metrics={"weight_change": 0.0})
    idle = replace(explored, record=replace(explored.record, steps=(still,)))
    assert opened.detail(idle, samples, best).pushed_words.startswith("Not applied")
    weighed = told.weight[:4].flatten(1).abs().sum(1)
    left_out = opened.detail(explored, samples, int(weighed.argmin()))
    assert left_out.pushed is None and "Nothing" in left_out.pushed_words


def test_a_map_made_again_is_the_one_that_was_kept(explored: OpenedRun) -> None:
    samples = explored.samples(Moment(0, True))
    assert samples.recording is not None
    kept = samples.recording.maps["perceptual"][1]
    again = opened.made_again(explored, samples, 1)
    assert (
        again.shape == kept.shape and float(torch.corrcoef(torch.stack([again.flatten(), kept.flatten()]))[0, 1]) > 0.99
    )
    fewer = {name: maps for name, maps in samples.recording.maps.items() if name != "perceptual"}
    shown = opened.detail(explored, replace(samples, recording=replace(samples.recording, maps=fewer)), 1)
    (map_of,) = [one for one in shown.maps if one.source == "perceptual"]
    assert map_of.picture is not None and "made again from the kept picture" in map_of.meaning


def test_an_evaluation_has_pictures_and_scores_and_says_that_nothing_was_trained_on(explored: OpenedRun) -> None:
    samples = explored.samples(Moment(1, False))
    shown = opened.detail(explored, samples, 1)
    assert samples.group_size == 2 and shown.advantage is None and shown.pushed is None
    assert "not trained on" in shown.pushed_words and shown.before is not None
    assert [name for name, _ in shown.scores] == ["redness", "brightness"]
    assert opened.caption(explored, samples, 1) == f"{shown.scores[0][1]:.3f}"
    assert {one.source for one in shown.maps if one.picture is not None} == {"perceptual"}
    assert opened.detail(explored, explored.samples(Moment(0, False)), 0).before is None


def test_a_scalar_run_has_one_weight_for_the_whole_picture(finished: Path) -> None:
    run = open_run(finished)
    samples = run.samples(run.moments[1])
    assert samples.recording is not None and samples.recording.taken == ""
    shown = opened.detail(run, samples, int(samples.recording.advantage.abs().argmax()))
    assert shown.pushed is not None and "whole picture" in shown.pushed_words and not any(m.taken for m in shown.maps)
    assert {one.source for one in shown.maps if one.picture is not None} > {"deviation", "perceptual"}
    assert "credit sample" in opened.summary(run)


def test_a_run_without_recordings_says_so_and_code_of_a_recipe_is_not_run(run_folder: Path, tmp_path: Path) -> None:
    for name in ("recipe.yaml", "metrics.jsonl", "evaluations.jsonl"):
        (tmp_path / name).write_bytes((run_folder / name).read_bytes())
    with pytest.raises(UserError, match="holds no pictures yet"):
        open_run(tmp_path)
    (tmp_path / "samples").symlink_to(run_folder / "samples")
    own = (tmp_path / "recipe.yaml").read_text().replace("backbone: efficientnet_lite", "backbone: evil.py:thing")
    (tmp_path / "recipe.yaml").write_text(own)
    run = open_run(tmp_path)
    assert all(not moment.trained for moment in run.moments) and "of its training nothing was kept" in run.notes[0]
    shown = opened.detail(run, run.samples(run.moments[0]), 0)
    (perceptual,) = [one for one in shown.maps if one.source == "perceptual"]
    assert perceptual.picture is None and "does not run any" in perceptual.meaning


def test_a_look_is_the_map_and_the_components_it_is_made_of(photo: torch.Tensor) -> None:
    settings = settings_of({**LITE, "components": 2})
    seen = look.look("photo.png", photo, settings)
    source = look.source_of(settings.structuring, 1)
    assert torch.equal(seen.maps, source(photo[None], look.map_grid(photo, 1))[0]) and seen.maps.shape == (1, 64, 64)
    found = principal_components(source.backbone(photo.transpose(0, 1)).features, 2)
    assert torch.equal(seen.components, oriented(found, "background")) and torch.equal(seen.explained, found.explained)
    assert look.shares(seen, 0) == [float(x) for x in found.explained[0]] and sum(look.shares(seen, 0)) < 1
    assert look.picture(seen, 0).size == look.overlay(seen, 0).size == look.map_picture(seen, 0).size == (448, 448)
    assert look.component_picture(seen, 0, 1).size == look.component_picture(seen, 0, None).size == (448, 448)
    assert "mean 1.00; half of the credit lies on" in look.weights(seen)


def test_a_clip_has_one_basis_for_all_frames_if_it_is_asked_for(photo: torch.Tensor) -> None:
    clip = torch.cat([photo[:, :, 8 * k : 8 * k + 64, 4 * k : 4 * k + 96] for k in range(5)], 1)
    framed = look.look("clip.gif", clip, settings_of(LITE, 4))
    whole = look.look("clip.gif", clip, settings_of({**LITE, "scope": "clip"}, 4))
    assert framed.frames == whole.frames == (0, 2) and len(framed.maps) == len(framed.components) == 2
    features = look.source_of(whole.settings.structuring, 4).backbone(clip.transpose(0, 1)).features
    found = principal_components(features.transpose(0, 1)[None], 3)
    assert torch.equal(whole.components, oriented(found, "background")[0].transpose(0, 1)[[0, 2]])
    assert torch.equal(whole.explained[0], whole.explained[1]) and not torch.equal(
        framed.explained[0], framed.explained[1]
    )


@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_a_look_asks_the_backbone_once_for_each_frame(
    photo: torch.Tensor, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, asked = settings_of({**LITE, "scope": scope}, 2), list[int]()
    network = look.kept_source(settings).backbone
    ask = type(network).__call__
    monkeypatch.setattr(type(network), "__call__", lambda self, x: asked.append(len(x)) or ask(self, x))  # type: ignore[func-returns-value]
    seen = look.look("clip.gif", photo[:, :, :64, :96].repeat(1, 3, 1, 1), settings)
    assert asked == [3] and seen.frames == (0, 1)


def test_what_changed_is_told_in_settings_numbers_and_a_picture(photo: torch.Tensor) -> None:
    one = look.look("photo.png", photo, settings_of(LITE))
    other = look.look("photo.png", photo, settings_of({**LITE, "components": 1, "smoothing_sigma": 2.0}))
    same, told = look.change(one, one), look.change(one, other)
    assert same.settings == () and same.moved == 0 and same.agreement == pytest.approx(1)
    assert told.settings == ("components: 3 → 1", "smoothing_sigma: 1.0 → 2.0")
    assert told.difference is not None and torch.equal(told.difference, other.maps - one.maps)
    expected = (other.maps - one.maps).abs().mean() / one.maps.mean()
    assert told.moved == pytest.approx(float(expected)) and told.agreement < 0.999
    assert look.difference_picture(other, told.difference, 0).size == (448, 448)
    two = look.look("photo.gif", photo.repeat(1, 2, 1, 1), settings_of(LITE))
    assert look.change(one, two).difference is None


def test_the_recipe_lines_are_the_settings() -> None:
    chosen = {**LITE, "components": 5, "orientation": "skewness", "scope": "clip", "smoothing_sigma": 0.5}
    section = settings_of(chosen).structuring
    overrides = yaml.safe_load(recipe_lines(section))["structuring"]
    recipe = load_recipe(
        "quickstart",
        [
            f"structuring.{key}={yaml.safe_dump(v, default_flow_style=True).splitlines()[0]}"
            for key, v in overrides.items()
        ],
    )
    assert chosen_of(recipe.structuring) == chosen_of(section) and recipe.structuring.sources == ("perceptual",)
    assert changed(Settings(StructuringSection()), Settings(section, 4)) == [
        "backbone_options: none → resolution=64",
        "components: 3 → 5",
        "smoothing_sigma: 1.0 → 0.5",
        "orientation: background → skewness",
        "scope: frame → clip",
        "temporal_stride: 1 → 4",
    ]
    with pytest.raises(UserError, match="aggregation"):
        settings_of({"aggregation": "sum"})


def test_code_is_offered_only_where_the_command_line_named_it() -> None:
    assert list(backbones("efficientnet_lite")) == list(BACKBONES)
    assert list(backbones("mine.py:Net")) == ["mine.py:Net", *BACKBONES]


def test_a_look_is_saved_under_a_free_name_and_a_bad_file_is_refused(tmp_path: Path, photo: torch.Tensor) -> None:
    seen = look.look("photo.png", photo, settings_of(LITE))
    first, second = look.save(seen, tmp_path / "maps"), look.save(seen, tmp_path / "maps")
    assert [path.name for path in (*first, *second)] == [
        f"photo-map{n}.{end}" for n in ("", "-2") for end in ("png", "yaml")
    ]
    assert yaml.safe_load(first[1].read_text())["structuring"]["backbone_options"] == {"resolution": 64}
    with Image.open(first[0]) as sheet:
        assert sheet.width > 4 * 192
    Image.new("L", (4, 4)).save(tmp_path / "dot.png")
    with pytest.raises(UserError, match="at least 8 a side"):
        look.read(tmp_path / "dot.png")


@pytest.mark.parametrize(
    ("host", "origin", "taken_in"),
    [
        ("127.0.0.1:8000", None, True),
        ("localhost:8000", "http://localhost:8000", True),
        ("evil.example:8000", None, False),
        ("127.0.0.1:8000", "http://evil.example", False),
        ("127.0.0.1:8000", "http://127.0.0.1:9000", False),
        ("", None, False),
    ],
)
def test_only_this_machines_own_page_may_ask(host: str, origin: str | None, taken_in: bool) -> None:
    assert asked_here(host, origin) is taken_in


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with taken(0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
        with pytest.raises(UserError, match=r"cannot be had: .*--port, 0 for any"):
            taken(listening.getsockname()[1])


def test_the_command_opens_a_file_and_a_run_and_names_its_extra(
    vipo: Vipo, tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(photos.astronaut()[:64, :64]).save(tmp_path / "photo.png")
    opening = opening_of([tmp_path / "photo.png", run_folder], settings_of({}), tmp_path)
    assert (opening.picture, opening.run) == (tmp_path / "photo.png", run_folder)
    with pytest.raises(UserError, match="opens one picture or clip, not 2"):
        opening_of([tmp_path / "photo.png", tmp_path / "photo.png"], settings_of({}), tmp_path)
    monkeypatch.setitem(sys.modules, "nicegui", None)
    assert_refused(vipo("maps", "--ui", tmp_path / "photo.png"), "pip install 'vipo[ui]'")
    assert_refused(vipo("maps", "--ui", tmp_path / "lost.png"), "does not exist")
    assert_refused(vipo("maps", "--ui", tmp_path), "is not a run directory")
    assert_refused(vipo("maps"), "--ui")
