"""Shared set-up of the tests: no network, one thread, seeds; and the tiny model that the loop's tests train."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TF_CPP_MIN_LOG_LEVEL="3")  # subprocesses inherit them

import jaxtyping
import pytest
import torch
from accelerate.state import AcceleratorState

import tiny


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-needs-weights", action="store_true", help="also run tests that need real weights")


def pytest_configure() -> None:
    torch.set_num_threads(1)  # sums in another order differ in the last bit


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-needs-weights"):
        return
    for item in items:
        if item.get_closest_marker("needs_weights"):
            item.add_marker(pytest.mark.skip(reason="needs real weights: run with --run-needs-weights"))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)  # one process trains at one precision, tests at several


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the run-time shape checks of the tests, so that a function's own error is what a user would see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX pipeline of random weights, small enough to train in a test."""
    return tiny.save_pipeline(tmp_path_factory.mktemp("tiny") / "flux")
