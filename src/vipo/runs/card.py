"""The model card of an export: what was trained on what, what it gained, what it draws, and whose licence holds.

A README.md as the hub reads it, built from huggingface_hub's ``ModelCardData`` and diffusers' ``populate_model_card``.
diffusers' ``load_or_create_model_card`` is not used: it asks the hub first, and its template is a list of things to do.

Nothing in a card is a secret or a folder of this machine, and what users named (prompts, rewards, runs) is text in it,
never markup.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import yaml
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData

from vipo.assemble import model_path
from vipo.errors import UserError
from vipo.fetch.models import cached, published
from vipo.files import is_path, write_text
from vipo.media.clips import cut, save_webp
from vipo.media.pictures import save_png
from vipo.media.sheets import load_sheet
from vipo.prompts.files import EMBEDDED
from vipo.report.outcome import before_and_after, changes, headline
from vipo.report.run import RunRecord, read_run
from vipo.runs.trained import Trained
from vipo.secrets import public, redacted

log = logging.getLogger(__name__)

CARD, PICTURES = "README.md", "samples"
SHOWN = 4  # prompts with pictures, the first ones of the evaluation
QUALITY = 90  # of clips
HUB_NAMES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}  # of licences in published.json; the hub calls the rest "other"
UNKNOWN = "unknown: look at the base"
# What may begin or be markup; of colons, dots, dashes and the like only where they would make a link, list or heading.
MARKUP = re.compile(r"([\\`*_\[\]()#+!|~@$]|:(?=//)|(?<=www)\.|^[-=]|(?<=\d)\.(?=\s))", re.IGNORECASE)


@dataclass(frozen=True)
class Licence:
    """The base model's: in words, and as a model card's header has it."""

    words: str = UNKNOWN
    header: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Picture:
    """Files of a prompt's first sample, before and after training, relative to the card."""

    prompt: str
    before: str
    after: str


def write_card(folder: Path, trained: Trained, iteration: int, kind: type[Any], layout: str) -> list[str]:
    """Write README.md, and the pictures that it shows, beside an export; what the card had to do without, in words.

    Args:
        iteration: that the weights are of.
        kind: the pipeline class that loads the export, or its base.
        layout: of a LoRA's names, ``diffusers`` or ``comfyui``.
    """
    recipe = public(trained.recipe.model_dump(mode="json", exclude_none=True))
    told: list[str] = []
    known = _until(_record(trained, told), iteration)
    pictures = [] if known is None else _pictures(folder, known, told)
    scores = _scores(known, iteration, told)
    licence = base_licence(trained.recipe.generator.path)
    name = inert(trained.recipe.name or trained.directory.root.resolve().name)
    parts = [
        f"# {name}",
        _what(recipe, iteration, licence),
        f"## Use\n\n{_use(recipe, kind, layout)}",
        f"## Scores\n\n{scores}",
        *([f"## Pictures\n\n{_table(pictures)}"] if pictures else []),
        f"## Recipe\n\n{_recipe(recipe)}",
    ]
    card = ModelCard(
        f"---\n{_header(recipe, licence, pictures, layout).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
    )
    populate_model_card(card)
    write_text(folder / CARD, str(card))
    return [f"the card {what}" for what in told]


def inert(text: str) -> str:
    """One line of Markdown that shows the text: no markup, HTML or link in it, and no secret."""
    line = " ".join(redacted(str(text)).split())
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        line = line.replace(char, entity)
    return MARKUP.sub(r"\\\1", line)


def base_licence(path: str) -> Licence:
    """From the base's own card, in its folder or the hub's cache, or else what is known of published models."""
    known = published().get(path, {}).get("licence")
    header = _licence_header(path)
    if header:
        words = header.get("license_name") or header["license"]
        return Licence(words, header)
    if known is None:
        return Licence()
    named = HUB_NAMES.get(known)
    slug = re.sub(r"[^a-z0-9.]+", "-", known.lower()).strip("-")
    return Licence(known, {"license": named} if named else {"license": "other", "license_name": slug})


def _licence_header(path: str) -> dict[str, str]:
    """``license``, ``license_name`` and ``license_link`` of the base's card, where it has one that can be read."""
    place = model_path(path)
    card = Path(place) / CARD if Path(place).is_dir() else None if is_path(place) else cached(place, CARD)
    try:
        data = {} if card is None or not card.is_file() else ModelCard.load(card).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError) as error:
        log.warning("the card of the base cannot be read: %s", " ".join(str(error).split())[:200])
        return {}
    wanted = ("license", "license_name", "license_link")
    found = {key: str(data[key]) for key in wanted if isinstance(data.get(key), str) and data[key]}
    return found if "license" in found else {}


def _record(trained: Trained, told: list[str]) -> RunRecord | None:
    """The run's logs, where the checkpoint lies in a run and they can be read."""
    try:
        run = read_run(trained.directory.root) if trained.directory.exists() else None
    except UserError as error:
        told.append(f"has no scores: {error}")
        return None
    told += [] if run is None else [f"leaves out {what}" for what in run.left_out]
    return run


def _until(run: RunRecord | None, iteration: int) -> RunRecord | None:
    """The run with the evaluation of these very weights as its last; None if they were not evaluated."""
    kept = () if run is None else tuple(record for record in run.evaluations if record.iteration <= iteration)
    return replace(run, evaluations=kept) if run and kept and kept[-1].iteration == iteration else None


def _header(recipe: Mapping[str, Any], licence: Licence, pictures: Sequence[Picture], layout: str) -> ModelCardData:
    base, video = str(recipe["generator"]["path"]), int(recipe["generator"]["frames"]) > 1
    lora = recipe["policy"]["kind"] == "lora"
    tags = ["text-to-video" if video else "text-to-image", "diffusers", "reinforcement-learning", "vipo"]
    tags += ["lora", "template:sd-lora"] if lora else []
    tags += [layout] if layout not in tags else []
    given: dict[str, Any] = dict(licence.header or {})
    if not (base.startswith(EMBEDDED) or is_path(base) or Path(base).exists()):
        given["base_model"] = base
    if pictures:
        given["widget"] = [{"text": redacted(p.prompt), "output": {"url": p.after}} for p in pictures]
    return ModelCardData(tags=tags, pipeline_tag=tags[0], **given)


def _what(recipe: Mapping[str, Any], iteration: int, licence: Licence) -> str:
    policy, base = recipe["policy"], inert(_portable(recipe["generator"]["path"]))
    rank = policy.get("rank")
    sizes = "" if rank is None else f" (rank {rank}, alpha {policy.get('alpha') or rank:g})"
    kind = f"A LoRA{sizes}" if policy["kind"] == "lora" else "All weights of the transformer"
    return (
        f"{kind} for {base}, trained by online reinforcement learning with vipo: the weights after iteration"
        f" {iteration} of {recipe['training']['iterations']}.\n\nLicence of the base model: {inert(licence.words)}"
    )


def _use(recipe: Mapping[str, Any], kind: type[Any], layout: str) -> str:
    section = recipe["generator"]
    told = "".join(f"\n\n{sentence}" for sentence in _trained_how(section))
    if layout == "comfyui":
        return f"Put the `.safetensors` file into ComfyUI's `models/loras`; diffusers loads it too.{told}"
    lora = recipe["policy"]["kind"] == "lora"
    load = ['pipeline.load_lora_weights("FOLDER")  # this one, or OWNER/NAME on the hub'] if lora else []
    base = _portable(str(section["path"])) if lora else "FOLDER"
    source = f"embedded.path({base.removeprefix(EMBEDDED)!r})" if base.startswith(EMBEDDED) else repr(base)
    imports = ["from vipo import embedded"] if base.startswith(EMBEDDED) else []
    lines = [f"from diffusers import {kind.__name__}", *imports, ""]
    lines += [f"pipeline = {kind.__name__}.from_pretrained({source})", *load]
    return f"{_fenced(redacted(chr(10).join(lines)), 'python')}{told}"


def _trained_how(section: Mapping[str, Any]) -> list[str]:
    """What of the model it was trained with is not what a pipeline is loaded with."""
    scale = section.get("options", {}).get("guidance_scale")
    told = [] if scale is None else [f"It was trained at guidance {scale:g}."]
    parts = {"base": section["quantization"], "text encoders": section["text_quantization"]}
    kinds = [f"its {part} quantised ({kind})" for part, kind in parts.items() if kind != "none"]
    if kinds:
        told.append(
            f"It was trained with {' and '.join(kinds)}, and so are the scores and pictures here, before and after;"
            " with whole weights they come out a little different."
        )
    return told


def _scores(run: RunRecord | None, iteration: int, told: list[str]) -> str:
    """The table of gains, or why there is none."""
    try:
        found = [] if run is None else changes(run)
        why = "there is no second evaluation to compare with"
    except UserError as error:
        found, why = [], str(error)
    pair = None if run is None else before_and_after(run)
    if run is None:
        why = f"there is no evaluation on record of the weights after iteration {iteration}"
    if run is None or not found or pair is None:
        told.append(f"has no scores: {why}")
        return inert(f"None: {why}.")
    before = "untrained" if pair[0].iteration == 0 else f"iteration {pair[0].iteration}"
    rows = [
        f"| {inert(c.name)} | {c.role} | {c.base.mean:.4g} | {c.trained.mean:.4g} |"
        f" {c.gain.mean:+.4g} [{c.gain.low:+.4g}, {c.gain.high:+.4g}] | {c.verdict} |"
        for c in found
    ]
    prompts = len(pair[1].prompts) // pair[1].samples_per_prompt
    return "\n".join(
        [
            inert(headline(found, "clip" if run.makes_clips else "picture")),
            "",
            f"| score | | {before} | iteration {iteration} | gain | |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"Paired gains over {prompts} prompts from the same noise; intervals are a 95 % bootstrap over prompts of"
            " this one run, another seed may come out elsewhere.",
        ]
    )


def _pictures(folder: Path, run: RunRecord, told: list[str]) -> list[Picture]:
    """Save the first prompts' first samples before and after training; none where they cannot be read."""
    first, last = run.evaluations[0], run.evaluations[-1]
    places = [run.sheets.get(record.iteration) for record in (first, last)]
    if first.prompts != last.prompts or first is last:
        return []  # what is said of the scores holds for them
    if None in places:
        told.append("has no pictures: those of an evaluation are not in samples/")
        return []
    try:
        sheets = [load_sheet(place) for place in places if place is not None]
    except UserError as error:
        told.append(f"has no pictures: {error}")
        return []
    fewest = min(len(last.prompts), *(len(tiles) for tiles, _ in sheets))
    rows = range(0, fewest, last.samples_per_prompt)[:SHOWN]
    (folder / PICTURES).mkdir(exist_ok=True)
    return [
        Picture(last.prompts[row], *(_save(folder, f"{k}-{when}", sheet, row, run) for when, sheet in named))
        for k, row in enumerate(rows)
        for named in [tuple(zip(("before", "after"), sheets, strict=True))]
    ]


def _save(folder: Path, name: str, sheet: tuple[Any, Mapping[str, Any]], row: int, run: RunRecord) -> str:
    tiles, info = sheet
    frames = int(info["frames"])
    file = f"{PICTURES}/{name}.{'png' if frames == 1 else 'webp'}"
    if frames == 1:
        save_png(folder / file, tiles[row])
    else:
        save_webp(folder / file, cut(tiles[row], frames), run.fps, quality=QUALITY)
    return file


def _table(pictures: Sequence[Picture]) -> str:
    rows = [f"| {inert(p.prompt)} | ![before]({p.before}) | ![after]({p.after}) |" for p in pictures]
    told = "The first prompts of the evaluation, not chosen; the same noise before and after."
    return "\n".join([told, "", "| prompt | before | after |", "|---|---|---|", *rows])


def _recipe(recipe: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(_without_folders(recipe), sort_keys=False, allow_unicode=True)
    return f"Files are named without the folders that they lay in.\n\n{_fenced(redacted(text), 'yaml')}"


def _fenced(text: str, language: str) -> str:
    """A code block that no line of the text can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_portable(str(key)): _without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_folders(entry) for entry in value]
    return _portable(value) if isinstance(value, str) else value


def _portable(name: str) -> str:
    """A file's or folder's name alone: where it lies on this machine is nobody's business."""
    return PurePath(name).name if name.startswith(("/", "~")) else name
