"""Rungs from a teacher: every problem is asked for once, answers are kept, checked, asked for again if unusable, and dropped in the end."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Event, Lock
from typing import Any

from llmtrain.data.answers import equal, extract
from llmtrain.data.metaladder.cache import AnswerCache
from llmtrain.data.metaladder.outline import (
    Malformed,
    Messages,
    ladder_request,
    read_ladder,
    read_reflection,
    recheck_request,
    reflection_request,
)
from llmtrain.data.metaladder.problem import Problem, Rung


@dataclass(frozen=True)
class Lesson:
    """How a teacher is asked."""

    model: str = "teacher"
    """Name of the model in the request."""
    temperature: float = 0.7
    """The paper's."""
    max_tokens: int = 1024
    tries: int = 2
    """Answers asked for until one can be used."""
    reflections: bool = False
    """Ask for reflections too, in requests of their own."""
    recheck: bool = False
    """Have each similar problem solved a second time, and keep it only if both answers are the same."""
    workers: int = 4
    """Requests at a time."""


@dataclass
class Taught:
    """What came of it."""

    rungs: list[Rung] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)
    """Problems without a usable answer, by the last reason."""
    refused: Counter = field(default_factory=Counter)
    """Answers that could not be used, by reason, those that a later try made good included."""
    asked: int = 0
    """Requests sent."""
    cached: int = 0
    """Requests that the cache answered."""


class Teacher:
    """A function from a chat request to its answer, with the cache before it."""

    def __init__(self, send: Callable[[dict[str, Any]], str], cache: AnswerCache, lesson: Lesson):
        self._send, self._cache, self._lesson, self._lock = send, cache, lesson, Lock()
        self.asked = 0

    def ask(self, messages: Messages, *, attempt: int) -> str:
        """The answer, the same for ever; another one for another attempt."""
        lesson = self._lesson
        request = {"model": lesson.model, "messages": messages, "temperature": lesson.temperature}
        request |= {"max_tokens": lesson.max_tokens, "seed": attempt}
        answer = self._cache.get(request)
        if answer is None:
            answer = self._send(request)
            with self._lock:
                self.asked += 1
            self._cache.put(request, answer)
        return answer

    def rung(self, problem: Problem, refused: Counter) -> Rung:
        """The rung of a problem. Raises Malformed when no answer of all tries can be used."""
        rung = self._tried(lambda n: self._checked(read_ladder(problem, self.ask(ladder_request(problem), attempt=n)), n), refused)
        if self._lesson.reflections:
            text = self._tried(lambda n: read_reflection(self.ask(reflection_request(problem), attempt=n)), refused)
            rung = replace(rung, problem=replace(rung.problem, reflection=text))
        return rung

    def _tried(self, once: Callable[[int], Any], refused: Counter) -> Any:
        for attempt in range(self._lesson.tries):
            try:
                return once(attempt)
            except Malformed as error:
                refused[error.reason] += 1
                last = error
        raise last

    def _checked(self, rung: Rung, attempt: int) -> Rung:
        if self._lesson.recheck:
            second = extract(self.ask(recheck_request(rung.similar.question), attempt=attempt))
            if not equal(second, rung.similar.answer, symbolic=False):
                raise Malformed("a second solution has another answer", f"{second}, not {rung.similar.answer}")
        return rung


def teach(problems: Sequence[Problem], send: Callable[[dict[str, Any]], str], cache: AnswerCache, lesson: Lesson) -> Taught:
    """Ask the teacher for the rung of every problem, several at a time; results are in the order of `problems`.

    Whatever `send` raises ends it, after the requests on their way; answers so far are in the cache.
    """
    teacher, result, before = Teacher(send, cache, lesson), Taught(), cache.hits

    ended = Event()

    def one(problem: Problem) -> tuple[Rung | None, str, Counter]:
        refused: Counter = Counter()
        if ended.is_set():
            return None, "not asked", refused
        try:
            return teacher.rung(problem, refused), "", refused
        except Malformed as error:
            return None, error.reason, refused
        except BaseException:
            ended.set()
            raise

    with ThreadPoolExecutor(lesson.workers) as pool:
        try:
            for rung, reason, refused in pool.map(one, problems):
                result.refused += refused
                if rung is None:
                    result.dropped[reason] += 1
                else:
                    result.rungs.append(rung)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    result.asked, result.cached = teacher.asked, cache.hits - before
    return result
