"""Bad input by property: whatever a recipe, a prompt file or a picture holds, it is taken, or refused in one sentence.

``make faults`` runs the long form, thousands of cases; the tests run a hundred of them.
"""

from __future__ import annotations

import copy
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vipo.cli.arguments import read_texts
from vipo.errors import UserError
from vipo.media.reading import MOST_FRAMES, read_media
from vipo.prompts.files import read_prompts
from vipo.recipe import load_recipe, parse_recipe, shipped_recipes
from vipo.schema import Recipe, keys_of, nested_section

SHORT, LONG = 40, 1000  # cases of each property
LOUD = ("Traceback", "Error(", "object at 0x")


def _thorough(cases: int) -> Any:
    health = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=cases, deadline=None, suppress_health_check=health, derandomize=True, database=None)


def _one_sentence(error: UserError) -> None:
    text = str(error)
    assert text and "\n" not in text.strip() and len(text) < 3000, text
    assert not any(word in text for word in LOUD), text


def _paths(section: type[Any] = Recipe, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, field in keys_of(section).items():
        found.append((*above, key))
        nested = nested_section(field.annotation)
        if nested is not None and key not in ("rewards", "judges"):
            found += _paths(nested, (*above, key))
    return found


BASE = yaml.safe_load(shipped_recipes()["quickstart"].read_text())
PATHS = _paths()
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, 1e308, 5e-324, -0.0]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", "nan", "\0", "\u202eabc", "\ud800", "no", "1e9", "../..", "a" * 5000, "auto", "~"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def _recipe_property(path: tuple[str, ...], value: Any) -> None:
    raw = copy.deepcopy(BASE)
    node = raw
    for key in path[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            return
    node[path[-1]] = value
    try:
        recipe = parse_recipe(raw)
    except UserError as error:
        _one_sentence(error)
        return
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe  # what is taken can be written and read again


def _override_property(path: tuple[str, ...], text: str) -> None:
    try:
        load_recipe("quickstart", [f"{'.'.join(path)}={text}"])
    except UserError as error:
        _one_sentence(error)


def _prompts_property(suffix: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"prompts{suffix}"
        file.write_bytes(content)
        try:
            prompts = read_prompts(file)
        except UserError as error:
            _one_sentence(error)
            assert str(file) in str(error)
            return
    for prompt in prompts:
        assert prompt.text.strip() and "\0" not in prompt.text and prompt.text.encode()


def _saved(mode: str, size: tuple[int, int], form: str, frames: int) -> bytes:
    buffer = io.BytesIO()
    first = Image.new(mode, size)
    more = {"save_all": True, "append_images": [first] * (frames - 1)} if frames > 1 else {}
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    try:
        first.save(buffer, form, exif=exif, **more)
    except (OSError, ValueError, KeyError, RuntimeError, SystemError):  # this format has no such mode
        buffer = io.BytesIO()
        first.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _picture_property(mode: str, size: tuple[int, int], form: str, frames: int, cut: float, suffix: str) -> None:
    content = _saved(mode, size, form, frames)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"picture{suffix}"
        file.write_bytes(content[: int(len(content) * cut)])
        try:
            media = read_media(file)
        except UserError as error:
            _one_sentence(error)
            assert str(file) in str(error)
            return
    assert media.ndim == 4 and media.shape[0] == 3 and bool(media.isfinite().all())
    assert float(media.min()) >= 0 and float(media.max()) <= 1


paths, texts = st.sampled_from(PATHS), st.text(max_size=30)
suffixes = st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".tsv", ".TXT", ".xyz", ""])
contents = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.text(max_size=60).map(lambda text: text.encode("utf-16", "surrogatepass")),
    values.map(lambda value: json.dumps(value).encode()),
    st.lists(values, max_size=4).map(lambda rows: json.dumps(rows).encode()),
    st.sampled_from([b"", b"\n\r\n", b"\xef\xbb\xbfprompt\r\na cat\r\n", b"[" * 10**5, b'{"prompt":' * 10**5]),
)
modes = st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F", "LAB", "HSV"])
sizes = st.sampled_from([(1, 1), (7, 1), (1, 9), (16, 12), (300, 2), (20000, 10)])
forms = st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO"])
cuts = st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.1, 0.0])
endings = st.sampled_from([".png", ".jpg", ".gif", ".txt", "", ".PNG"])
PROPERTIES = {
    "recipe": given(path=paths, value=values)(_recipe_property),
    "override": given(path=paths, text=texts)(_override_property),
    "prompts": given(suffix=suffixes, content=contents)(_prompts_property),
    "picture": given(mode=modes, size=sizes, form=forms, frames=st.integers(1, 3), cut=cuts, suffix=endings)(
        _picture_property
    ),
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_bad_input_is_one_sentence(name: str, unchecked: None) -> None:  # noqa: ARG001
    _thorough(SHORT)(PROPERTIES[name])()


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", PROPERTIES)
def test_bad_input_is_one_sentence_thousands_of_times(name: str, unchecked: None) -> None:  # noqa: ARG001
    _thorough(LONG)(PROPERTIES[name])()


# --- cases that were seen --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, says",
    [
        (f"a: &a [x]\nb: &b [{'*a,' * 50}]\nc: &c [{'*b,' * 50}]\nd: [{'*c,' * 50}]", "more than 100000"),
        ("&a [*a]", "stands for what it is a part of"),
        ("[" * 5000, "cannot be read"),
        ("name: " + "x" * 1_100_000, "more than the 1000000"),
    ],
)
def test_yaml_that_grows_is_refused_at_once(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    begin = time.process_time()
    with pytest.raises(UserError, match=says):
        load_recipe(file)
    assert time.process_time() - begin < 10


def test_honest_aliases_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("extends: quickstart\nevaluation: &e {every: 5}\n")
    assert load_recipe(file).evaluation.every == 5


@pytest.mark.parametrize(
    "override, says",
    [
        ("nonsense=1", "known there: name, seed"),
        ("creditt=sample", "the nearest known one is 'credit'"),
        ("judges=[emoji_match]", "is trained on and evaluated in any case"),
        ("rewards={redness: .nan}", "not a finite number"),
        ("optimizer.betas=[1.0,1.0]", "less than 1"),
        ("judges=[[a]]", "a list of judges is names"),
        ("generator.options.decode_batch_size=0", "1 or more"),
        ("seed=18446744073709551616", "less than"),
        ("solver.shift=1e9", "less than or equal to 100"),
        ("training.reward_timeout=0", "greater than or equal"),
        ("training.on_reward_timeout=wait", "'stop' or 'mask'"),
    ],
)
def test_values_that_were_seen(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as told:
        load_recipe("quickstart", [override])
    assert "'seed'" not in str(told.value)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.json", b"[" * 10**5, "cannot be read"),
        ("a.jsonl", b'{"a":' * 10**5, "cannot be read"),
        ("a.txt", b"a\0b\n", "holds a NUL"),
        ("a.txt", "a cat\n".encode("utf-16"), "cannot be read as UTF-8"),
        ("a.txt", "a cat\n".encode("utf-16-le"), "holds a NUL"),
        ("a.txt", b"x" * 10**6, "1000000 characters, more than the 65536"),
        ("a.csv", b"prompt,b\na,b,c,d\n", "row 1 has more cells"),
        ("a.txt", b"", "holds no prompt"),
        ("a.txt", b" \n\r\n\t\n", "holds no prompt"),
        ("a.md", b"a cat", "must end in one of"),
    ],
)
def test_prompt_files_that_were_seen(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_prompts(tmp_path / name)


def test_prompt_files_that_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "A.TXT").write_bytes("\ufeffa cat\r\n\r\n\u05e9\u05dc\u05d5\u05dd\n".encode())  # right to left
    assert [prompt.text for prompt in read_prompts(tmp_path / "A.TXT")] == ["a cat", "\u05e9\u05dc\u05d5\u05dd"]
    (tmp_path / "b.csv").write_bytes(b"prompt,b\na,b,,\n")
    assert read_prompts(tmp_path / "b.csv")[0].metadata == {"b": "b"}
    monkeypatch.chdir(tmp_path)
    Path("a dog").mkdir()
    with pytest.raises(UserError, match=r"if it is meant as a prompt, write it into a \.txt file"):
        read_texts(["a dog"])
    assert [prompt.text for prompt in read_texts(["A.TXT", "a\0b"])][-1] == "a\0b"


MILLION = """
import resource, sys, time
from vipo.prompts.files import read_prompts
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prompts = read_prompts(sys.argv[1])
print(len(prompts), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1000, time.process_time())
"""


def test_a_million_prompts_are_read_in_bounded_memory_and_seconds(tmp_path: Path) -> None:
    file = tmp_path / "many.txt"
    file.write_text("".join(f"prompt number {number}\n" for number in range(10**6)))
    command = [sys.executable, "-c", MILLION, str(file)]
    said = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True).stdout.split()
    assert said[0] == "1000000" and int(said[1]) < 1000 and float(said[2]) < 60, said


def test_pictures_that_were_seen(tmp_path: Path) -> None:
    Image.new("1", (12000, 12000)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match="at most 67108864 are read"):
        read_media(tmp_path / "large.png")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match="more than the 67108864 pixels"):
        read_media(tmp_path / "bomb.png")
    Image.new("RGB", (20, 30)).save(tmp_path / "sizes.tif", save_all=True, append_images=[Image.new("RGB", (10, 30))])
    with pytest.raises(UserError, match="differ in size or depth"):
        read_media(tmp_path / "sizes.tif")
    Image.new("RGB", (20000, 10)).save(tmp_path / "wide.png")
    assert read_media(tmp_path / "wide.png").shape == (3, 1, 10, 20000)
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        read_media(tmp_path / "text.png")


def test_a_small_animation_takes_no_large_memory(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8), number % 255, np.uint8)) for number in range(MOST_FRAMES + 1)]
    frames[0].save(tmp_path / "many.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="more than the 1024 frames"):
        read_media(tmp_path / "many.gif")
    frames = [Image.new("P", (512, 512), number % 7) for number in range(128)]  # 34 million pixels
    frames[0].save(tmp_path / "large.gif", save_all=True, append_images=frames[1:])
    assert (tmp_path / "large.gif").stat().st_size < 500_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    media = read_media(tmp_path / "large.gif")
    assert media.shape[1] > 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 900_000  # kB: 0.4 GB as float32, 0.1 as bytes
