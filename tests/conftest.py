"""Shared set-up of the tests: no network, one thread, seeds; and the tiny model that the loop's tests train."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
os.environ.update(OMP_NUM_THREADS="1", TF_CPP_MIN_LOG_LEVEL="3")  # subprocesses inherit them
os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # what it says while it is imported would follow the summary of a worker
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # the same, where the processor computes in bfloat16
os.environ.pop("COLUMNS", None)  # a console keeps the width that it finds when it is first imported
if "--run-needs-gpu" in sys.argv:
    os.environ["VIPO_TESTS_SEE_GPU"] = "1"  # for xdist's workers, which are told no options before they read this file
if "VIPO_TESTS_SEE_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import jaxtyping
import pytest
import torch
from accelerate.state import AcceleratorState

import tiny
from terminal import Said, Vipo
from vipo import offline
from vipo.cli import main
from vipo.recipe import parse_recipe
from vipo.runs.run import Run

NEEDS = {"weights": "real weights", "gpu": "a GPU", "index": "a package index"}


CAMPAIGN_SECONDS = 1800  # of one test that takes long, on a machine that is busy


def pytest_addoption(parser: pytest.Parser) -> None:
    for need, what in NEEDS.items():
        parser.addoption(f"--run-needs-{need}", action="store_true", help=f"also run tests that need {what}")
    parser.addoption(
        "--run-long", action="store_true", help="also run tests of hundreds of cases, and those that take long"
    )


def pytest_configure() -> None:
    torch.set_num_threads(1)  # sums in another order differ in the last bit


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        campaign = item.get_closest_marker("long") or item.get_closest_marker("needs_index")
        if campaign and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(CAMPAIGN_SECONDS))
        if item.get_closest_marker("long") and not config.getoption("--run-long"):
            item.add_marker(pytest.mark.skip(reason="takes long: run with --run-long"))
    for need, what in NEEDS.items():
        skip = pytest.mark.skip(reason=f"needs {what}: run with --run-needs-{need}")
        for item in items:
            if item.get_closest_marker(f"needs_{need}") and not config.getoption(f"--run-needs-{need}"):
                item.add_marker(skip)
    if config.getoption("--run-needs-gpu"):
        hidden = pytest.mark.skip(reason="compares with a CPU: run without --run-needs-gpu, which hides the GPU")
        for item in items:
            if item.get_closest_marker("on_cpu"):
                item.add_marker(hidden)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)  # one process trains at one precision, tests at several
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # the next module's fixtures come before its first test


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the run-time shape checks of the tests, so that a function's own error is what a user would see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a hub that does not answer; what is found out about it is forgotten afterwards."""
    for flag in offline.OFFLINE:
        monkeypatch.delenv(flag, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    offline._asked_once.cache_clear()
    yield "http://127.0.0.1:9"
    offline._asked_once.cache_clear()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX pipeline of random weights, small enough to train in a test."""
    return tiny.save_pipeline(tmp_path_factory.mktemp("tiny") / "flux")


@pytest.fixture
def vipo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Vipo:
    """``vipo ARGUMENTS`` in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("VIPO_DEBUG", raising=False)

    def call(*arguments: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["vipo", *map(str, arguments)])
        capsys.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stopped:
            main()
        return Said(int(stopped.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A finished run of the tiny model; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    changes = {"training__iterations": 2, "judges": ["brightness"]}
    list(Run(parse_recipe(tiny.recipe(model_folder, folder / "prompts.txt", **changes)), folder / "run"))
    return folder / "run"
