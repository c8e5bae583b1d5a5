"""The progress line, on a terminal and off it."""

import io
import re

import pytest

from llmtrain.train.console import ERASE_LINE, Console, duration, progress_line, short_count

VALUES = {"loss": 2.34567, "grad_norm": 0.98765, "lr": 3e-3, "tokens_per_second": 12345.6, "mfu": 0.4321, "memory_gb": 1.234, "spike": 0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """What is left to see: a rewritten line shows only its last text."""
        return [line.rsplit(ERASE_LINE, 1)[-1] for line in self.getvalue().split("\n")]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_line():
    line = progress_line(step=7, total=300, values=VALUES, eta=3725)
    assert line == "step   7/300  ETA 01:02:05  loss 2.3457  grad 0.988  lr 3.00e-03  12.3k tok/s  MFU 43.2%  mem 1.23G"
    experts = {"first_layer": 1, "load": [1.0, 1.25], "entropy": [0.99, 1.0]}
    sparse = progress_line(step=300, total=300, values={**VALUES, "mfu": None, "spike": 1, "experts": experts}, eta=None)
    assert "MFU" not in sparse and "spike" in sparse and "load 1.25  entropy 0.99  " in sparse and "ETA" not in sparse


def test_a_terminal_shows_messages_above_one_live_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    terminal, clock = Terminal(), Clock()
    console = Console(stream=terminal, clock=clock)
    for step in (1, 2):
        clock.now += 1
        console.progress(step=step, total=3, values=VALUES, eta=10)
    console.message("saved step 2")
    first, live = terminal.screen()
    assert first == "saved step 2" and live.startswith("step 2/3")
    clock.now += 0.01
    console.progress(step=3, total=3, values=VALUES, eta=0)
    console.message("done")
    assert [line[:8] for line in terminal.screen()] == ["saved st", "step 3/3", "done", ""]


def test_the_live_line_never_wraps(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    Console(stream=terminal).progress(step=1, total=3, values=VALUES, eta=10)
    assert len(terminal.screen()[-1]) == 39


def test_a_file_gets_plain_lines_now_and_then():
    stream, clock = io.StringIO(), Clock()
    console = Console(stream=stream, seconds=10, clock=clock)
    for step in range(1, 31):
        clock.now += 1
        console.progress(step=step, total=30, values=VALUES, eta=10)
    console.message("done")
    assert re.findall(r"step +(\d+)/30", stream.getvalue()) == ["1", "11", "21", "30"]
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue() and stream.getvalue().endswith("\ndone\n")


def test_other_ranks_are_silent():
    stream = Terminal()
    console = Console(enabled=False, stream=stream)
    console.progress(step=1, total=1, values=VALUES, eta=0)
    console.message("hello")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("number, text", [(0, "0"), (999.4, "999"), (999.6, "1.00k"), (12345, "12.3k"), (123456, "123k"), (2.5e9, "2.50G")])
def test_short_count(number, text):
    assert short_count(number) == text


@pytest.mark.parametrize(
    "seconds, text", [(5, "00:05"), (65.6, "01:06"), (3725, "01:02:05"), (90061, "1d 01:01:01"), (float("inf"), "unknown")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
