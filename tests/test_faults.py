"""What a night may bring: kills at any moment, signals, a disk without space, clocks, and files that were damaged.

The short forms run with all tests; the campaigns are ``long`` (``make faults``) and print their tables, which
docs/reliability.md has.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import faults
import gloo
import tiny
import tiny_wan
from faults import Place, call, clock_jumps, kind_of, undisturbed
from vipo.training.saved import list_checkpoints

SEED = 20261126
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "LoRA with maps": {"training": {"maps_every": 2}},
    "full weights with their average": {"policy": {"kind": "full", "rank": None, "ema_decay": 0.9}},
    "two optimiser steps": {"optimizer": {"per_iteration": 2}, "policy": {"ema_decay": 0.9}},
    "scored in the background": {"training": {"prompts_at_once": 1}},
    "text cache, the best kept": {
        "generator": {"text_cache": "cache"},
        "training": {"keep_best": "redness", "checkpoint_every": 3, "keep_checkpoints": 1},
        "evaluation": {"every": 1},
    },
    "clips": {},
}


def write_case(root: Path, case: str) -> Path:
    """A recipe of three iterations, each saved and evaluated, and the model it trains."""
    save = tiny_wan.save_pipeline if case == "clips" else tiny.save_pipeline
    raw = tiny.recipe(save(root / "model"), root / "prompts.txt")
    if case == "clips":
        height, width = tiny_wan.SIZES["2.1"]
        raw["generator"] |= {"name": "wan", "height": height, "width": width, "frames": tiny_wan.FRAMES, "fps": 4}
        raw["evaluation"]["limit"] = 1
    if case == "LoRA with maps":
        raw |= {"credit": "advantage_map", "structuring": {"sources": ["deviation"]}}
    raw["training"] |= {"iterations": 3, "checkpoint_every": 1}
    for section, changes in CASES[case].items():
        raw[section] |= changes
    if "text_cache" in raw["generator"]:
        raw["generator"]["text_cache"] = str(root / "cache")
    return tiny.write_recipe(root / "recipe.yaml", raw)


@pytest.fixture(scope="module")
def place_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Place]:
    """The place of a case, empty."""
    made: dict[str, Place] = {}

    def place(case: str) -> Place:
        if case not in made:
            root = tmp_path_factory.mktemp("place")
            made[case] = undisturbed(root, write_case(root, case))
        made[case].clear()
        return made[case]

    return place


def finish(place: Place) -> None:
    """Start it again as a scheduler would; it must end, and as if nothing had happened."""
    fork = place.start()
    assert fork.ended() == 0, fork.words()
    assert "Traceback" not in fork.words(), fork.words()
    assert not place.differences()


def drawn(place: Place, rng: random.Random, kind: str) -> int:
    """The number of an operation of one kind."""
    return 1 + rng.choice([i for i, operation in enumerate(place.operations) if kind_of(operation, place) == kind])


def kill(place: Place, at: int) -> int:
    fork = place.start(place.fault("kill", at))
    return fork.ended()


@pytest.mark.parametrize(
    ("case", "kinds"),
    [
        ("LoRA with maps", ("checkpoint", "evaluation", "export", "beginning")),
        ("text cache, the best kept", ("text cache", "pictures", "checkpoint")),
    ],
)
def test_a_run_killed_inside_any_write_ends_as_if_nothing_had_happened(
    place_of: Callable[[str], Place], case: str, kinds: tuple[str, ...]
) -> None:
    rng = random.Random(SEED)
    for kind in kinds:
        place = place_of(case)
        at = drawn(place, rng, kind)
        assert kill(place, at) == -signal.SIGKILL, place.operations[at - 1]
        finish(place)


def show(lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        sys.stdout.write("\n".join(["", *lines, ""]))


KILLS = 100


@pytest.mark.long
def test_a_hundred_kills(place_of: Callable[[str], Place], capsys: pytest.CaptureFixture[str]) -> None:
    """Every fourth by time, the others inside an operation, kind after kind; every third time the resume dies too."""
    rng, counted, equal, wrong = random.Random(SEED), Counter[str](), Counter[str](), list[str]()
    for number in range(KILLS):
        case = list(CASES)[number % len(CASES)]
        place = place_of(case)
        what = kill_somehow(place, rng, number)
        if number % 3 == 0:
            what += ", then again"
            kill_while_going_on(place, rng)
        counted[f"{case}: all"] += 1
        counted[what] += 1
        try:
            finish(place)
            equal[f"{case}: all"] += 1
            equal[what] += 1
        except AssertionError as error:
            wrong.append(f"kill {number}, {case}, {what}: {str(error)[-1500:]}")
    show([f"{what}: {equal[what]} of {count} equal" for what, count in sorted(counted.items())], capsys)
    assert not wrong, "\n".join(wrong)


def kill_somehow(place: Place, rng: random.Random, number: int) -> str:
    """Kill the run from within or, every fourth, from without at some time; what it was doing."""
    if number % 4 == 3:
        fork, moment = place.start(), rng.uniform(0.1, 1.0) * place.seconds
        time.sleep(moment)
        fork.process.kill()
        fork.process.join()
        return "at a time"
    kinds = sorted({kind_of(operation, place) for operation in place.operations})
    kind = kinds[number // len(CASES) % len(kinds)]
    assert kill(place, drawn(place, rng, kind)) == -signal.SIGKILL
    return kind


def kill_while_going_on(place: Place, rng: random.Random) -> None:
    """At one of the first hundred operations, among which what is put back is; it may end before."""
    kill(place, rng.randrange(1, 100))


PROCESSES = 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds", [("checkpoint",), pytest.param(("evaluation", "log", "export"), marks=pytest.mark.long)]
)
def test_two_processes_of_which_the_writer_is_killed(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    recipe, rng = write_case(tmp_path, "LoRA with maps"), random.Random(SEED)

    def codes(words: list[str | Path], fault: faults.Fault | None) -> list[int | None]:
        ended = gloo.vipo(*words, processes=PROCESSES, before=partial(faults.prepare, fault, rank=0))
        return [one.code for one in ended]

    def calm(words: list[str | Path], fault: faults.Fault | None) -> None:
        assert codes(words, fault) == [0, 0]

    place = undisturbed(tmp_path, recipe, calm)
    for kind in kinds:  # the other may be done where only the writer is at work: in the export
        place.clear()
        killed, other = codes(place.words(), place.fault("kill", drawn(place, rng, kind)))
        assert killed == -signal.SIGKILL and other in (0, 3)
        calm(place.words(), None)
        assert not place.differences()


def middle(place: Place) -> int:
    """An operation of the second iteration: its line in the log; what a run that failed left is removed first."""
    logged = [i for i, operation in enumerate(place.operations) if operation.name == "timing.jsonl"]
    return 1 + logged[2]


@pytest.mark.parametrize(("happening", "code"), [("interrupt", 130), ("twice", 130)])
def test_a_run_asked_to_stop_goes_on_to_the_same_end(
    place_of: Callable[[str], Place], happening: faults.Happening, code: int
) -> None:
    """A second signal stops at once, without saving; what was saved before is enough."""
    place = place_of("LoRA with maps")
    fork = place.start(place.fault(happening, middle(place)))
    assert fork.ended() == code, fork.words()
    assert "Traceback" not in fork.words() and ("Stopped and saved" in fork.words()) == (happening == "interrupt")
    saved = [path.name for path in list_checkpoints(place.output / "checkpoints")]
    assert saved == (["step-000001", "step-000002"] if happening == "interrupt" else ["step-000001"])
    finish(place)


def test_a_run_that_was_held_and_let_go_ends_as_if_nothing_had_happened(place_of: Callable[[str], Place]) -> None:
    place = place_of("LoRA with maps")
    fork = place.start(place.fault("stop", middle(place)))
    status = Path(f"/proc/{fork.process.pid}/stat")
    deadline = time.monotonic() + 60
    while status.read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline and fork.process.is_alive(), fork.words()
        time.sleep(0.05)
    assert fork.process.pid is not None
    os.kill(fork.process.pid, signal.SIGCONT)
    assert fork.ended() == 0, fork.words()
    assert not place.differences()


def test_a_clock_that_jumps_changes_no_result(place_of: Callable[[str], Place]) -> None:
    place = place_of("LoRA with maps")
    fork = place.start(before=clock_jumps)
    assert fork.ended() == 0, fork.words()
    assert not place.differences()


def refused(place: Place, happening: faults.Happening, at: int) -> str:
    """What the run says, in one sentence, when the system refuses it a write."""
    fork = place.start(place.fault(happening, at))
    assert fork.ended() == 2, (place.operations[at - 1], fork.words())
    (sentence,) = [line for line in fork.words().splitlines() if line.startswith("vipo: ")]
    assert "Traceback" not in fork.words() and "Fatal" not in fork.words(), fork.words()
    return sentence


FULL = ("checkpoint", "pictures", "evaluation", "log", "export", "report", "beginning")


@pytest.mark.parametrize("kinds", [FULL[:3], pytest.param(FULL[3:], marks=pytest.mark.long)])
def test_a_full_disk_is_one_sentence_and_with_space_again_it_goes_on(
    place_of: Callable[[str], Place], kinds: tuple[str, ...]
) -> None:
    for kind in kinds:
        place = place_of("LoRA with maps")
        kinds_in_order = [kind_of(operation, place) for operation in place.operations]
        sentence = refused(place, "full", 1 + kinds_in_order.index(kind))
        assert str(place.output) in sentence and "No space left on device" in sentence, sentence
        finish(place)


def test_a_read_only_folder_is_one_sentence(place_of: Callable[[str], Place]) -> None:
    place = place_of("LoRA with maps")
    assert "Read-only file system" in refused(place, "read-only", 1)
    assert not place.output.exists()
    finish(place)
    place.clear()
    assert "Read-only file system" in refused(place, "read-only", middle(place))
    finish(place)


def test_a_folder_that_vanishes_is_one_sentence_and_back_again_it_goes_on(place_of: Callable[[str], Place]) -> None:
    place = place_of("LoRA with maps")
    fork = place.start(faults.Fault((place.output,), "vanish", middle(place)))
    assert fork.ended() == 2 and "Traceback" not in fork.words(), fork.words()
    assert f"{place.output}" in fork.words()
    shutil.rmtree(place.output, ignore_errors=True)
    (place.root / "run-vanished").rename(place.output)
    finish(place)


def test_an_output_that_is_a_file_is_one_sentence(place_of: Callable[[str], Place]) -> None:
    place = place_of("LoRA with maps")
    place.output.write_text("mine")
    code, said = call(place.root / "said.txt", *place.words())
    assert code == 2 and "is a file, not a folder" in said and place.output.read_text() == "mine"
    place.output.unlink()


def cut(whole: bytes, rng: random.Random) -> bytes:
    return whole[: rng.randrange(1, max(2, len(whole)))]


def flipped(whole: bytes, rng: random.Random) -> bytes:
    place, bit = rng.randrange(len(whole)), rng.randrange(8)
    return whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]


def garbage(whole: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(len(whole))


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "cut short": cut,
    "emptied": lambda _whole, _rng: b"",
    "a bit flipped": flipped,
    "garbage": garbage,
    "missing": lambda _whole, _rng: None,
}
DAMAGED = [
    *(f"checkpoints/step-000003/{name}" for name in ("policy.safetensors", "optimizer.safetensors", "state.json")),
    *("metrics.jsonl", "timing.jsonl", "evaluations.jsonl", "recipe.yaml", "environment.json"),
    *("samples/step-000003.png", "samples/step-000003.json", "maps/step-000002.png"),
    "export/pytorch_lora_weights.safetensors",
]
COMMANDS = ("resume", "report", "compare", "page", "export", "sample")
FLIPS = 3  # bits flipped in each file; every other damage is done once


class Damaged:
    """A finished run that is damaged and asked for things, again and again in the same place."""

    def __init__(self, root: Path) -> None:
        self.root, self.run, self.good, self.other = root, root / "run", root / "good", root / "other"
        self.recipe = write_case(root, "LoRA with maps")
        assert call(root / "said.txt", "train", self.recipe, "--output", self.run)[0] == 0
        shutil.copytree(self.run, self.good)
        shutil.copytree(self.run, self.other)
        self.expected: dict[str, tuple[int, str, dict[str, bytes]]] = {}
        for command in COMMANDS:
            self.restore()
            self.expected[command] = self.result(command)
        assert {code for code, _, _ in self.expected.values()} == {0}, self.expected

    def restore(self) -> None:
        shutil.rmtree(self.run)
        shutil.copytree(self.good, self.run)

    def spoil(self, name: str, content: bytes | None) -> None:
        self.restore()
        if content is None:
            (self.run / name).unlink()
        else:
            (self.run / name).write_bytes(content)

    def words(self, command: str) -> list[str | Path]:
        shutil.rmtree(self.root / "got", ignore_errors=True)
        return {
            "resume": ["train", self.recipe, "training.iterations=4", "--output", self.run, "--resume"],
            "report": ["report", self.run],
            "compare": ["compare", self.other, self.run],
            "page": ["compare", self.other, self.run, "--html", self.root / "got" / "page.html"],
            "export": ["export", self.run, "--output", self.root / "got"],
            "sample": ["sample", self.run, "--output", self.root / "got"],
        }[command]

    def result(self, command: str) -> tuple[int, str, dict[str, bytes]]:
        """The exit code, what was said, and the files that were made."""
        code, said = call(self.root / "said.txt", *self.words(command))
        if command == "resume":
            names = ("metrics.jsonl", "evaluations.jsonl", "export/pytorch_lora_weights.safetensors")
            made = {name: (self.run / name).read_bytes() for name in names if (self.run / name).exists()}
        elif command == "report":
            made = {"report.html": (self.run / "report.html").read_bytes()}
        else:
            made = {path.name: path.read_bytes() for path in self.root.glob("got/**/*") if path.is_file()}
        return code, said, made

    def came_to(self, command: str) -> str:
        """How a command took the damage."""
        code, said, made = self.result(command)
        expected, told = self.expected[command], tellings(command, said, made)
        if "Traceback" in said or code not in (0, 2, 3):
            return f"trace: {said[-1200:]}"
        if code:
            return "refused"
        if made == expected[2] and (command != "compare" or said == expected[1]):
            return "as if nothing had happened"
        return "told" if told > tellings(command, expected[1], expected[2]) else "otherwise"


TOLD = (
    "passed over",
    "were lost",
    "lines were changed",
    "was cut short",
    "cannot be read",
    "not in samples",
    "has no scores",
    "Not complete",
    "is not what its checkpoint",
    "damaged",
    "not recorded",
    "Not recorded",
    "cannot be shown",
    "No iteration is on record",
    "There is no verdict yet",
    "last evaluation is of",
    "are not shown",
)


def tellings(command: str, said: str, made: dict[str, bytes]) -> int:
    """How often something wrong is told, by the command, in the log or on the page."""
    shown = {"resume": "metrics.jsonl", "report": "report.html", "page": "page.html"}
    pages = [made.get(shown[command], b"")] if command in shown else []
    return sum(text.count(word) for text in (said, *(page.decode(errors="replace") for page in pages)) for word in TOLD)


@pytest.mark.long
def test_no_damage_shows_a_trace_and_no_resume_goes_on_to_something_else_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, run, counted, wrong = random.Random(SEED), Damaged(tmp_path), Counter[tuple[str, str]](), list[str]()
    for name in DAMAGED:
        whole = (run.good / name).read_bytes()
        for damage, spoil in DAMAGES.items():
            for _ in range(FLIPS if damage == "a bit flipped" else 1):
                content = spoil(whole, rng)
                for command in COMMANDS:
                    run.spoil(name, content)
                    came_to = run.came_to(command)
                    counted[command, came_to.partition(":")[0]] += 1
                    counted["all", came_to.partition(":")[0]] += 1
                    if came_to.startswith("trace") or came_to == "otherwise":
                        wrong.append(f"{command}, {name}, {damage}: {came_to}")
    table = [f"{command}: {what}: {count}" for (command, what), count in sorted(counted.items())]
    show([*table, *(line.partition("\n")[0][:200] for line in wrong)], capsys)
    shown = ("report", "compare", "page")  # what is left of a log; a digit of metrics.jsonl has no checksum of its own
    assert not [line for line in wrong if "trace" in line or not line.startswith(shown)], "\n".join(wrong)
