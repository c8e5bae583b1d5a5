"""Chat templates: from messages to the text that a model sees."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from llmtrain.data.chat.sandbox import CLOSE, LIMIT, OPEN, environment
from llmtrain.data.errors import DataError

Message = Mapping[str, Any]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
BUILT_IN = {"chatml": CHATML, "llama3": LLAMA3, "plain": PLAIN}
NEEDED = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "plain": (),
}
"""Tokens without which a built-in template would be plain text to the model."""
FIXED_DATE = datetime(2024, 7, 26)
"""Today's date in training data, which must not change with the day; it is what Llama 3.1's template takes where it is told none."""


class ChatTemplate:
    """A jinja template with the special tokens it names.

    Args:
        source: the template's text.
        tokens: bos_token, eos_token, pad_token, unk_token: the text of each; "" for one that there is not.
        name: what messages call it.
        date: what `strftime_now` tells; the present if None.

    Raises:
        DataError: it is not a template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], *, name: str, date: datetime | None = None) -> None:
        self.source, self.tokens, self.name, self._date = source, dict(tokens), name, date
        try:
            self._template = environment().from_string(source)
        except Exception as error:  # the parser raises its own kinds, and RecursionError
            raise DataError(f"chat template {name}: not a jinja template that can be used ({error})") from error

    @property
    def marks_answers(self) -> bool:
        """Whether it says itself, by `{% generation %}`, what an assistant generates."""
        return "endgeneration" in self.source

    def fingerprint(self) -> str:
        """Hash of all that its texts follow from, beside the messages."""
        return hashlib.sha256(json.dumps([self.source, sorted(self.tokens.items())]).encode()).hexdigest()[:20]

    def render(self, messages: Sequence[Message], *, answer_follows: bool = False) -> str:
        """The conversation as the model sees it; with `answer_follows`, up to where the next answer begins.

        Raises:
            DataError: the template refuses these messages, or wants what is not allowed to it.
        """
        return self.render_marked(messages, answer_follows=answer_follows).replace(OPEN, "").replace(CLOSE, "")

    def render_marked(self, messages: Sequence[Message], *, answer_follows: bool = False) -> str:
        """As `render`, with OPEN and CLOSE where `{% generation %}` or a message has put them."""
        dated = {"strftime_now": self._date.strftime} if self._date else {}
        values = {"messages": messages, "add_generation_prompt": answer_follows, **self.tokens, **dated}
        pieces, size = [], 0
        try:
            for piece in self._template.generate(values):
                pieces.append(piece)
                size += len(piece)
                if size > LIMIT:
                    raise DataError(f"chat template {self.name}: makes more than {LIMIT} characters of one conversation")
        except DataError:
            raise
        except Exception as error:  # whatever a template does: it is data
            raise DataError(f"chat template {self.name} refuses these messages: {error}") from error
        return "".join(pieces)


def folder_template(folder: str | Path) -> ChatTemplate:
    """The template of a Hugging Face folder: chat_template.jinja, else `chat_template` of tokenizer_config.json.

    Raises:
        DataError: the folder has none.
    """
    folder = Path(folder)
    return ChatTemplate(_folder_source(folder), special_names(folder), name=f"of {folder}")


def _folder_source(folder: Path) -> str:
    values = _tokenizer_config(folder)
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else values.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((t["template"] for t in source if t["name"] == "default"), None)
    if not source:
        raise DataError(f"{folder} has no chat template (chat_template.jinja, or in tokenizer_config.json)")
    return source


def special_names(folder: Path) -> dict[str, str]:
    """bos_token, eos_token, ... as tokenizer_config.json of `folder` has them; "" where it names none."""
    values = _tokenizer_config(folder)
    found = {name: values.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return {name: (value["content"] if isinstance(value, dict) else value) or "" for name, value in found.items()}


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def find_template(choice: str, tokenizer: Any) -> ChatTemplate:
    """The template that the option `template` chooses, for training data: dates in it do not change with the day.

    Args:
        choice: auto (the tokenizer folder's), chatml, llama3, plain, or the path of a jinja file.
        tokenizer: a llmtrain.data.tokenizer.Tokenizer.

    Raises:
        DataError: there is none, it is no template, or a built-in one needs tokens that the vocabulary lacks.
    """
    folder = tokenizer.path.parent
    ends = tokenizer.eod_id if tokenizer.eos_id is None else tokenizer.eos_id
    own = {"bos_token": "" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id), "eos_token": tokenizer.piece(ends)}
    tokens = special_names(folder)
    tokens |= {name: tokens[name] or text for name, text in own.items()}
    if choice == "auto":
        try:
            return ChatTemplate(_folder_source(folder), tokens, name=f"of {folder}", date=FIXED_DATE)
        except DataError as error:
            raise DataError(f"{error}; the option `template` takes chatml, llama3, plain or a jinja file instead") from error
    if choice in BUILT_IN:
        missing = [name for name in NEEDED[choice] if name not in tokenizer.special]
        if missing:
            raise DataError(f"template {choice}: {tokenizer.path} has no special token {', '.join(missing)}; choose another template")
        return ChatTemplate(BUILT_IN[choice], tokens, name=choice, date=FIXED_DATE)
    file = Path(choice)
    if not file.is_file():
        raise DataError(f"template {choice!r}: neither auto, {', '.join(BUILT_IN)} nor a file")
    return ChatTemplate(file.read_text(encoding="utf-8"), tokens, name=choice, date=FIXED_DATE)
