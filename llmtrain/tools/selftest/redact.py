"""What a file that leaves the machine does not say: names of hosts and users, home folders, addresses."""

import getpass
import re
import socket
from pathlib import Path
from typing import Any

ADDRESS = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])")
HARDWARE_ADDRESS = re.compile(r"(?i)(?<![\da-f:])(?:[\da-f]{2}:){5,}[\da-f]{2}(?![\da-f:])")


def redacted(value: Any) -> Any:
    """`value`, made of dicts, lists and texts, with every such name replaced by a word in angle brackets."""
    if isinstance(value, dict):
        return {clean(str(key)): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return clean(value) if isinstance(value, str) else value


def clean(text: str) -> str:
    """One text."""
    for name, word in _names():
        text = re.sub(rf"(?<![\w]){re.escape(name)}(?![\w])", word, text)
    text = HARDWARE_ADDRESS.sub("<address>", text)
    return ADDRESS.sub(lambda match: match[0] if match[0].startswith("127.") else "<address>", text)


def _names() -> list[tuple[str, str]]:
    """Names to hide, longest first."""
    host, home = socket.gethostname(), str(Path.home())
    found = {host: "<host>", host.split(".")[0]: "<host>", socket.getfqdn(): "<host>", home: "<home>", _user(): "<user>"}
    kept = {name: word for name, word in found.items() if len(name) > 2 and name not in ("localhost", "root", "/root")}
    return sorted(kept.items(), key=lambda item: -len(item[0]))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        return ""
