"""Text to token ids and back: a `tokenizers.Tokenizer` with what belongs to it (vocabulary size, chat template)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from tokeff.errors import UserError
from tokeff.models.chat import render
from tokeff.models.fields import Fields, read_json


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """`raw` does the work; `V` is the model's vocabulary; `special` has bos_token, eos_token ... for chat templates."""

    raw: tokenizers.Tokenizer
    V: int
    template: str | None = None
    special: Mapping[str, str] = field(default_factory=dict)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids. `special=True` adds what the model's own tokenizer adds (SmolLM2: nothing, Llama 3: bos)."""
        ids = self.raw.encode(text, add_special_tokens=special).ids
        if ids and max(ids) >= self.V:
            raise UserError(f"the text holds {self.raw.id_to_token(max(ids))!r}, which this model has no embedding for")
        return ids

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Text of token ids. `special=True` also writes control tokens such as <|im_end|>."""
        return self.raw.decode([int(i) for i in ids], skip_special_tokens=not special)

    def chat(self, messages: Sequence[Mapping[str, Any]], reply: bool = True, **variables: Any) -> str:
        """One conversation as the text its model was trained on; encode it with `special=False`.

        `reply=True` ends with the opening of the assistant's turn. Raises UserError without a template, or if it fails.
        """
        return self.chats([messages], reply, **variables)[0]

    def chats(self, batch: Sequence[Sequence[Mapping[str, Any]]], reply: bool = True, **variables: Any) -> list[str]:
        """`chat` of several conversations at once, for the price of one sandbox start."""
        if self.template is None:
            raise UserError("this model has no chat template; give plain text")
        common = {**self.special, "add_generation_prompt": reply, **variables}
        return render(self.template, [{**common, "messages": [dict(m) for m in messages]} for messages in batch])


def read_tokenizer(folder: Path, V: int) -> Tokenizer | None:
    """The tokenizer of a Hugging Face or saved tokeff folder, None where the folder has no tokenizer.json."""
    file, config, jinja = folder / "tokenizer.json", folder / "tokenizer_config.json", folder / "chat_template.jinja"
    if not file.is_file():
        return None
    table = read_json(config) if config.is_file() else {}
    template = _template(table, str(config))
    if jinja.is_file():
        try:
            template = jinja.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"cannot read {jinja}: {e}") from None
    return Tokenizer(_parse(file), V, template, special_tokens(table))


def _parse(file: Path) -> tokenizers.Tokenizer:
    read_json(file)  # size and syntax first: the parser's own message is thousands of characters long
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # the package raises bare Exception
        raise UserError(f"{file} is not a tokenizer this version of `tokenizers` reads ({str(e)[:120]})") from None


def _template(table: Mapping[str, Any], where: str) -> str | None:
    """The chat template: a string, or the one called default of a list of named ones."""
    value = table.get("chat_template")
    if isinstance(value, list):
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
    return Fields({"chat_template": value}, where).word("chat_template", "") or None


def special_tokens(table: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token ... as strings; each stands there as one or as {"content": ...}."""
    tokens = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = table.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[key] = value
    return tokens


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, in the layout `read_tokenizer` reads."""
    import json

    tokenizer.raw.save(str(folder / "tokenizer.json"))
    table = {**tokenizer.special, "chat_template": tokenizer.template}
    (folder / "tokenizer_config.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
