"""Device `npu` over the real torch_npu: every method of the interface, and what happens where CANN or an NPU is missing."""

import os
import re
import subprocess
import sys
import time

import pytest
import stand_in
from npu_world import ROOT, environment

stand_in.start()

import torch  # noqa: E402
import torch_npu  # noqa: E402

from llmtrain.device import DeviceUnavailable, select  # noqa: E402
from llmtrain.hardware import match  # noqa: E402

PRINT_DEVICE = "from llmtrain.device import select; d = select('{name}'); print(d.kind, d.describe())"


@pytest.fixture
def device():
    device = select("npu")
    device.set_current()
    return device


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    """A fresh Python where `import torch_npu` finds the stand-in."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=300)


def without_cann(code: str, **env: str) -> subprocess.CompletedProcess:
    """A fresh Python with torch_npu and no CANN, as on a machine that is set up by half."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TORCH_DEVICE_BACKEND_AUTOLOAD")}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean | env, capture_output=True, text=True, timeout=300)


def test_auto_prefers_it(device):
    assert select("auto").kind == "npu" and device.torch_device == torch.device("npu", 0)
    assert torch.npu.current_device() == 0 and device.collective_backend == "hccl"


def test_each_local_rank_has_its_own():
    other = select("npu", local_rank=3)
    other.set_current()
    assert torch.npu.current_device() == 3 and torch.empty(1, device="npu").device.index == 3
    select("npu").set_current()
    with pytest.raises(DeviceUnavailable, match="local rank 8 has no npu device, this machine has 8"):
        select("npu", local_rank=8)


def test_memory_is_counted(device):
    device.empty_cache()
    device.reset_peak_memory()
    before = device.memory()
    block = torch.empty(2**22, device=device.torch_device)
    padding = device.memory().allocated - before.allocated - 2**24
    assert 0 <= padding <= 2**12
    del block
    after = device.memory()
    assert after.allocated == before.allocated and after.peak - before.allocated == 2**24 + padding and after.total == 64 * 2**30
    device.reset_peak_memory()
    assert device.memory().peak == after.allocated


def test_random_state_comes_back(device):
    device.seed(7)
    state = device.rng_state()
    expected = torch.rand(3, device=device.torch_device), torch.rand(3)
    device.seed(8)
    assert not torch.equal(torch.rand(3, device=device.torch_device).cpu(), expected[0].cpu())
    device.set_rng_state(state)
    assert all(value.device.type == "cpu" and value.dtype == torch.uint8 for value in state.values())
    assert torch.equal(torch.rand(3, device=device.torch_device).cpu(), expected[0].cpu()) and torch.equal(torch.rand(3), expected[1])


def test_streams_and_events(device):
    start, end = device.event(), device.event()
    start.record()
    with device.stream():
        assert torch.npu.current_stream() != torch.npu.default_stream()
        time.sleep(0.02)
    end.record()
    device.synchronize()
    assert 15 < start.elapsed_time(end) < 5000


def test_autocast_is_told_a_dtype(device):
    """torch_npu's own default is float16, whatever the chip."""
    assert torch.get_autocast_dtype("npu") == torch.float16 and device.autocast_dtype() == torch.bfloat16
    with torch.autocast("npu", dtype=device.autocast_dtype()):
        y = torch.nn.functional.linear(torch.ones(2, 4, device="npu"), torch.ones(3, 4, device="npu"))
    assert y.dtype == torch.bfloat16
    assert "no fp64 matrix product; use precision: fp32" in device.unsupported_dtype(torch.float64)
    assert device.capability() is None and device.unsupported_dtype(torch.bfloat16) is None


def test_a_chip_without_bf16_says_so():
    code = "import torch; from llmtrain.device import select; d = select('npu'); "
    code += "print(d.unsupported_dtype(torch.bfloat16), d.autocast_dtype())"
    ran = python(code, STAND_IN_SOC="Ascend910ProB")
    assert "Ascend910ProB has no bf16; use precision: fp16 torch.float16" in ran.stdout, ran.stdout + ran.stderr


def test_deterministic_mode_reaches_hccl(device, monkeypatch):
    monkeypatch.setenv("HCCL_DETERMINISTIC", "")
    monkeypatch.delenv("HCCL_DETERMINISTIC")
    device.deterministic(True)
    try:
        assert torch.are_deterministic_algorithms_enabled() and os.environ["HCCL_DETERMINISTIC"] == "true"
    finally:
        device.deterministic(False)


def test_time_outs_are_in_the_environment_when_groups_are_made():
    """In a process of its own: a group of the engine's mesh, made with the options of a configuration."""
    code = """
import os
from llmtrain.config.train import ParallelConfig
from llmtrain.device import select
from llmtrain.parallel import mesh
device = select("npu")
device.set_current()
made = mesh.start(ParallelConfig(timeout=300, hccl_buffer_mb=64), device=device)
group = made.group("tp")
print(*(os.environ.get(f"HCCL_{name}") for name in ("CONNECT_TIMEOUT", "EXEC_TIMEOUT", "BUFFSIZE")))
import torch, torch.distributed as dist
dist.all_reduce(torch.ones(1, device="npu"))
try:
    dist.all_reduce(torch.ones(1))
except RuntimeError as error:
    print("refused:", error)
"""
    ran = python(code)
    assert "330 330 None" in ran.stdout, ran.stdout + ran.stderr
    assert "No backend type associated with device type cpu" in ran.stdout, "as with HCCL, tensors of the CPU are refused"


def test_every_group_of_hccl_has_its_buffer_and_its_time_out():
    """torch_npu's own ProcessGroupHCCL, as the first of 8 ranks, which send nothing."""
    code = """
import stand_in
stand_in.start(hccl=False)
import torch, torch.distributed as dist
from datetime import timedelta
from llmtrain.config.train import ParallelConfig
from llmtrain.device import select
from llmtrain.parallel import mesh
device = select("npu")
device.set_current()
options = device.process_group_options(timedelta(seconds=50), buffer_mb=32)
dist.init_process_group("hccl", store=dist.HashStore(), rank=0, world_size=8, **options)
made = mesh.start(ParallelConfig(timeout=300, hccl_buffer_mb=64, pp=2, dp_shard=2, cp=2), device=device)
groups = {axis: made.group(axis) for axis in ("pp", "dp_shard", "cp")} | {"fsdp": made.fsdp.get_group(), "world": dist.group.WORLD}
for axis, group in groups.items():
    backend = group._get_backend(torch.device("npu"))
    options = backend.options
    print(axis, type(backend).__name__, options.hccl_config, options._timeout.total_seconds(), options.global_ranks_in_group)
"""
    ran = python(code)
    lines = [line for line in ran.stdout.splitlines() if "ProcessGroupHCCL" in line]
    expected = [("pp", "[0, 4]"), ("dp_shard", "[0, 2]"), ("cp", "[0, 1]"), ("fsdp", "[0, 1, 2, 3]")]
    groups = [f"{axis} ProcessGroupHCCL {{'hccl_buffer_size': 64}} 330.0 {ranks}" for axis, ranks in expected]
    assert lines[:4] == groups and lines[4].startswith("world ProcessGroupHCCL {'hccl_buffer_size': 32} "), ran.stdout + ran.stderr


def test_every_training_chip_has_its_figures():
    """Names that torch_npu knows, from its own library. 310 and the first 910s (A, ProA, ProB, PremiumA) have no file."""
    library = (ROOT / torch_npu.__path__[0] / "lib/libtorch_npu.so").read_bytes()
    names = {name.decode() for name in re.findall(rb"\x00(Ascend9[0-9]{2}[A-Z]?[A-Za-z0-9_-]*)(?=\x00)", library)}
    wanted = {name for name in names if re.match(r"Ascend910B\d|Ascend910_93\d\d|Ascend950(PR|DT)_", name)}
    assert len(wanted) > 30 and {"Ascend910B4-1", "Ascend910_9391", "Ascend950PR_9599"} <= wanted
    assert {name: match(name) for name in wanted if match(name) is None} == {}


def test_it_is_described(device):
    assert device.describe() == "npu:0 Ascend910B2, 64 GiB, 8 on this machine, torch_npu 2.13.0"
    assert device.hardware().key == "ascend-910b2" and device.peak_flops(torch.bfloat16) == 354e12


def test_torch_loads_it_by_itself_where_nobody_says_no():
    """torch's autoloading, as on a machine with CANN."""
    code = "import torch; print(torch.npu.is_available()); " + PRINT_DEVICE.format(name="auto")
    ran = python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert ran.returncode == 0 and "True" in ran.stdout and "npu npu:0 Ascend910B2" in ran.stdout, ran.stdout + ran.stderr


def test_without_an_npu_it_says_so():
    ran = python(PRINT_DEVICE.format(name="npu"), STAND_IN_COUNT="0", ASCEND_RT_VISIBLE_DEVICES="9")
    assert "npu cannot be used: torch_npu finds no NPU (ASCEND_RT_VISIBLE_DEVICES is '9'; see `npu-smi info`)" in ran.stderr, ran.stderr


def test_a_wrong_path_to_cann_is_named():
    """CANN's libraries are found, its folders are not: torch_npu raises a bare Exception."""
    ran = python(PRINT_DEVICE.format(name="npu"), ASCEND_HOME_PATH="/nowhere")
    assert re.search(r"npu cannot be used: torch_npu does not load: .*/nowhere does not exist.*docs/npu.md", ran.stderr), ran.stderr


class TestWithoutCann:
    """torch_npu is installed, CANN is not."""

    def test_torch_itself_does_not_import(self):
        """The trap that llmtrain goes round; if torch_npu gives it up, that can go."""
        ran = without_cann("import torch")
        assert ran.returncode != 0 and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in ran.stderr

    def test_llmtrain_works_on_the_cpu(self):
        ran = without_cann(PRINT_DEVICE.format(name="cpu"))
        assert ran.returncode == 0 and ran.stdout.startswith("cpu cpu "), ran.stderr

    def test_auto_takes_the_cpu_and_warns(self):
        ran = without_cann(PRINT_DEVICE.format(name="auto"))
        assert ran.returncode == 0 and ran.stdout.split()[0] in ("cpu", "cuda")
        assert "auto passes over npu: torch_npu does not load: libhccl.so" in ran.stderr

    def test_a_named_npu_says_what_is_missing(self):
        ran = without_cann(PRINT_DEVICE.format(name="npu"))
        assert re.search(r"npu cannot be used: torch_npu does not load: .*libhccl.so.*docs/npu.md", ran.stderr), ran.stderr
