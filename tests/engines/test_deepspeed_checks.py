"""What engine deepspeed refuses, and what it says, before a rank starts: options, the compiler, a lock that a killed build left behind.

These need no DeepSpeed.
"""

import os
import subprocess
import sys
import time

import pytest

from llmtrain.config.errors import ConfigError
from llmtrain.config.run import RunConfig
from llmtrain.engine import deepspeed_build
from llmtrain.engine import deepspeed_config as deepspeed_config_module
from llmtrain.engine.base import check_engine
from llmtrain.engine.deepspeed_build import _announced, built, left_behind, obstacle, own_folder
from llmtrain.engine.deepspeed_config import _package, deepspeed_config
from llmtrain.engine.deepspeed_files import in_order
from llmtrain.errors import UserError
from llmtrain.layout.mesh import MeshShape
from llmtrain.stages import session  # noqa: F401 - registers the engines

MOE = {"ffn": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 16, "balance": {"sequences": "step"}}}


def configure(*, zero: int = 2, **changes) -> RunConfig:
    engine = {"kind": "deepspeed", "zero": zero} | changes.pop("engine", {})
    return RunConfig.model_validate({"engine": engine, "train": {"steps": 4}} | changes)


def refusal(cfg: RunConfig) -> str:
    with pytest.raises(UserError) as error:
        check_engine(cfg, shape=MeshShape.from_config(cfg.parallel), device="cpu")
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel": {"tp": 2}}, "parallel.tp is 2, but it runs only dp_replicate, dp_shard; engine native has tp"),
        ({"parallel": {"pp": 2}}, "parallel.pp is 2"),
        ({"parallel": {"cp": 2}}, "parallel.cp is 2"),
        ({"precision": "fp64"}, "precision.compute fp64.*it has no fp64"),
        ({"precision": "bf16", "zero": 0}, "precision.compute bf16 with engine.zero 0.*set engine.zero 1"),
        ({"precision": {"accumulate": "bf16"}}, "precision.accumulate bf16"),
        ({"precision": {"compute": "bf16", "reduce": "fp16"}}, "precision.reduce fp16: either fp32 or as precision.compute"),
        ({"optim": {"offload": True}}, "optim.offload is engine native's; set engine.offload_optimizer cpu"),
        ({"engine": {"offload_optimizer": "cpu"}, "zero": 0}, "engine.offload_optimizer cpu needs engine.zero 1 to 3, not 0"),
        ({"engine": {"offload_params": "cpu"}}, "engine.offload_params cpu needs engine.zero 3, not 2"),
        ({"engine": {"offload_optimizer": "nvme"}}, "engine.offload_optimizer nvme needs engine.zero 3, not 2; cpu goes with 1 to 3"),
        ({"engine": {"offload_params": "nvme"}, "zero": 3}, "engine.nvme_path None is no folder"),
        ({"engine": {"offload_optimizer": "nvme", "nvme_path": "/no/such"}, "zero": 3}, "engine.nvme_path /no/such is no folder"),
        ({"train": {"steps": 4, "offload": ["block_input"]}}, "train.offload"),
        ({"train": {"steps": 4, "compile": "on"}}, "train.compile on"),
        ({"model": MOE}, "model.ffn.balance.sequences 8 joins 8 micro-batches.*set it to a divisor of 1"),
    ],
)
def test_what_it_cannot_run_is_refused_by_the_name_of_the_option(changes, said):
    import re

    assert re.search(said, refusal(configure(**changes)))


def test_fp16_is_refused_on_a_cpu_for_which_onednn_has_none(monkeypatch):
    monkeypatch.setattr(deepspeed_config_module, "_package", lambda *_: None)
    monkeypatch.setattr(deepspeed_config_module, "cpu_computes_fp16", lambda: False)
    assert "precision.compute fp16: DeepSpeed refuses it on a CPU for which oneDNN has no fp16" in refusal(configure(precision="fp16"))
    monkeypatch.setattr(deepspeed_config_module, "cpu_computes_fp16", lambda: True)
    check_engine(configure(precision="fp16"), shape=MeshShape(), device="cpu")


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal(configure()).endswith("is not installed; DS_BUILD_OPS=0 pip install deepspeed==0.19.8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.20.1")
    assert "deepspeed 0.20.1 is installed" in _package(configure(), MeshShape(), "cpu")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.19.9")
    assert _package(configure(), MeshShape(), "cpu") is None


def test_deepspeeds_own_options_pass_through_but_those_that_a_run_has(monkeypatch):
    options = {"zero_optimization": {"overlap_comm": True, "stage3_param_persistence_threshold": 0}, "wall_clock_breakdown": True}
    made = deepspeed_config(configure(zero=3, engine={"options": options}), sizes=[1000, 1])
    assert made["wall_clock_breakdown"] and made["zero_optimization"]["overlap_comm"] and made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"]["reduce_bucket_size"] == 1002 and made["gradient_clipping"] == 0.0
    with pytest.raises(ConfigError, match=r"engine.options: optimizer is written by the engine itself; in its place stands optim"):
        RunConfig.load({"engine": {"kind": "deepspeed", "options": {"optimizer": {"type": "Lion"}}}})
    with pytest.raises(ConfigError, match=r"zero_optimization.stage .* in its place stands engine.zero"):
        RunConfig.load({"engine": {"kind": "deepspeed", "options": {"zero_optimization": {"stage": 1}}}})


def test_what_goes_to_files_is_aligned_or_refused():
    sizes = {"norm": 8, "embedding": 3 * 2**19, "q_proj": 96, "ffn": 2**20}
    assert in_order(sizes, ranks=2) == ["embedding", "ffn", "q_proj", "norm"]
    with pytest.raises(UserError, match=r"embedding has 524300 elements on each of 3 ranks, which is no multiple of 256.*offload to cpu"):
        in_order(sizes | {"embedding": 3 * 524300}, ranks=3)


# --- what has to be built -------------------------------------------------------------------------------------------------------------


def test_a_missing_compiler_is_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "there is no C++ compiler c++ (CXX names another). Debian, Ubuntu: apt-get install g++" in obstacle("shm", tmp_path)
    monkeypatch.setenv("CXX", "clang++ -O2")
    assert "no C++ compiler clang++ -O2" in obstacle("shm", tmp_path)
    (tmp_path / "shm.so").touch()
    assert built("shm", tmp_path) and obstacle("shm", tmp_path) is None, "what is built needs no compiler"


def test_environments_do_not_share_a_folder(tmp_path, monkeypatch):
    a, b = (own_folder(tmp_path / venv / "deepspeed/__init__.py") for venv in "ab")
    assert a != b and a.parent == b.parent and a == own_folder(tmp_path / "a" / "deepspeed/__init__.py")
    (tmp_path / "ninja").write_text("#!/bin/sh\n")
    (tmp_path / "ninja").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert own_folder(tmp_path / "a/deepspeed/__init__.py") not in (a, b), "another ninja takes what is there for old"


def test_missing_ninja_and_headers_are_named(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / name))
    assert obstacle("shm", tmp_path).endswith("pip install ninja")
    (tmp_path / "scripts").mkdir()
    ninja = tmp_path / "scripts" / "ninja"
    ninja.write_text("#!/bin/sh\n")
    ninja.chmod(0o755)
    assert "Python.h is not in" in obstacle("shm", tmp_path), "ninja is found beside the Python that runs"
    assert os.environ["PATH"].endswith(str(tmp_path / "scripts"))


def test_a_lock_that_nobody_holds_is_reported_with_its_age_and_what_to_do(tmp_path):
    lock = tmp_path / "lock"
    assert left_behind(lock) is None
    lock.touch()
    os.utime(lock, (time.time() - 600, time.time() - 600))
    said = left_behind(lock)
    assert f"{lock} has been there for 10 min and no process of this machine holds it" in said and said.endswith(f"rm {lock}")
    assert said in obstacle("shm", tmp_path)


def test_a_lock_that_a_build_holds_is_left_alone_until_the_build_is_killed(tmp_path):
    lock = tmp_path / "lock"
    code = (
        "import sys; from torch.utils.file_baton import FileBaton as B; b = B(sys.argv[1]); b.try_acquire(); print(1, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as builder:
        builder.stdout.readline()
        assert lock.exists() and left_behind(lock) is None
        builder.kill()
    assert "a build was killed" in left_behind(lock)


def test_a_build_is_announced_and_its_progress_said(tmp_path, monkeypatch):
    monkeypatch.setattr(deepspeed_build, "EVERY", 0.02)
    said = []
    with _announced("shm", tmp_path, files=2, say=said.append):
        (tmp_path / "one.o").touch()
        time.sleep(0.2)
    assert said[0].startswith("building shm, which DeepSpeed needs for this run") and str(tmp_path) in said[0]
    assert "1 of 2 files compiled" in said[-2] and said[-1].startswith("built shm in 0 s")
    with pytest.raises(RuntimeError), _announced("shm", tmp_path, files=2, say=said.append):
        raise RuntimeError
    assert not said[-1].startswith("built")
