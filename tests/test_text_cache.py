"""Prompts kept once encoded: the same bits from memory and from disk, whatever happens to a file."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import tiny
from vipo.assemble import Session, build, keep_text, notices
from vipo.errors import UserError
from vipo.generators import text_cache
from vipo.generators.conditioning import PooledConditioning
from vipo.generators.flux import FluxGenerator, FluxText
from vipo.generators.settings import AdapterOptions, Guidance
from vipo.generators.text_cache import TextCache, encoding_key
from vipo.recipe import parse_recipe
from vipo.types import Batched, Generator, KeepsText, NamesCutPrompts

pytestmark = pytest.mark.on_cpu

LENGTH = 7


@dataclass(frozen=True)
class Said(Batched):
    """Everything a conditioning may hold: padding, bits that look like zero, a number per prompt."""

    embeds: Float[Tensor, "N L D"]
    mask: Bool[Tensor, "N L"]
    count: Int[Tensor, " N"]


class Encoder:
    """Turns letters into numbers, counting how often it is asked."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype, self.asked = dtype, list[str]()

    def __call__(self, prompts: Sequence[str]) -> Said:
        self.asked += prompts
        embeds = torch.zeros(len(prompts), LENGTH, 3, dtype=self.dtype)
        mask = torch.zeros(len(prompts), LENGTH, dtype=torch.bool)
        for row, text in enumerate(prompts):
            for place, letter in enumerate(text[:LENGTH]):
                embeds[row, place] = torch.tensor([ord(letter) / 3, -0.0, float("nan")], dtype=self.dtype)
                mask[row, place] = True
        return Said(embeds, mask, torch.tensor([len(text) for text in prompts]))


def cache(encode: Callable[..., Said], folder: Path | None = None, key: str = "key", **options: Any) -> TextCache:
    return TextCache(encode, record=Said, key=key, folder=folder, **options)


def same_bits(one: Batched, other: Batched) -> bool:
    """NaN equals itself here, and -0.0 is not 0.0."""
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)]
    return type(one) is type(other) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b)) for a, b in pairs
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


TEXTS = ["a cat", "", "a panda that is too long", "a cat", "\u732b \U0001f98a"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_bit_for_bit_from_memory_and_from_disk(tmp_path: Path, dtype: torch.dtype) -> None:
    encoder = Encoder(dtype)
    expected = Encoder(dtype)(TEXTS)
    first = cache(encoder, tmp_path)
    assert same_bits(first(TEXTS), expected)
    assert same_bits(first(TEXTS), expected)
    again = cache(encoder, tmp_path)
    assert same_bits(again(TEXTS[::-1]), Encoder(dtype)(TEXTS[::-1]))
    assert encoder.asked == list(dict.fromkeys(TEXTS))  # each of them once, over both caches
    assert (first.counts.encoded, again.counts.encoded, again.counts.loaded) == (4, 0, 4)


def test_padding_takes_no_room_on_disk(tmp_path: Path) -> None:
    def encode(prompts: Sequence[str]) -> Said:
        embeds = torch.zeros(len(prompts), 4096, 64)
        embeds[:, :2] = 1.0
        return Said(embeds, embeds[..., 0] > 0, torch.zeros(len(prompts), dtype=torch.int64))

    kept = cache(encode, tmp_path)
    assert same_bits(kept(["a cat"]), encode(["a cat"]))
    (file,) = files(tmp_path)
    assert file.stat().st_size < 4096  # of the row's megabyte


def test_another_key_or_prompt_is_another_row(tmp_path: Path) -> None:
    encoder = Encoder()
    for key in ("one", "two"):
        cache(encoder, tmp_path, key)(["a cat", "a cat "])
    assert len(encoder.asked) == len(files(tmp_path)) == 4


def _emptied(file: Path) -> None:
    file.write_bytes(b"")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def _flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def _misread(file: Path) -> None:
    """Seven words of padding become six; the file is well formed."""
    content = file.read_bytes()
    assert content.count(b"[7, 3]") == 1
    file.write_bytes(content.replace(b"[7, 3]", b"[6, 3]"))


def _of_another_kind(file: Path) -> None:
    from safetensors.torch import save_file

    save_file({"embeds": torch.zeros(1)}, file)


@pytest.mark.parametrize("damage", [_emptied, _cut, _flipped, _misread, _of_another_kind])
def test_a_damaged_file_is_encoded_again_and_counted(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    cache(Encoder(), tmp_path)(["a cat"])
    (file,) = files(tmp_path)
    damage(file)
    mended, encoder = cache(Encoder(), tmp_path), Encoder()
    assert same_bits(mended(["a cat"]), Encoder()(["a cat"]))
    assert (mended.counts.damaged, mended.counts.encoded) == (1, 1)
    assert same_bits(cache(encoder, tmp_path)(["a cat"]), Encoder()(["a cat"]))
    assert not encoder.asked and files(tmp_path) == [file]


def test_a_full_disk_is_said_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_tensors: object, aside: Path, **_: object) -> None:
        aside.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(text_cache, "save_file", full)
    encoder = Encoder()
    kept = cache(encoder, tmp_path)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert same_bits(kept(TEXTS), Encoder()(TEXTS))
    assert len(encoder.asked) == kept.counts.unwritten == 4
    assert [record.getMessage() for record in caplog.records if "No space left" in record.getMessage()]
    assert len(caplog.records) == 1 and not files(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be kept in '.*file/cache' .*; give another folder"):
        cache(Encoder(), tmp_path / "file" / "cache")


def test_writers_that_meet_leave_whole_files_only(tmp_path: Path) -> None:
    """Many caches, as in many processes, write the same rows into one folder at the same time."""
    texts = [f"{i} cats" for i in range(12)]

    def write(_number: int) -> bool:
        return all(same_bits(cache(Encoder(), tmp_path)([text]), Encoder()([text])) for text in texts)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write, range(16)))
    encoder = Encoder()
    assert same_bits(cache(encoder, tmp_path)(texts), Encoder()(texts))
    assert not encoder.asked and len(files(tmp_path)) == len(texts)


def test_memory_is_bounded_and_keeps_what_was_used_last() -> None:
    encoder = Encoder(torch.float32)
    row = 12 * 5 + 5 + 8  # bytes of a prompt of five letters
    kept = cache(encoder, memory_bytes=2 * row)
    for text in ("a cat", "a fox", "a cat", "a dog", "a cat", "a fox"):
        kept([text])
    assert encoder.asked == ["a cat", "a fox", "a dog", "a fox"]
    assert kept.counts.dropped == 2


def test_more_prompts_than_the_memory_holds_are_not_all_encoded_ahead(caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder()
    kept = cache(encoder, memory_bytes=200)
    kept.fill([f"{i} cats" for i in range(500)])
    assert 0 < len(encoder.asked) < 100
    assert "of 500 prompts: give it a folder" in caplog.text


# --- with a generator ------------------------------------------------------------------------------------------------


@pytest.fixture
def model(model_folder: Path) -> FluxGenerator:
    return tiny.generator(model_folder)


class Watched:
    """How many prompts each text encoder reads, and where it stands meanwhile."""

    def __init__(self, generator: FluxGenerator) -> None:
        self.read, self.devices = [0 for _ in generator.text_encoders], list[str]()
        for place, encoder in enumerate(generator.text_encoders):
            encoder.register_forward_hook(self._note(place), with_kwargs=True)

    def _note(self, place: int) -> Callable[..., None]:
        def note(_module: object, given: tuple[Tensor, ...], named: dict[str, Tensor], _output: object) -> None:
            ids = given[0] if given else named["input_ids"]
            self.read[place] += len(ids)

        return note


def test_a_prepared_generator_says_the_same_and_asks_its_encoders_no_more(
    model_folder: Path, model: FluxGenerator, tmp_path: Path
) -> None:
    expected = {text: tiny.generator(model_folder).encode([text]) for text in tiny.PROMPTS}
    watched = Watched(model)
    kept = model.keep_text(tiny.PROMPTS, folder=tmp_path)
    assert watched.read == [len(tiny.PROMPTS)] * 2
    for _ in range(3):
        rows = model.encode([*tiny.PROMPTS, tiny.PROMPTS[0]])
        assert isinstance(rows, PooledConditioning) and rows.pooled.device == model.device
        assert same_bits(rows, PooledConditioning.cat([expected[text] for text in (*tiny.PROMPTS, tiny.PROMPTS[0])]))
    assert watched.read == [len(tiny.PROMPTS)] * 2 and kept.counts.encoded == len(tiny.PROMPTS)


def test_the_next_run_asks_nothing_at_all(model_folder: Path, tmp_path: Path) -> None:
    rows = []
    for _ in range(2):
        model = tiny.generator(model_folder)
        watched = Watched(model)
        model.keep_text(tiny.PROMPTS, folder=tmp_path)
        rows.append(model.encode(tiny.PROMPTS))
    assert watched.read == [0, 0] and same_bits(*rows)


def test_a_row_does_not_depend_on_its_neighbours(model: FluxGenerator) -> None:
    model.keep_text(tiny.PROMPTS)
    alone = PooledConditioning.cat([model.reader([text]) for text in tiny.PROMPTS])
    assert same_bits(model.encode(tiny.PROMPTS), alone)


def test_several_at_once_are_as_good(model: FluxGenerator) -> None:
    watched = Watched(model)
    kept = model.keep_text(tiny.PROMPTS, batch_size=3)
    rows, expected = model.encode(tiny.PROMPTS), model.reader(tiny.PROMPTS)
    assert torch.allclose(rows.prompt_embeds, expected.prompt_embeds, atol=1e-5)
    assert watched.read == [2 * len(tiny.PROMPTS)] * 2 and kept.counts.encoded == len(tiny.PROMPTS)


def one_by_one(read: Callable[..., Batched], prompts: Sequence[str]) -> Batched:
    """Read as a cache reads, for the same bits."""
    return PooledConditioning.cat([read([text]) for text in prompts])


def test_training_with_a_cache_is_training_without_one(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same iterations, and the encoders are asked once per prompt instead of once per group and iteration."""
    plain, cached = (tiny.trainer(model_folder) for _ in range(2))
    asked = [Watched(trainer.generator) for trainer in (plain, cached)]
    reader = plain.generator.reader
    monkeypatch.setattr(reader, "read", lambda prompts, read=reader.read: one_by_one(read, prompts))
    cached.generator.keep_text(tiny.PROMPTS, folder=tmp_path)
    for _ in range(3):
        assert plain.step().metrics == cached.step().metrics
    assert asked[0].read == [6, 6] and asked[1].read == [4, 4]


@pytest.fixture
def places(model: FluxGenerator, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the encoders are sent, in order; there is only one device to send them to in a test."""
    sent: list[str] = []
    for encoder in model.text_encoders:
        monkeypatch.setattr(encoder, "to", lambda device: sent.append(str(device)))
    monkeypatch.setattr(model.reader, "device", torch.device("cpu:0"))  # its name differs from where encoders go
    return sent


def test_offloaded_encoders_come_back_for_a_new_prompt_only(model: FluxGenerator, places: list[str]) -> None:
    model.keep_text(tiny.PROMPTS, offload=True)
    assert places == ["cpu"] * 2
    model.encode(tiny.PROMPTS)
    assert places == ["cpu"] * 2
    model.encode(["a fox", tiny.PROMPTS[0], "a sun"])
    assert places == ["cpu"] * 2 + ["cpu:0"] * 2 + ["cpu"] * 2


def test_offloaded_encoders_leave_also_after_an_error(
    model: FluxGenerator, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model.keep_text(tiny.PROMPTS, offload=True)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("inside")

    monkeypatch.setattr(model.pipeline, "encode_prompt", broken)
    with pytest.raises(RuntimeError, match="inside"):
        model.encode(["a fox"])
    assert places[-2:] == ["cpu"] * 2


def test_guidance_has_its_negative_prompt_encoded_ahead(model: FluxGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FluxGenerator, "is_guided", property(lambda _: True))
    options = AdapterOptions(Guidance(3.5, negative_prompt="grey"))
    model = FluxGenerator(model.pipeline, height=tiny.HEIGHT, width=tiny.WIDTH, options=options)
    assert model.keep_text(["a cat"]).counts.encoded == 2
    watched = Watched(model)
    model.encode(["grey", "a cat"])
    assert watched.read == [0, 0]


def key_of(model: FluxGenerator) -> str:
    return encoding_key(model.reader, type(model).__qualname__)


def _other_weights(model: FluxGenerator) -> None:
    with torch.no_grad():
        next(model.pipeline.text_encoder_2.parameters()).add_(1e-3)


def _other_dtype(model: FluxGenerator) -> None:
    model.pipeline.text_encoder_2.to(torch.bfloat16)


def _other_length(model: FluxGenerator) -> None:
    model.reader.max_sequence_length -= 1


def _other_words(model: FluxGenerator) -> None:
    model.pipeline.tokenizer_2.add_tokens(["<new>"])


def _other_template(model: FluxGenerator) -> None:
    model.pipeline.tokenizer.chat_template = "{{ messages }}"


@pytest.mark.parametrize("change", [_other_weights, _other_dtype, _other_length, _other_words, _other_template])
def test_the_key_changes_with_what_a_row_depends_on(
    model_folder: Path, model: FluxGenerator, change: Callable[[FluxGenerator], None]
) -> None:
    before = key_of(model)
    assert key_of(tiny.generator(model_folder)) == before
    change(model)
    assert key_of(model) != before


def test_the_key_changes_with_the_libraries_and_not_with_the_network(
    model: FluxGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key_of(model)
    tiny.nudged(tiny.lora(model))
    assert key_of(model) == before
    monkeypatch.setattr(text_cache, "version", lambda name: f"9.9 of {name}")
    assert key_of(model) != before


def test_a_prompt_that_was_encoded_does_not_change_the_key(model: FluxGenerator) -> None:
    """Tokenizers remember how they last padded; that must not make every run's key its own."""
    before = key_of(model)
    model.encode(["a cat"])
    assert key_of(model) == before


def test_an_adapter_must_say_what_it_returns(model: FluxGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FluxText.read.__annotations__, "return", Batched)
    with pytest.raises(UserError, match=r"annotate FluxText\.read with the record it returns"):
        model.keep_text(tiny.PROMPTS)


def test_a_run_asks_its_encoders_before_it_begins_and_not_again(model_folder: Path, tmp_path: Path) -> None:
    """Of six prompts, two iterations deal four; a fifth is for evaluation."""
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt", training__iterations=2, evaluation__limit=1)
    (tmp_path / "prompts.txt").write_text("\n".join((*tiny.PROMPTS, "a fox", "a sun")))
    (tmp_path / "evaluation.txt").write_text("a heart")
    raw["evaluation"]["prompts"] = str(tmp_path / "evaluation.txt")
    raw["generator"] |= {"text_cache": str(tmp_path / "text"), "offload_text": True}
    session = build(parse_recipe(raw))
    watched = Watched(session.generator)
    keep_text(session)
    assert watched.read == [5, 5] and len(files(tmp_path / "text")) == 5
    for _ in range(2):
        session.trainer.step()
    session.generator.encode([prompt.text for prompt in session.evaluation_prompts])
    assert watched.read == [5, 5]


class Plain:
    """A generator of one's own, with the methods of the protocol and no more; the work is a FLUX's."""

    def __init__(self, flux: FluxGenerator) -> None:
        self.network, self.lora_targets, self.shift, self.temporal_stride = flux.network, {}, flux.shift, 1
        self.encode, self.velocity, self.decode = flux.encode, flux.velocity, flux.decode
        self.latent_shape = flux.latent_shape
        self.save_lora, self.save_pretrained = flux.save_lora, flux.save_pretrained


def with_own(raw: dict[str, Any]) -> Session:
    session = build(parse_recipe(raw))
    assert isinstance(session.generator, KeepsText) and isinstance(session.generator, NamesCutPrompts)
    own = Plain(session.generator)
    session.trainer.generator = own
    return replace(session, model=replace(session.model, generator=own))


def test_a_generator_that_keeps_no_text_trains_as_well(model_folder: Path, tmp_path: Path) -> None:
    session = with_own(tiny.recipe(model_folder, tmp_path / "prompts.txt"))
    assert isinstance(session.generator, Generator)
    keep_text(session)
    assert notices(session) == []
    assert session.trainer.step().metrics["grad_norm"] > 0


@pytest.mark.parametrize("asked", [{"text_cache": "text"}, {"offload_text": True}])
def test_a_generator_that_keeps_no_text_is_not_asked_to_in_vain(
    model_folder: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    raw = tiny.recipe(model_folder, tmp_path / "prompts.txt")
    raw["generator"] |= asked
    with pytest.raises(UserError, match=r"Plain has no keep_text\(ahead, \*, folder, offload\)"):
        keep_text(with_own(raw))
