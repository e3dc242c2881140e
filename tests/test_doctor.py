"""What ``vipo doctor`` says of a machine."""

from __future__ import annotations

import json
from importlib.metadata import metadata, version

import pytest
import torch

from terminal import Vipo
from vipo import doctor
from vipo.generators import attention

CPU = torch.device("cpu")


def test_attention_is_tried_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    found = attention.survey(CPU, torch.bfloat16)
    assert found["native"] == found["_native_math"] == ""
    assert found["sage"] == "no backward" and "hub" in found["flash_hub"] and found["_native_npu"]
    broken = [torch.full((1,), float("nan")), torch.zeros(1), torch.zeros(1)]
    monkeypatch.setattr(attention, "_through", lambda *_: broken)
    assert attention.survey(CPU, torch.bfloat16)["native"] == "its gradient is missing or not finite"


def test_the_doctor_speaks_to_people_and_programs(vipo: Vipo) -> None:
    told = vipo("doctor", "--offline")
    assert told.code == 0 and not told.err, told
    assert "native" in told.out and "GiB free" in told.out and "not asked" in told.out
    document = json.loads(vipo("doctor", "--offline", "--json").out)
    assert document["devices"][0]["attention"]["native"] == "" and document["devices"][0]["memory"] > 2**30
    named = {extra["name"] for extra in document["extras"]}
    assert "dev" not in named and (not metadata("vipo").get_all("Provides-Extra") or named >= {"video", "quantization"})


def test_an_extra_lacks_what_is_not_installed_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2", *(f"{need}; extra == 'own'" for need in ("torch>=2", "pillow>=999", "no-such-package>=1"))]
    monkeypatch.setattr(doctor, "requires", lambda _name: [*lines, "no-such-package; extra == 'dev'"])
    (own,) = doctor.extras()
    assert own.name == "own" and own.install == "pip install 'vipo[own]'"
    assert own.missing == ("no-such-package", f"pillow>=999 (here is {version('pillow')})")


def test_a_hub_that_does_not_answer_is_said(silent_hub: str) -> None:
    found = doctor.hub()
    assert found.startswith(f"{silent_hub} does not answer")
