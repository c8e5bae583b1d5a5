"""What known error texts of CANN, HCCL, CUDA, NCCL and gloo mean, and the next thing to try. Imports no torch.

`explain(text)` finds them in the text of an error or in the last lines of a rank. docs/messages.md shows the table.
"""

import traceback
from collections.abc import Iterable

from llmtrain.hardware.known_errors import MESSAGES, Message

HEADING = "what this means"
LIMIT = 3  # explanations shown for one text: the first causes in the table's order, the rest is usually their echo


def find(text: str) -> list[Message]:
    """Every known error in `text`, in the table's order. EZ9999, which says nothing by itself, only where no other is found."""
    found = [message for message in MESSAGES if message.found_in(text)]
    telling = [message for message in found if message.name != "EZ9999"]
    return telling or found


def explain(text: str) -> str | None:
    """A block to print after an error, or None where nothing in `text` is known: what it means and what to try."""
    found = find(text)[:LIMIT]
    if not found:
        return None
    parts = [f"{HEADING} ({message.name}): {message.meaning}\n  try: {message.advice}" for message in found]
    return "\n".join(parts)


def explain_error(error: BaseException) -> str | None:
    """`explain` for an exception and the ones that caused it; their texts alone, not the source lines of the traceback."""
    return explain("\n".join(_texts(error)))


def _texts(error: BaseException) -> Iterable[str]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield "".join(traceback.format_exception_only(type(error), error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def page() -> str:
    """docs/messages.md."""
    rows = [f"### {message.name}\n\n{message.meaning}\n\n{message.advice}\n\nSource: {message.source}." for message in MESSAGES]
    return f"{_PAGE}\n" + "\n\n".join(rows) + "\n"


_PAGE = """# What error messages mean

When a run ends with an error that CANN, HCCL, CUDA, NCCL or gloo has raised, llmtrain prints below the traceback what it means and the
next thing to try:

    RuntimeError: ... NPU function error: AclrtSynchronizeDeviceWithTimeout, error code is 507015

    what this means (507015): A kernel failed on the NPU: ...
      try: ASCEND_LAUNCH_BLOCKING=1 makes the traceback end at the call that failed ...

The launcher does the same for the last lines of a rank that failed without a Python error. At most three are shown, the likeliest
causes first. `llmtrain doctor` ([doctor.md](doctor.md)) looks for the causes before a run, and [hangs.md](hangs.md) tells how to read
`log/hang.txt`. The texts are from public reports, vendors' documents and the packages themselves; not run on hardware. In every
multi-rank failure the rank that failed *first* has the cause: the others only notice.

The table is `llmtrain/hardware/known_errors.py`, this page is made from it (`python -m llmtrain.hardware.messages > docs/messages.md`).
"""

if __name__ == "__main__":
    print(page(), end="")
