"""Prompts by selection and out of hub data sets: the published layouts of VidProM and HPD v2, small."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from vipo.cli.arguments import read_texts
from vipo.errors import UserError
from vipo.prompts import hub
from vipo.prompts.files import named_prompts, names_prompts
from vipo.prompts.hub import hub_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# As VidProM_unique.csv begins: github.com/WangWenhao0716/VidProM, README.
VIDPROM = """uuid,prompt,time,toxicity,obscene,identity_attack,insult,threat,sexual_explicit
6a83eb92-faa0-572b-9e1f-67dec99b711d,"Flying among clouds and stars, kitten Max smiled",Sun Sep  3 12:27:44 2023,0.00129,0.00016,7e-05,0.00064,2e-05,2e-05
62e5a2a0-4994-5c75-9976-2416420526f7,"zoomed out, sideview of an Grey Alien",Tue Oct 24 20:24:21 2023,0.01777,0.00029,0.00336,0.00256,0.00017,5e-05
00000000-0000-0000-0000-000000000000,,Tue Oct 24 20:24:21 2023,0.5,0.1,0.1,0.1,0.1,0.1
11111111-0000-0000-0000-000000000000,something rude,Tue Oct 24 20:24:21 2023,0.9,0.1,0.1,0.1,0.1,0.1
"""  # noqa: E501
# As train.json and test.json of HPD v2 have their rows: one for each ranking of pictures, so prompts come again.
HPD = [
    {"prompt": "a cat", "file_path": ["1.jpg", "2.jpg"], "human_preference": [1, 0], "user_hash": "x"},
    {"prompt": "a dog", "file_path": ["3.jpg", "4.jpg"], "human_preference": [0, 1], "user_hash": "y"},
    {"prompt": "a cat", "file_path": ["5.jpg", "6.jpg"], "human_preference": [0, 1], "user_hash": "z"},
]


@pytest.fixture
def vidprom(tmp_path: Path) -> Path:
    (tmp_path / "VidProM_unique.csv").write_text(VIDPROM)
    return tmp_path / "VidProM_unique.csv"


@pytest.fixture
def hpd(tmp_path: Path) -> Path:
    (tmp_path / "train.json").write_text(json.dumps(HPD))
    return tmp_path / "train.json"


def texts(name: str | Path) -> list[str]:
    return [prompt.text for prompt in named_prompts(str(name))]


def test_vidprom_is_read_and_filtered(vidprom: Path) -> None:
    clean = f"{vidprom}?column=prompt&where=toxicity<0.2&keep=uuid,insult"
    prompts = named_prompts(clean)
    assert [p.text for p in prompts] == [
        "Flying among clouds and stars, kitten Max smiled",
        "zoomed out, sideview of an Grey Alien",
    ]
    assert [p.index for p in prompts] == [0, 1]
    assert prompts[1].metadata == {"uuid": "62e5a2a0-4994-5c75-9976-2416420526f7", "insult": "0.00256"}
    assert texts(f"{vidprom}?where=toxicity<0.2&where=threat>=1e-4") == ["zoomed out, sideview of an Grey Alien"]
    assert texts(f"{vidprom}?where=toxicity>0.2") == ["something rude"]
    assert len(texts(f"{vidprom}?limit=1")) == 1
    with pytest.raises(UserError, match=r"entry 3 of .* has no text"):  # without a selection every row counts
        texts(vidprom)


def test_hpd_gives_each_prompt_once(hpd: Path) -> None:
    assert texts(f"{hpd}?column=prompt") == ["a cat", "a dog"]
    assert texts(hpd) == ["a cat", "a dog", "a cat"]
    assert texts(f"{hpd}?where=user_hash=y") == texts(f"{hpd}?where=user_hash!=x&where=user_hash!=z") == ["a dog"]
    assert named_prompts(f"{hpd}?keep=user_hash")[0].metadata == {"user_hash": "x"}
    assert names_prompts(f"{hpd}?limit=1") and not names_prompts("what is in file.txt?")
    assert [p.text for p in read_texts([f"{hpd}?limit=1", "a bird"])] == ["a cat", "a bird"]
    assert len(named_prompts("set:geneval?limit=3&keep=tag")) == 3


def test_a_file_whose_name_has_a_question_mark_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "what?limit=1.txt").write_text("a\nb\n")
    assert texts(tmp_path / "what?limit=1.txt") == ["a", "b"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("colum=prompt", r"unknown 'colum' after '\?'; there is column, where, keep, limit"),
        ("column=promt", r"has no column 'promt'; it has uuid, prompt, .*Did you mean 'prompt'"),
        ("keep=mood", "has no column 'mood'"),
        ("where=mood<1", "has no column 'mood'"),
        ("where=toxicity", "where=toxicity must be a column, one of <= >= != < > =, and a value"),
        ("where=uuid<0.2", "compares numbers, but a row has '6a83"),
        ("limit=0", "limit=0 must be a whole number"),
        ("limit=3&limit=4", "limit= is given 2 times"),
        ("where=toxicity>2", "holds no prompt that is asked for"),
    ],
)
def test_what_is_asked_wrongly_is_said(vidprom: Path, asked: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        texts(f"{vidprom}?{asked}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hub:ymhao/HPDv2", r"is not pinned.* https://huggingface\.co/datasets/ymhao/HPDv2/commits/main"),
        ("hub:ymhao/HPDv2/train.json@main", "is not pinned"),
        (f"hub:HPDv2@{COMMIT}", "names no data set; give hub:OWNER/NAME@COMMIT"),
        (f"hub:ymhao/HPDv2/train.json@{COMMIT}?split=test", "split go with a whole data set"),
        (f"hub:ymhao/HPDv2@{COMMIT}?shuffle=1", "unknown 'shuffle'"),
    ],
)
def test_a_hub_name_that_is_none_is_refused(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        named_prompts(name)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    for key in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setattr(constants, key, str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_one_file_of_a_data_set_is_read_out_of_the_hubs_cache(cache: Path, hpd: Path) -> None:
    """Laid out as the hub's client leaves it; without a network what is not there is told."""
    name = f"hub:ymhao/HPDv2/train.json@{COMMIT}?column=prompt"
    assert not hub_source(name).is_here
    with pytest.raises(UserError, match=r"cannot be read: .*`vipo fetch RECIPE --download`"):
        named_prompts(name)
    place = cache / "datasets--ymhao--HPDv2" / "snapshots" / COMMIT
    place.mkdir(parents=True)
    (place / "train.json").write_bytes(hpd.read_bytes())
    assert hub_source(name).is_here and texts(name) == ["a cat", "a dog"]


def test_a_folder_is_read_with_datasets(tmp_path: Path, vidprom: Path) -> None:
    pytest.importorskip("datasets")
    name = f"hub:{vidprom.parent}?split=train&column=prompt&where=toxicity<0.2&keep=threat&limit=5"
    prompts = named_prompts(name)
    assert [p.text for p in prompts] == texts(f"{vidprom}?where=toxicity<0.2")
    assert prompts[0].metadata == {"threat": 2e-05}
    with pytest.raises(UserError, match=r"cannot be read: .*test"):
        named_prompts(f"hub:{vidprom.parent}?split=test")
    with pytest.raises(UserError, match=r"cannot be read"):
        named_prompts(f"hub:{tmp_path / 'nowhere'}")


def test_parquet_with_columns_that_are_not_needed(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from datasets import Dataset

    rows = Dataset.from_dict({"caption": ["a", "b", "a"], "weight": [1.0, 2.0, 3.0], "bytes": [b"x" * 100] * 3})
    rows.to_parquet(tmp_path / "data.parquet")
    assert texts(f"hub:{tmp_path}?column=caption") == texts(f"{tmp_path / 'data.parquet'}?limit=9") == ["a", "b"]


def test_a_pinned_data_set_is_read_once_and_needs_nothing_afterwards(
    cache: Path, vidprom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real folder stands in for the hub's: what is asked of ``datasets`` is the pinned commit, and once only."""
    datasets = pytest.importorskip("datasets")
    asked: list[dict[str, Any]] = []
    load = datasets.load_dataset

    def from_the_hub(repository: str, **options: Any) -> Any:
        asked.append({"repository": repository, **options})
        return load(str(vidprom.parent), split=options["split"], streaming=options["streaming"])

    monkeypatch.setattr(datasets, "load_dataset", from_the_hub)
    name = f"hub:WenhaoWang/VidProM@{COMMIT}?config=VidProM_unique&column=prompt&where=toxicity<0.2&keep=insult"
    first = named_prompts(name)
    assert asked == [
        {
            "repository": "WenhaoWang/VidProM",
            "revision": COMMIT,
            "name": "VidProM_unique",
            "split": "train",
            "streaming": True,
        }
    ]
    assert hub_source(name).kept.is_relative_to(cache) and hub_source(name).is_here
    monkeypatch.setattr(builtins, "__import__", _without_datasets(builtins.__import__))
    assert named_prompts(name) == first and len(first) == 2 and len(asked) == 1
    with pytest.raises(UserError, match=r"needs datasets: pip install 'vipo\[datasets\]', or name one file"):
        named_prompts(name.replace("0.2", "0.3"))
    assert not hub_source(name.replace("0.2", "0.3")).kept.exists()


def _without_datasets(real: Any) -> Any:
    def importing(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest)

    return importing


def test_the_page_names_every_key() -> None:
    page = (Path(__file__).parents[1] / "docs" / "evaluate.md").read_text()
    assert all(f"`{key}=" in page for key in (*hub.MEANINGS, *hub.LOADING))
