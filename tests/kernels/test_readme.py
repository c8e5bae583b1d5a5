"""The examples of kernels/README.md run, in a Python that finds no llmtrain."""

import re
import subprocess
import sys
from pathlib import Path

import llmtrain_kernels
import pytest

KERNELS = Path(llmtrain_kernels.__file__).parent
README = (KERNELS / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
ALONE = "import sys; sys.modules['llmtrain'] = None\n"
"""Any import of llmtrain fails."""


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs_without_llmtrain(example, tmp_path):
    (tmp_path / "llmtrain_kernels").symlink_to(KERNELS)
    done = subprocess.run([sys.executable, "-c", ALONE + example], capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d", done.stdout)


def test_every_file_that_it_names_is_there():
    names = re.findall(r"`([\w/]+\.py)`", README)
    assert len(names) >= 8 and all((KERNELS / name).exists() for name in names)
