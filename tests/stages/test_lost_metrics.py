"""A metrics file that cannot be written costs the metrics, not the run."""

import errno

from llmtrain.train.console import Console
from llmtrain.train.loop import Loop


class FullDisk:
    written = 0

    def write(self, step, values):
        self.written += 1
        raise OSError(errno.ENOSPC, "No space left on device")


def test_the_loop_goes_on_and_says_so_once(capsys):
    loop = Loop.__new__(Loop)
    loop.mesh = type("Mesh", (), {"rank": 0})()
    loop.sinks, loop.console, loop.metrics_lost = [FullDisk()], Console(), False
    for step in range(3):
        loop._write(step, {"kind": "train"})
    assert loop.sinks[0].written == 3
    assert capsys.readouterr().out.count("No space left on device") == 1
