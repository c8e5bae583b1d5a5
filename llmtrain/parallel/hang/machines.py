"""What the machines of a run tell each other of a hang, through the store that the ranks met at."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from llmtrain.compat import own_store

PREFIX = "llmtrain/hang/"
PATIENCE = 2.0  # seconds for one exchange


class Far:
    """One machine's side of it. A store that does not answer, as when its host is gone, is asked once and then no more."""

    def __init__(self, machines: int, mine: int):
        self.machines, self.mine = machines, mine
        self._store = own_store(PATIENCE) if machines > 1 else None

    def called(self) -> bool:
        """Whether any machine has called a hang."""
        return bool(self._ask(lambda store: store.check([f"{PREFIX}called"])))

    def call(self) -> None:
        """Say so."""
        self._ask(lambda store: store.set(f"{PREFIX}called", "1"))

    def exchange(self, reports: dict[int, dict]) -> dict[int, dict]:
        """Give this machine's reports; returns those of the machines that gave theirs in time, this one's included."""
        self._ask(lambda store: store.set(f"{PREFIX}{self.mine}", json.dumps(reports)))
        found, missing, end = dict(reports), set(range(self.machines)) - {self.mine}, time.monotonic() + PATIENCE
        while missing and self._store is not None and time.monotonic() < end:
            for other in sorted(missing):
                text = self._ask(lambda store, other=other: store.check([key := f"{PREFIX}{other}"]) and store.get(key))
                if text:
                    found |= {int(rank): report for rank, report in json.loads(text).items()}
                    missing.discard(other)
            time.sleep(0.1)
        return found

    def _ask(self, question: Callable) -> Any:
        """The answer of the store, or None. Asked in a thread of its own: a stopped host would hold the caller for ever."""
        store, answer = self._store, []
        if store is None:
            return None

        def ask() -> None:
            try:
                answer.append(question(store))
            except dist.DistError:
                return

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        if not answer:
            self._store = None
            return None
        return answer[0]
