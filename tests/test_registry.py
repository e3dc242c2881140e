"""One registry: names, what is nearest to a wrong one, which options a part takes, and what listing them costs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from vipo import backbones, generators, rewards
from vipo.errors import UserError
from vipo.registry import Entry, build, check_options, did_you_mean, find, parameters


class Lamp:
    def __init__(self, *, colour: str, watts: int = 5, **cable: Any) -> None:
        if watts < 1:
            raise ValueError(f"watts={watts} is dark")
        if colour == "none":
            raise UserError("a lamp without a colour gives no light; name one")
        self.colour, self.watts, self.cable = colour, watts, Cable(2, **cable)


class Cable:
    def __init__(self, gauge: int, *, metres: float = 2.0) -> None:
        self.gauge, self.metres = gauge, metres


class Plain:
    pass


LAMPS = {
    "lamp": Entry(f"{__name__}:Lamp", "gives light", passes_on=f"{__name__}:Cable"),
    "plain": Entry(f"{__name__}:Plain", "has no options"),
}


def make(name: str, **options: Any) -> Any:
    return build("light", LAMPS, name, options)


def test_a_part_is_made_of_its_options_and_those_it_passes_on() -> None:
    lamp = make("lamp", colour="red", metres=0.5)
    assert (lamp.colour, lamp.watts, lamp.cable.metres) == ("red", 5, 0.5)
    assert isinstance(make("plain"), Plain)
    assert list(LAMPS["lamp"].parameters()) == ["colour", "watts", "metres"]  # gauge is Lamp's to give


def test_what_is_offered_is_taken_by_whom_it_fits_and_gives_way() -> None:
    offered = {"watts": 9, "smell": "none"}
    assert build("light", LAMPS, "lamp", {"colour": "red"}, offered=offered).watts == 9
    assert build("light", LAMPS, "lamp", {"colour": "red", "watts": 7}, offered=offered).watts == 7
    assert build("light", LAMPS, "lamp", {}, offered={"colour": "blue"}).colour == "blue"
    assert isinstance(build("light", LAMPS, "plain", {}, offered=offered), Plain)


@pytest.mark.parametrize(
    "name, options, sentence",
    [
        ("lam", {}, "there is no light 'lam'; choose from lamp, plain. Did you mean 'lamp'?"),
        ("xyz", {}, "there is no light 'xyz'; choose from lamp, plain."),
        (
            "lamp",
            {"color": "red"},
            "light 'lamp' takes no option 'color'; it takes colour, watts, metres. Did you mean 'colour'?",
        ),
        ("lamp", {"gauge": 3}, "light 'lamp' takes no option 'gauge'; it takes colour, watts, metres."),
        ("lamp", {"cable": 3}, "light 'lamp' takes no option 'cable'; it takes colour, watts, metres."),
        ("plain", {"x": 1}, "light 'plain' takes no option 'x'; it takes none."),
        ("lamp", {"watts": 3}, "light 'lamp' needs colour= among its options"),
        (
            "lamp",
            {"colour": "red", "watts": 0},
            "light 'lamp' refused its options {'colour': 'red', 'watts': 0}: watts=0 is dark",
        ),
        ("lamp", {"colour": "none"}, "a lamp without a colour gives no light; name one"),
    ],
)
def test_what_cannot_be_made_is_told_in_one_sentence(name: str, options: Mapping[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as told:
        make(name, **options)
    assert str(told.value) == sentence


def test_what_else_may_be_named_is_told() -> None:
    with pytest.raises(UserError, match="choose from lamp, plain, or light a candle"):
        find("light", LAMPS, "torch", otherwise=", or light a candle")


def test_the_nearest_names_come_best_first() -> None:
    known = ["seed", "solver.steps", "steps"]
    assert did_you_mean("stepz", known).startswith(" Did you mean 'steps'")
    assert did_you_mean("zzz", known) == ""


def test_a_builtin_that_does_not_say_what_it_takes_takes_nothing_by_name() -> None:
    assert parameters(min) == {}
    check_options("min", [], parameters(min))


@pytest.mark.parametrize("room", [backbones.BACKBONES, generators.GENERATORS, rewards.REWARDS])
def test_every_entry_leads_to_what_it_names(room: Mapping[str, Entry]) -> None:
    for entry in room.values():
        assert callable(entry.load()) and entry.summary


@pytest.mark.parametrize("room", [backbones.BACKBONES, rewards.REWARDS])
def test_an_entry_whose_part_takes_further_options_says_whose_they_are(room: Mapping[str, Entry]) -> None:
    for name, entry in room.items():
        kinds = {parameter.kind for parameter in inspect.signature(entry.load()).parameters.values()}
        assert (inspect.Parameter.VAR_KEYWORD in kinds) == (entry.passes_on is not None), name


@pytest.mark.parametrize("room", ["backbones", "generators", "rewards", "registry"])
def test_listing_what_there_is_imports_nothing_heavy(room: str) -> None:
    code = f"import sys, vipo.{room}; heavy = {{'torch', 'numpy', 'transformers', 'diffusers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{code}; assert not heavy, heavy"], check=True)
