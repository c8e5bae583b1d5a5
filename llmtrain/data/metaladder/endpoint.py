"""A teacher behind an OpenAI-compatible endpoint: `POST URL/chat/completions`, rate-limited, with retries."""

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from llmtrain.data.errors import DataError

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
LONGEST_WAIT = 60.0
"""Seconds between two tries, unless the server asks for more."""
LONGEST_ASKED = 600.0
"""Seconds that a server's Retry-After is honoured for."""


class Endpoint:
    """Sends one request at a time per calling thread.

    Args:
        url: up to and with `/v1`.
        key_variable: the environment variable that holds the key; unset, none is sent (local servers want none). The key is read when a
            request is sent and stored nowhere.
        per_minute: requests started per minute over all threads; 0 is no limit.
        tries: of one request, first one included.
        timeout: seconds for one answer.
        wait: seconds before the second try; doubled for each one after.
    """

    def __init__(
        self,
        url: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        per_minute: float = 0,
        tries: int = 6,
        timeout: float = 120,
        wait: float = 1.0,
    ):
        self.url, self._variable, self._tries, self._timeout, self._wait = url.rstrip("/"), key_variable, tries, timeout, wait
        if not self.url.startswith(("http://", "https://")):
            raise DataError(f"--teacher {url}: neither a folder with a model nor an address that starts with http:// or https://")
        self._pace = Pace(per_minute)

    def __call__(self, request: dict[str, Any]) -> str:
        """The text that answers a chat request.

        Raises DataError when the endpoint refuses it, or has not answered after all tries; what is cached by then stays.
        """
        problem = ""
        for attempt in range(self._tries):
            self._pace.take()
            try:
                return _text(self._post(request))
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {_said(error)}"
                if error.code not in RETRIED:
                    hint = f" (the key is read from ${self._variable})" if error.code in (401, 403) else ""
                    raise DataError(f"the teacher {self.url} refused a request: {problem}{hint}") from None
                pause = _asked(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem, pause = f"{type(error).__name__}: {error}", None
            if attempt + 1 < self._tries:
                self._sleep(attempt, pause)
        tried = f"the teacher {self.url} has not answered after {self._tries} tries; the last problem: {problem}"
        raise DataError(f"{tried}. Started again, the command goes on where it is now")

    def _post(self, request: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self._variable):
            headers["Authorization"] = f"Bearer {key}"
        message = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(request).encode(), headers)
        with urllib.request.urlopen(message, timeout=self._timeout) as answer:
            return json.loads(answer.read())

    def _sleep(self, attempt: int, asked: float | None) -> None:
        """Twice as long each time, with a random part so that threads do not come back together; at least what the server asked for."""
        backoff = min(LONGEST_WAIT, self._wait * 2**attempt) * random.uniform(0.5, 1.0)
        pause = max(backoff, asked or 0)
        if asked:
            self._pace.hold(pause)  # the other threads would be refused as well
        time.sleep(pause)


class Pace:
    """Lets callers through at most `per_minute` times a minute, evenly."""

    def __init__(self, per_minute: float, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep):
        self._gap = 60 / per_minute if per_minute else 0.0
        self._clock, self._sleep, self._next, self._lock = clock, sleep, 0.0, threading.Lock()

    def take(self) -> None:
        """Wait for one's turn."""
        with self._lock:
            turn = max(self._next, self._clock())
            self._next = turn + self._gap
        if (pause := turn - self._clock()) > 0:
            self._sleep(pause)

    def hold(self, seconds: float) -> None:
        """Let nobody through for so long."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)


def _text(answer: dict[str, Any]) -> str:
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"no choices[0].message.content in the answer {str(answer)[:200]!r}")
    return text


def _asked(value: str | None) -> float | None:
    """Seconds of a Retry-After; dates are left out."""
    try:
        return min(LONGEST_ASKED, max(0.0, float(value)))
    except (TypeError, ValueError):
        return None


def _said(error: urllib.error.HTTPError) -> str:
    return error.read(300).decode(errors="replace").strip().replace("\n", " ")
