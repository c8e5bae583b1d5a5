"""Engine deepspeed on the stand-in."""

import os
from pathlib import Path

import sameness


def train_all(scenarios: dict[str, dict]) -> dict[str, dict]:
    """`sameness.train` of every scenario in this world. DeepSpeed asks where CANN is, which torch_npu must not: it would look for it."""
    import torch_npu  # noqa: F401

    os.environ["ASCEND_HOME_PATH"] = str(Path(__file__).parent)
    return sameness.train_all(scenarios)
