"""What the kernels' tests share lies in support/ (see attention_harness)."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "support"))
