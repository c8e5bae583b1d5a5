"""`llmtrain sft` on every rank of a world that a test has started."""

import os
from pathlib import Path

from llmtrain.config.run import RunConfig
from llmtrain.stages import sft


def tune(folder: str, config: str, name: str) -> int:
    """Run `config` in `folder` under this name; the exit code."""
    os.chdir(folder)
    return sft.run(sft.settled(RunConfig.load(Path(config), {"name": name})))
