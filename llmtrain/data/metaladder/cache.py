"""Answers of a teacher on disk, by what was asked: a run that is started again asks only what it has not been told."""

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any


class AnswerCache:
    """Folder of `ab/abcdef....json`, each with the request (which holds no secret) and the answer; written aside and renamed."""

    def __init__(self, folder: str | Path):
        self.folder, self._lock = Path(folder), threading.Lock()
        self.hits = 0

    def get(self, request: dict[str, Any]) -> str | None:
        """The answer to `request`; None if it is not there, or its file is damaged."""
        path = self._path(request)
        try:
            answer = json.loads(path.read_text(encoding="utf-8"))["answer"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        with self._lock:
            self.hits += 1
        return answer

    def put(self, request: dict[str, Any], answer: str) -> None:
        """Keep an answer."""
        path = self._path(request)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")
        aside.write_text(json.dumps({"request": request, "answer": answer}, ensure_ascii=False), encoding="utf-8")
        aside.replace(path)

    def _path(self, request: dict[str, Any]) -> Path:
        key = hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.json"
