"""The small files beside a Hugging Face model's weights that travel with it: tokenizer, chat template, generation settings."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtrain.errors import UserError

GENERATION = "generation_config.json"
NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copy the companions that `source` has and `folder` has not; returns their names. Templates in a folder of their own come along."""
    folder.mkdir(parents=True, exist_ok=True)
    copied = [name for name in NAMES if (source / name).is_file() and not (folder / name).exists()]
    for name in copied:
        shutil.copyfile(source / name, folder / name)
    more = "additional_chat_templates"
    if (source / more).is_dir() and not (folder / more).exists():
        shutil.copytree(source / more, folder / more)
        copied.append(more)
    return copied


def token_ids(folder: Path) -> dict[str, Any]:
    """bos_token_id, eos_token_id (a number or a list) and pad_token_id as `folder` has them, generation settings before config.json.

    Raises UserError for a file that is no JSON mapping.
    """
    found: dict[str, Any] = {}
    for file in ("config.json", GENERATION):
        values = _read(folder / file)
        found |= {name: values[name] for name in TOKEN_IDS if values.get(name) is not None}
    return found


def write_generation(folder: Path, ids: Mapping[str, Any]) -> None:
    """Write the token ids as generation settings, unless `folder` has settings already."""
    path = folder / GENERATION
    if not path.exists():
        path.write_text(json.dumps({name: ids[name] for name in TOKEN_IDS if ids.get(name) is not None}, indent=2) + "\n")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not a mapping")
    return values
