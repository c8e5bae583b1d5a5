"""`llmtrain selftest --device npu` over the stand-in: kernels and meshes of two ranks are judged, and the file says so."""

import os
import subprocess
import sys
from pathlib import Path

from llmtrain.tools.selftest.report import read

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "npu" / "support"


def test_two_ranks(tmp_path):
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, (SUPPORT / "site", SUPPORT, ROOT))), "OMP_NUM_THREADS": "1"}
    env |= {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "STAND_IN_COUNT": "2"}
    command = [
        sys.executable,
        "-m",
        "llmtrain",
        "selftest",
        "--device",
        "npu",
        "--ranks",
        "2",
        "--only",
        "kernels,parity",
        "--out",
        "npu.md",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=800, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    found = read(tmp_path / "npu.md")
    assert found["failed"] == [] and found["machine"]["formats"] == ["fp32", "bf16", "fp16"]
    passed = {line["name"] for line in found["parity"] if line["state"] == "passed"}
    assert {"one rank", "one rank, MoE", "dp_shard 2", "tp 2", "pp 2", "cp 2 (ring)", "dp_shard 2 x ep 2, MoE"} <= passed
    fused = {line["op"] for line in found["kernels"] if line["implementation"] == "torch_npu" and line["state"] == "passed"}
    assert {"attention", "rms_norm", "rope", "swiglu", "grouped_mm", "permute", "unpermute", "cross_entropy"} <= fused
