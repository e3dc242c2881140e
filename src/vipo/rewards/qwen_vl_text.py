"""The words around the pictures: a published instruction text, Qwen's chat frame, and where the answer is read off.

    instruction   the authors' own text, with {text_prompt} for the prompt and one special token per wanted number; the
                  model was trained with exactly these words, so they come from the authors' file and not from here
    chat          system "You are a helpful assistant.", one user turn (the pictures, then the instruction), then the
                  opening of the assistant's turn
    tokens        one placeholder per picture token; rows padded on the right

Only constants are read from a Python file; nothing in it runs.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vipo.errors import UserError

SLOT = "{text_prompt}"
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{placeholder}<|vision_end|>{instruction}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@dataclass(frozen=True)
class Instruction:
    """Where a model's instruction text is published, and what must be in it."""

    reward: str  # the name the user knows, for messages
    file: str  # as its authors call it
    source: str  # where to get it
    constants: tuple[str, ...]  # the strings of the Python file that make it up, in order
    markers: tuple[str, ...]  # the special tokens whose hidden states become numbers

    def read(self, template: str | Path | None, folder: Path) -> str:
        """The text of ``template``, by default of the file of that name in the model's folder.

        Raises:
            UserError: there is no such file, or it is not the instruction text of this model.
        """
        file = folder / self.file if template is None else Path(template).expanduser()
        if not file.is_file():
            raise UserError(
                f"reward {self.reward!r} found no instruction text at {file}: the model was trained with its authors'"
                f" words. Take {self.file} from {self.source}, put it into the model's folder or pass template=FILE"
            )
        text = file.read_text(encoding="utf-8")
        return self._checked(self._constants(text, file) if file.suffix == ".py" else text, file)

    def _constants(self, code: str, file: Path) -> str:
        try:
            found = dict(pair for statement in ast.parse(code).body for pair in _strings(statement))
        except SyntaxError as error:
            raise UserError(f"{file} is not a Python file that can be parsed: {error}; take it again") from error
        lacking = [name for name in self.constants if name not in found]
        if lacking:
            raise UserError(f"{file} has no string {lacking[0]}; take {self.file} from {self.source}")
        return "".join(found[name] for name in self.constants)

    def _checked(self, text: str, file: Path) -> str:
        for needed in (SLOT, *self.markers):
            if text.count(needed) != 1:
                raise UserError(
                    f"the instruction text {file} of reward {self.reward!r} holds {needed} {text.count(needed)} times;"
                    f" it must be there once. Take {self.file} from {self.source}"
                )
        return text


def _strings(statement: ast.stmt) -> list[tuple[str, str]]:
    """``name = "text"`` of a module, as (name, text)."""
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Constant):
        return []
    text = statement.value.value
    return [(t.id, text) for t in statement.targets if isinstance(t, ast.Name) and isinstance(text, str)]


@dataclass(frozen=True)
class Tokens:
    """Texts for the network. ``places`` says where each row has each marker."""

    ids: Int[Tensor, "N L"]
    mask: Bool[Tensor, "N L"]
    places: Int[Tensor, "N K"]


class Reader:
    """Prompts to tokens.

    Args:
        reward: the name the user knows, for messages.
        tokenizer: Qwen2-VL's; the markers are added where it lacks them, as in training.
        instruction: with ``{text_prompt}`` and each marker once.
        markers: the special tokens, in the order of the numbers they stand for.
        placeholder: what stands for a picture token, "<|video_pad|>" or "<|image_pad|>".

    Raises:
        UserError: the tokenizer is another model's.
    """

    def __init__(
        self, reward: str, tokenizer: Any, instruction: str, markers: Sequence[str], *, placeholder: str
    ) -> None:
        self.reward, self.tokenizer, self.instruction, self.placeholder = reward, tokenizer, instruction, placeholder
        known = tokenizer.get_vocab()
        if placeholder not in known:
            raise UserError(f"the tokenizer of reward {reward!r} has no {placeholder}; point tokenizer= to Qwen2-VL's")
        tokenizer.add_tokens(list(markers), special_tokens=True)
        self.placeholder_id: int = known[placeholder]
        self.marker_ids: list[int] = tokenizer.convert_tokens_to_ids(list(markers))

    def chat(self, prompt: str) -> str:
        """The whole conversation, with one placeholder for the pictures."""
        return CHAT.format(placeholder=self.placeholder, instruction=self.instruction.replace(SLOT, prompt))

    def __call__(self, prompts: Sequence[str], picture_tokens: int) -> Tokens:
        """One row per prompt, each with ``picture_tokens`` placeholders.

        Raises:
            UserError: a prompt holds one of the model's special tokens.
        """
        rows = [torch.tensor(self._row(prompt, picture_tokens)) for prompt in prompts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0)
        lengths = torch.tensor([len(row) for row in rows])
        places = torch.stack([(ids == marker).int().argmax(1) for marker in self.marker_ids], dim=1)
        return Tokens(ids, torch.arange(ids.shape[1]) < lengths[:, None], places)

    def _row(self, prompt: str, picture_tokens: int) -> list[int]:
        ids: list[int] = self.tokenizer(self.chat(prompt), add_special_tokens=False)["input_ids"]
        if any(ids.count(token) != 1 for token in (self.placeholder_id, *self.marker_ids)):
            raise UserError(f"prompt {prompt!r} holds a special token of reward {self.reward!r}; take it out")
        place = ids.index(self.placeholder_id)
        return ids[:place] + [self.placeholder_id] * picture_tokens + ids[place + 1 :]
