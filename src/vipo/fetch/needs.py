"""All that a recipe needs: generator, start, rewards and judges, backbone, prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vipo import backbones, rewards
from vipo.errors import UserError
from vipo.fetch.models import INDEX, network_need, pipeline_need
from vipo.fetch.need import Need, State, merged
from vipo.files import is_path
from vipo.options import needs_sources
from vipo.prompts.files import EMBEDDED, SHIPPED, prompt_file
from vipo.prompts.hub import HUB, hub_source
from vipo.prompts.selection import split
from vipo.registry import find
from vipo.schema import GeneratorSection, JudgeSection, Recipe
from vipo.user_file import file_of, is_user_file

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
# Which options of a reward say where each of its ``weights`` is, in their order.
PLACES = ("pretrained", "tokenizer base clip")
HPD = "'hub:ymhao/HPDv2/train.json@COMMIT?column=prompt' (Apache-2.0), or the list in DanceGRPO's repository"
VIDPROM = "'hub:WenhaoWang/VidProM/VidProM_unique.csv@COMMIT?where=toxicity<0.2' (CC BY-NC 4.0)"
KNOWN_PROMPTS: Mapping[str, str] = {
    "hpd-train.txt": f"published runs use prompts.file={HPD}",
    "hpd-benchmark": "HPD v2's benchmark, as its authors' package hpsv2 gives it, or evaluation.prompts=set:geneval",
    "video-train.txt": f"published runs filter VidProM, prompts.file={VIDPROM}, or DanceGRPO's video_prompts.txt",
    "video-eval.txt": "a list of yours that is not trained on, or evaluation.prompts=set:vbench",
}


def needs(recipe: Recipe) -> list[Need]:
    """What a recipe needs, each thing once.

    Raises:
        UserError: a reward, backbone, prompt set or hub name that there is not.
    """
    return merged(_needs(recipe))


def _needs(recipe: Recipe) -> Iterator[Need]:
    yield from _generator(recipe.generator)
    if recipe.policy.init is not None:
        yield _own_file(recipe.policy.init, "policy.init", "a LoRA of yours")
    for section, named in (("reward", recipe.rewards), ("judge", recipe.judges)):
        for name, asked in named.items():
            yield from _reward(f"{section} {name}", asked.reward or name, asked)
    yield from _own_parts(recipe)
    if needs_sources(recipe.credit) and "perceptual" in recipe.structuring.sources:
        yield from _backbone(recipe.structuring.backbone, recipe.structuring.backbone_options)
    for key, name in (("prompts.file", recipe.prompts.file), ("evaluation.prompts", recipe.evaluation.prompts)):
        yield _prompts(name, key)


def _generator(section: GeneratorSection) -> Iterator[Need]:
    """Its model; of one of the user's own, whose model may be anything, the file too."""
    own, path = section.name is not None and is_user_file(section.name), section.path
    if own:
        yield _own_file(str(file_of(str(section.name))), "generator", "the file with your generator")
    folder = Path(path).expanduser()
    other = own and (is_path(path) or folder.exists()) and not (folder / INDEX).is_file()
    yield _own_file(path, "generator", "what your generator reads") if other else _model(path)


def _model(path: str) -> Need:
    if not path.startswith(EMBEDDED):
        return pipeline_need(path, "generator")
    from vipo import embedded

    try:
        return Need(path, "shipped", ("generator",), "there", str(embedded.path(path.removeprefix(EMBEDDED))))
    except FileNotFoundError as error:
        raise UserError(str(error)) from error


def _reward(user: str, name: str, section: JudgeSection) -> Iterator[Need]:
    if is_user_file(name):
        yield _own_file(str(file_of(name)), user, "the file with your reward")
        return
    entry = find("reward", rewards.REWARDS, name, otherwise=rewards.OTHERWISE)
    if entry.package is not None:
        here = find_spec(entry.package) is not None
        yield Need(f"vipo[{entry.extra}]", "package", (user,), "there" if here else "missing", licence=entry.licence)
    for place, (repository, files) in enumerate(_by_repository(entry).items()):
        given = (section.options.get(option) for option in PLACES[min(place, 1)].split())
        chosen = next((str(value) for value in given if value is not None), repository)
        size = _bytes(entry.size) if place == 0 and chosen == repository else None
        yield network_need(chosen, user, files, size=size, licence=entry.licence if place == 0 else None)
    for option in entry.files:
        named = section.options.get(option)
        hint = f"{user} needs {entry.needs}: name the file in its options, {option}=FILE"
        unnamed = Need(option, "file", (user,), "missing", hint=hint)
        yield unnamed if named is None else _own_file(str(named), user, hint)
    for option in ("url", "base_url"):
        if option in section.options:
            address = str(section.options[option])
            yield Need(address, "service", (user,), "not checked", hint="must answer while it runs")


def _by_repository(entry: rewards.RewardEntry) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for repository, file in entry.weights:
        found.setdefault(repository, []).append(file)
    return found


def _own_parts(recipe: Recipe) -> Iterator[Need]:
    """The files of the user's credit, loss and map sources."""
    sources = recipe.structuring.sources if needs_sources(recipe.credit) else ()
    named = [("credit", recipe.credit), ("loss", recipe.objective.loss), *(("map source", name) for name in sources)]
    for user, name in named:
        if is_user_file(name):
            yield _own_file(str(file_of(name)), user, f"the file with your {user}")


def _backbone(name: str, options: Mapping[str, Any]) -> Iterator[Need]:
    if is_user_file(name):
        yield _own_file(str(file_of(name)), "backbone", "the file with your backbone")
        return
    entry = find("backbone", backbones.BACKBONES, name)
    if entry.model is not None:
        chosen = str(options.get("pretrained", entry.model))
        files = ("config.json", "model.safetensors")
        yield network_need(chosen, f"backbone {name}", files, licence=entry.licence)


def _prompts(name: str, user: str) -> Need:
    if name.startswith((EMBEDDED, SHIPPED)):
        return Need(name, "shipped", (user,), "there", str(prompt_file(split(name)[0])))
    if not name.startswith(HUB):
        plain = name if Path(name).expanduser().exists() else split(name)[0]
        return _own_file(plain, user, KNOWN_PROMPTS.get(Path(plain).name, "a list of yours: docs/evaluate.md, Prompts"))
    source = hub_source(name)
    if source.commit is None:
        return _own_file(source.repository, user, "a data set on disk")
    files = (source.file,) if source.file else ()
    lacking = () if source.is_here else (source.file or "its prompts",)
    state: State = "missing" if lacking else "there"
    hint = None if source.file or not lacking else "vipo fetch --download reads its prompts and keeps them"
    return Need(source.repository, "data set", (user,), state, None, lacking, files, source.commit, hint=hint)


def _own_file(name: str, user: str, hint: str) -> Need:
    path = Path(name).expanduser()
    if path.exists():
        return Need(name, "file", (user,), "there", str(path))
    return Need(name, "file", (user,), "missing", hint=hint)


def _bytes(size: str) -> int | None:
    """What a registry says for people, "3.9 GB", in bytes."""
    match = re.fullmatch(r"([\d.]+) (kB|MB|GB)", size)
    return int(float(match[1]) * UNITS[match[2]]) if match else None
