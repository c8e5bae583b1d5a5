"""A teacher behind a server of the test's own: answers kept, checked and asked for again; refusals waited out; kills survived."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llmtrain.data.errors import DataError
from llmtrain.data.metaladder.cache import AnswerCache
from llmtrain.data.metaladder.endpoint import Endpoint, Pace
from llmtrain.data.metaladder.outline import LADDER, Malformed, read_ladder, sections
from llmtrain.data.metaladder.problem import Problem, read_rungs
from llmtrain.data.metaladder.teach import Lesson, teach
from llmtrain.tools import data

KEY = "sk-a-secret-of-the-test"
GOOD = """### Type of Problem and Solution Method
Adding.

### Similar Problem
Three hats and 4 hats: how many?

### Solution to the Similar Problem
3 + 4 = 7. The answer is 7."""
PROBLEMS = [Problem(str(n), "t", f"What is {n} and 1?", f"{n} + 1 = {n + 1}. The answer is {n + 1}.", str(n + 1)) for n in range(6)]


class Server(ThreadingHTTPServer):
    """Answers with what `answer(request, headers, number of the call)` gives: (status, headers, text)."""

    def __init__(self, answer):
        self.answer, self.requests, self.times, self._lock = answer, [], [], threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server._lock:
            self.server.requests.append((self.path, request, dict(self.headers)))
            self.server.times.append(time.monotonic())
            number = len(self.server.requests)
        status, headers, text = self.server.answer(request, number)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *words):
        pass


def chat(text):
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]})


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        server = Server(answer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def endpoint(server, **options):
    return Endpoint(server.url, **{"wait": 0.01, "key_variable": "TEACHER_KEY", "timeout": 10} | options)


def test_answers_become_rungs_and_are_asked_for_once(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    server = serve(lambda request, number: chat(GOOD))
    first = teach(PROBLEMS, endpoint(server), AnswerCache(tmp_path), Lesson(model="m"))
    again = teach(PROBLEMS, endpoint(server), AnswerCache(tmp_path), Lesson(model="m"))
    assert first.rungs == again.rungs and [r.problem.id for r in first.rungs] == list("012345")
    assert (first.asked, first.cached, again.asked, again.cached) == (6, 0, 0, 6) and len(server.requests) == 6
    rung = first.rungs[0]
    assert rung.problem.strategy == "Adding." and rung.similar.answer == "7" and rung.similar.question.startswith("Three hats")
    path, request, headers = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert request["temperature"] == 0.7 and request["model"] == "m" and PROBLEMS[0].solution in server_text(server)
    assert KEY not in "".join(file.read_text() for file in tmp_path.rglob("*.json")), "a secret was written"
    assert teach(PROBLEMS, endpoint(server), AnswerCache(tmp_path), Lesson(model="n")).asked == 6  # another request


def server_text(server):
    return "".join(request["messages"][1]["content"] for _, request, _ in server.requests)


def test_refusals_are_waited_out(serve, tmp_path):
    def answer(request, number):
        if number <= 2:
            return 429, {"Retry-After": "0.3"}, "slow down"
        return (503, {}, "") if number == 3 else (200, {}, "no json") if number == 4 else chat(GOOD)

    server = serve(answer)
    found = teach(PROBLEMS[:1], endpoint(server), AnswerCache(tmp_path), Lesson())
    assert len(found.rungs) == 1 and len(server.requests) == 5 and found.asked == 1
    assert server.times[1] - server.times[0] >= 0.29 and server.times[2] - server.times[1] >= 0.29


def test_a_refusal_for_good_ends_it_and_keeps_what_is_there(serve, tmp_path):
    server = serve(lambda request, number: chat(GOOD) if number <= 2 else (401, {}, "who are you?"))
    with pytest.raises(DataError, match=r"refused a request: HTTP 401 who are you\? \(the key is read from \$TEACHER_KEY\)"):
        teach(PROBLEMS, endpoint(server), AnswerCache(tmp_path), Lesson(workers=1))
    assert len(list(tmp_path.rglob("*.json"))) == 2
    busy = serve(lambda request, number: (500, {}, ""))
    with pytest.raises(DataError, match="has not answered after 3 tries; the last problem: HTTP 500"):
        teach(PROBLEMS, endpoint(busy, tries=3), AnswerCache(tmp_path / "b"), Lesson(workers=1))
    assert len(busy.requests) == 3
    with pytest.raises(DataError, match="URLError"):
        Endpoint("http://127.0.0.1:9", tries=2, wait=0.01)({})


def test_malformed_answers_are_asked_for_again_then_dropped_and_counted(serve, tmp_path):
    wrong = GOOD.replace("= 7", "= 8").replace("is 7", "is 8")

    def answer(request, number):
        asked = request["messages"][1]["content"]
        if "What is 1 and" in asked and request["seed"] == 0:
            return chat("I would rather not.")
        if "What is 2 and" in asked:
            return chat(wrong)
        return chat(GOOD)

    found = teach(PROBLEMS[:4], endpoint(serve(answer)), AnswerCache(tmp_path), Lesson(workers=2))
    assert [r.problem.id for r in found.rungs] == ["0", "1", "3"]
    assert found.dropped == Counter({"the similar solution is wrong": 1})
    assert found.refused == Counter({"the similar solution is wrong": 2, "a section is missing": 1})


def test_a_second_solution_and_reflections(serve, tmp_path):
    def answer(request, number):
        system = request["messages"][0]["content"]
        if "### Reflection" in system:
            return chat("### Reflection\nCount instead.")
        return chat(GOOD if system == LADDER else "It must be 9. The answer is 9." if request["seed"] else "The answer is 7.")

    found = teach(PROBLEMS[:2], endpoint(serve(answer)), AnswerCache(tmp_path), Lesson(recheck=True, reflections=True))
    assert [r.problem.reflection for r in found.rungs] == ["Count instead."] * 2
    other = serve(lambda request, number: chat(GOOD if request["messages"][0]["content"] == LADDER else "The answer is 9."))
    found = teach(PROBLEMS[:2], endpoint(other), AnswerCache(tmp_path / "b"), Lesson(recheck=True))
    assert not found.rungs and found.dropped == Counter({"a second solution has another answer": 2})


def test_answers_are_read_strictly():
    with pytest.raises(Malformed, match="the similar problem is the original one"):
        read_ladder(PROBLEMS[0], GOOD.replace("Three hats and 4 hats: how many?", "what is  0 and 1"))
    with pytest.raises(Malformed, match="a section is missing: Solution to the Similar Problem"):
        read_ladder(PROBLEMS[0], GOOD.partition("### Solution")[0])
    loose = GOOD.replace("### Type of Problem and Solution Method", "## type of problem and solution method:")
    assert read_ladder(PROBLEMS[0], f"Sure!\n{loose}").problem.strategy == "Adding."
    assert sections("# A\nold\n# A\nnew") == {"a": "new"}


def test_the_pace():
    now, slept = [0.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    pace = Pace(120, clock=lambda: now[0], sleep=sleep)
    for _ in range(3):
        pace.take()
    assert slept == [0.5, 0.5]
    pace.hold(5)
    pace.take()
    assert slept[-1] == 5.0


def problems_file(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text(
        "".join(json.dumps({"id": p.id, "question": p.question, "solution": p.solution, "answer": p.answer}) + "\n" for p in PROBLEMS)
    )
    return file


def words(tmp_path, server):
    given = [
        "data",
        "metaladder",
        "--out",
        str(tmp_path / "out"),
        "--source",
        str(problems_file(tmp_path)),
        "--test",
        "0",
        "--validation",
        "0",
    ]
    return [*given, "--held-out", "0", "--teacher", server.url, "--per-minute", "0", "--workers", "1", "--key-variable", "TEACHER_KEY"]


def test_a_killed_command_goes_on_where_it_was(serve, tmp_path, capsys, monkeypatch):
    """SIGKILL at the fourth request: the second run asks for what is missing, and has what one run alone would have."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    held = threading.Event()

    def answer(request, number):
        if number == 4:
            held.set()
            time.sleep(20)
        return chat(GOOD)

    server = serve(answer)
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    child = subprocess.Popen([sys.executable, "-m", "llmtrain", *words(tmp_path, server)], env=env, stdout=subprocess.DEVNULL)
    assert held.wait(60)
    child.send_signal(signal.SIGKILL)
    child.wait()
    server.answer = lambda request, number: chat(GOOD)
    assert not (tmp_path / "out/rungs.jsonl").exists()
    assert data.main(words(tmp_path, server)[1:]) == 0
    assert "teacher: 3 requests sent, 3 answered from" in capsys.readouterr().err
    assert sorted(r.problem.id for r in read_rungs(tmp_path / "out/rungs.jsonl")) == list("012345")
    texts = [path.read_bytes() for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert not any(KEY.encode() in text for text in texts), "a secret was written"
