"""The common schemas of conversations, each turned into messages of role and content."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llmtrain.data.errors import DataError

Messages = list[dict[str, Any]]
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Who speaks, by the names that are in use."""


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise DataError(f"field {name!r} is {'not there' if name not in record else f'a {type(value).__name__}, not a string'}")
    return value


def _turns(record: Mapping[str, Any], field: str, *, who: str, what: str) -> Messages:
    turns = record.get(field)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"field {field!r} is not a list of messages")
    found = [] if not isinstance(record.get("system"), str) else [{"role": "system", "content": record["system"]}]
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise DataError(f"{field}[{number}] is a {type(turn).__name__}, not a mapping of {who!r} and {what!r}")
        role = ROLES.get(str(turn.get(who)))
        if role is None:
            raise DataError(f"{field}[{number}].{who} is {turn.get(who)!r}; known are {', '.join(ROLES)}")
        try:
            found.append({"role": role, "content": _text(turn, what)})
        except DataError as error:
            raise DataError(f"{field}[{number}]: {error}") from error
    return found


def _messages(record: Mapping[str, Any]) -> Messages:
    return _turns(record, "messages", who="role", what="content")


def _sharegpt(record: Mapping[str, Any]) -> Messages:
    return _turns(record, "conversations", who="from", what="value")


def _asked(record: Mapping[str, Any], question: str, answer: str) -> Messages:
    system = [{"role": "system", "content": record["system"]}] if isinstance(record.get("system"), str) and record["system"] else []
    asked, answered = _text(record, question), _text(record, answer)
    return [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _alpaca(record: Mapping[str, Any]) -> Messages:
    messages = _asked(record, "instruction", "output")
    more = record.get("input")
    if isinstance(more, str) and more.strip():
        messages[-2]["content"] += f"\n\n{more}"
    return messages


SCHEMAS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Messages]]] = {
    "messages": (("messages",), _messages),
    "sharegpt": (("conversations",), _sharegpt),
    "alpaca": (("instruction", "output"), _alpaca),
    "question_answer": (("question", "answer"), lambda record: _asked(record, "question", "answer")),
    "prompt_response": (("prompt", "response"), lambda record: _asked(record, "prompt", "response")),
}
"""The fields by which a schema is known, and what makes messages of a record."""


def recognise(records: Iterable[Mapping[str, Any]]) -> str:
    """The schema that most of these records have; of several the one named first.

    Raises:
        DataError: none of them has the fields of any.
    """
    records = list(records)
    counts = {name: sum(all(f in r for f in fields) for r in records) for name, (fields, _) in SCHEMAS.items()}
    best = max(counts, key=lambda name: counts[name])
    if not counts[best]:
        fields = ", ".join(map(repr, records[0])) if records else "no record at all"
        known = "; ".join(f"{name}: {', '.join(f)}" for name, (f, _) in SCHEMAS.items())
        raise DataError(f"its first records have the fields of no known schema (they have {fields}; known are {known})")
    return best


def messages_of(record: Mapping[str, Any], schema: str, *, system: str | None = None) -> Messages:
    """The messages of one record, `system` first where it has no system message of its own.

    Raises:
        DataError: wrong fields, an unknown role, no answer, an empty one, or something after the last answer.
    """
    messages = SCHEMAS[schema][1](record)
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise DataError("has no answer: no message is the assistant's")
    if any(not m["content"].strip() for m in answers):
        raise DataError("has an empty answer")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"ends with a message of role {messages[-1]['role']!r}, after which there is nothing to learn")
    return messages
