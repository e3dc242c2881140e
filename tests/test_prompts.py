"""Prompt files of every kind, and which prompts an iteration is dealt."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from vipo.errors import UserError
from vipo.prompts.files import names_prompts, read_prompts, shipped_set, shipped_sets
from vipo.prompts.sampler import PromptSampler
from vipo.types import Prompt

KINDS = {
    "p.txt": "a cat\n\n  a dog  \n",
    "p.jsonl": '{"prompt": "a cat", "mood": 3}\n\n{"text": "a dog"}\n',
    "p.csv": 'caption,mood\na cat,3\n"a dog",\n',
    "p.tsv": "Prompt\tMood\na cat\t3\n a dog\t\n",
    "p.json": '["a cat", {"text": "a dog"}]',
}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_file_gives_its_texts_in_order(tmp_path: Path, name: str) -> None:
    prompts = read_prompts(write(tmp_path, name, KINDS[name]))
    assert [(p.text, p.index) for p in prompts] == [("a cat", 0), ("a dog", 1)]


RARE = ["\x85", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"]  # ends of lines elsewhere


@pytest.mark.parametrize("rare", RARE, ids=ascii)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=ascii)
def test_only_newlines_end_a_prompt(tmp_path: Path, rare: str, end: str) -> None:
    """Inside a prompt anything else stays, and so does rare white space at its ends."""
    texts = [f"a cat{rare}on a mat", f"{rare}a dog{rare}" if rare != "\r" else "a dog", "a fox"]
    content = {
        "p.txt": end.join(texts),
        "p.jsonl": end.join(json.dumps({"prompt": text}, ensure_ascii=False) for text in texts),
        "p.json": json.dumps(texts, ensure_ascii=False),
        "p.csv": end.join(["prompt,mood", *(f'"{text}",3' for text in texts)]),
        "p.tsv": end.join(["prompt\tmood", *(f"{text}\t3" for text in texts)]),
    }
    for name, rows in content.items():
        assert [p.text for p in read_prompts(write(tmp_path, name, rows))] == texts, name


def test_cells_of_a_csv_may_hold_newlines(tmp_path: Path) -> None:
    rows = 'prompt,mood\r\n"a cat\non a\r\nmat",3\r\na dog,4\r\n'
    first, second = read_prompts(write(tmp_path, "p.csv", rows))
    assert first.text == "a cat\non a\r\nmat" and (second.text, second.metadata) == ("a dog", {"mood": "4"})


def test_a_line_without_anything_to_see_is_empty(tmp_path: Path) -> None:
    assert [p.text for p in read_prompts(write(tmp_path, "p.txt", "a cat\n\u2028\n \x0c \n\t a dog \t\n"))] == [
        "a cat",
        "a dog",
    ]


def test_other_columns_become_metadata(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, "p.jsonl", KINDS["p.jsonl"]))[0].metadata == {"mood": 3}
    assert read_prompts(write(tmp_path, "p.csv", KINDS["p.csv"]))[0].metadata == {"mood": "3"}


@pytest.mark.parametrize("name", KINDS)
def test_a_byte_order_mark_is_not_part_of_a_prompt(tmp_path: Path, name: str) -> None:
    marked = write(tmp_path, name, b"\xef\xbb\xbf" + KINDS[name].encode())
    assert [p.text for p in read_prompts(marked)] == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", "\n  \n", "holds no prompt"),
        ("p.jsonl", "", "holds no prompt"),
        ("p.csv", "prompt\n", "holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "cannot be read"),
        ("p.json", '{"prompt": "a"}', "cannot be read: it must be a list"),
        ("p.json", "[3]", "entry 1 of .* is not an object"),
        ("p.jsonl", '["a cat"]\n', "entry 1 of .* is not an object"),
        ("p.jsonl", '{"prompt": "a"}\n{"words": "b"}\n', "entry 2 of .* has no text under prompt or text or caption"),
        ("p.jsonl", '{"prompt": 3}\n', "entry 1 of .* has no text"),
        ("p.csv", "words\na cat\n", "entry 1 of .* has no text"),
        ("p.txt", b"\xff\xfe\x00cat", "cannot be read"),
        ("p.csv", "prompt\na cat\ron a mat\n", "a carriage return stands alone outside double quotes; put its cell"),
        ("p.yaml", "a cat\n", r"must end in one of \.txt, \.jsonl, \.json, \.csv, \.tsv, \.parquet"),
    ],
)
def test_a_bad_file_is_named_in_one_sentence(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(UserError, match=says) as raised:
        read_prompts(path)
    assert "\n" not in str(raised.value) and name in str(raised.value)


def test_quotation_marks_of_partiprompts_are_part_of_the_prompt(tmp_path: Path) -> None:
    rows = 'Prompt\tCategory\tChallenge\tNote\n"G I G G L E" painted as graffiti\tIllustrations\tWriting & Symbols\t\n'
    (prompt,) = read_prompts(write(tmp_path, "PartiPrompts.tsv", rows))
    assert prompt.text == '"G I G G L E" painted as graffiti' and prompt.metadata["Category"] == "Illustrations"


def test_drawbench_has_its_prompts_under_prompts(tmp_path: Path) -> None:
    (prompt,) = read_prompts(write(tmp_path, "drawbench.csv", "Prompts,Category\nA red colored car.,Colors\n"))
    assert prompt == Prompt("A red colored car.", 0, {"Category": "Colors"})


def test_a_folder_of_hpd_files_keeps_the_style_of_each_prompt(tmp_path: Path) -> None:
    write(tmp_path, "photo.json", '["a cat"]')
    write(tmp_path, "anime.json", '["a dog", "a car"]')
    write(tmp_path, "notes.txt", "not a prompt")
    prompts = read_prompts(tmp_path)
    assert [(p.text, p.index, p.metadata["style"]) for p in prompts] == [
        ("a dog", 0, "anime"), ("a car", 1, "anime"), ("a cat", 2, "photo")
    ]  # fmt: skip
    write(tmp_path, "photo.json", "[3]")
    with pytest.raises(UserError, match=r"entry 3 of .* is not an object"):
        read_prompts(tmp_path)


def test_a_folder_without_prompts_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no \.json file of prompts"):
        read_prompts(tmp_path)


SETS = {"geneval": 553, "ocr": 1018, "vbench": 946}


def test_the_shipped_sets_are_whole_and_their_licences_beside_them() -> None:
    assert {name: len(read_prompts(path)) for name, path in shipped_sets().items()} == SETS
    notice = (shipped_set("ocr").parent / "README.md").read_text()
    assert all(f"`set:{name}` | {count}" in notice for name, count in SETS.items())
    assert "Copyright (c) 2023 Dhruba Ghosh" in notice and "Copyright (c) 2025 Jie Liu" in notice


def test_the_shipped_sets_say_what_their_judges_need() -> None:
    geneval, ocr = read_prompts(shipped_set("geneval")), read_prompts(shipped_set("ocr"))
    assert geneval[0] == Prompt(
        "a photo of a bench", 0, {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}
    )
    assert Counter(prompt.metadata["tag"] for prompt in geneval)["position"] == 100
    assert all(prompt.text.count('"') >= 2 for prompt in ocr)


def test_a_set_that_does_not_ship_is_named() -> None:
    with pytest.raises(UserError, match="no prompt set 'hpd'; choose from set:geneval, set:ocr, set:vbench"):
        shipped_set("hpd")


@pytest.mark.parametrize(
    ("entry", "is_file"),
    [("set:ocr", True), ("mine.tsv", True), ("a cat", False), ("a cat. " * 100, False), ("v1.5 look", False)],
)
def test_a_prompt_is_told_from_a_prompt_file(entry: str, is_file: bool, tmp_path: Path) -> None:
    assert names_prompts(entry) is is_file
    assert names_prompts(str(tmp_path))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"'nowhere\.txt' does not exist"):
        read_prompts("nowhere.txt")


def test_parquet_rows_are_read_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a cat"], "mood": [3]}), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == [Prompt("a cat", 0, {"mood": 3})]
    with pytest.raises(UserError, match="cannot be read: "):
        read_prompts(write(tmp_path, "p.parquet", b"PAR1"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"install 'vipo\[parquet\]"):
        read_prompts(write(tmp_path, "p.parquet", b"PAR1"))


def sampler(prompts: int = 7, per_iteration: int = 3, seed: int = 0) -> PromptSampler:
    return PromptSampler([Prompt(str(k), k) for k in range(prompts)], per_iteration=per_iteration, seed=seed)


def test_an_iterations_prompts_do_not_depend_on_what_was_asked_before() -> None:
    used, fresh = sampler(), sampler()
    forward = [used.groups(k) for k in range(10)]
    assert [fresh.groups(k) for k in reversed(range(10))] == forward[::-1]


def test_every_prompt_comes_once_before_any_comes_again() -> None:
    dealt = [prompt.index for k in range(14) for prompt in sampler().groups(k)]  # six laps over seven prompts
    laps = [dealt[k : k + 7] for k in range(0, 42, 7)]
    assert all(Counter(lap) == Counter(range(7)) for lap in laps)
    assert len({tuple(lap) for lap in laps}) == 6  # each lap in an order of its own


@pytest.mark.parametrize("iterations", [0, 1, 2, 3, 9])
def test_what_the_first_iterations_deal_is_known_ahead(iterations: int) -> None:
    dealt = [prompt for k in range(iterations) for prompt in sampler().groups(k)]
    assert sampler().dealt(iterations) == [prompt for place, prompt in enumerate(dealt) if prompt not in dealt[:place]]


def test_another_seed_deals_another_order() -> None:
    assert sampler(50, 50, seed=0).groups(0) != sampler(50, 50, seed=1).groups(0)


def test_more_prompts_per_iteration_than_there_are_go_round() -> None:
    assert Counter(p.index for p in sampler(2, 6).groups(0)) == Counter({0: 3, 1: 3})


def test_no_prompts_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        PromptSampler([], per_iteration=1, seed=0)
