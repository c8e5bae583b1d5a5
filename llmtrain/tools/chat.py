"""A model's chat template, rendered in a sandbox."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from llmtrain.errors import UserError

Message = dict[str, str]


class ChatTemplate:
    """The jinja template of a Hugging Face folder: chat_template.jinja, else `chat_template` of tokenizer_config.json.

    Raises UserError if the folder has none.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        config = self.folder / "tokenizer_config.json"
        self._values: dict[str, Any] = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        file = self.folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else self._values.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = next((t["template"] for t in source if t["name"] == "default"), None)
        if not source:
            raise UserError(
                f"--chat: {self.folder} has no chat template (chat_template.jinja, or in tokenizer_config.json); leave --chat out"
            )
        self._template = _environment().from_string(source)

    def render(self, messages: list[Message]) -> str:
        """The conversation as the model was trained to see it, up to where its answer begins. Raises UserError if the template refuses."""
        from jinja2 import TemplateError

        tokens = {name: self._token(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **tokens)
        except TemplateError as error:
            raise UserError(f"--chat: the template of {self.folder} refuses these messages: {error}") from error

    def _token(self, name: str) -> str:
        value = self._values.get(name)
        return (value["content"] if isinstance(value, dict) else value) or ""


def _environment():
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str):
        raise TemplateError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    env.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return env
