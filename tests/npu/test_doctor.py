"""`llmtrain doctor --device npu` over the stand-in: two ranks of `hccl` meet. Its lines on CANN may be WRONG here."""

import json
import subprocess
import sys

from npu_world import environment


def test_two_ranks_of_hccl_meet(tmp_path):
    command = [sys.executable, "-m", "llmtrain", "doctor", "--device", "npu", "--ranks", "2", "--json", "doctor.json"]
    env = {name: value for name, value in environment(STAND_IN_COUNT="2").items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400, stdin=subprocess.DEVNULL)
    assert (tmp_path / "doctor.json").exists(), f"{done.stdout[-4000:]}\n{done.stderr[-3000:]}"
    report = json.loads((tmp_path / "doctor.json").read_text())
    found = {line["name"]: line for line in report["lines"]}
    line = found["hccl, 2 ranks"]
    assert line["verdict"] == "OK", line
    for collective in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"):
        assert collective in line["text"], line
    assert done.returncode == (1 if report["wrong"] else 0)
