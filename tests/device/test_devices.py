"""Devices: selection and its errors, a fake one, and the CPU."""

import os
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch

from llmtrain.device import DeviceUnavailable, Memory, npu, register, select
from llmtrain.device.base import Accelerator, Device
from llmtrain.device.cuda import CudaDevice, unsupported_dtype
from llmtrain.device.host_copies import HostCopies, StreamCopies
from llmtrain.device.npu import NpuDevice
from llmtrain.device.registry import unregister

CUDA = CudaDevice.unavailable()


class FakeModule:
    """The functions of a torch device module that an accelerator needs."""

    state = torch.zeros(4, dtype=torch.uint8)

    def device_count(self):
        return 2

    def get_device_name(self, index):
        return "Ascend910B2"

    def get_rng_state(self, index):
        return self.state

    def set_rng_state(self, state, index):
        self.state = state

    def manual_seed(self, n):
        self.state = torch.full((4,), n, dtype=torch.uint8)

    def memory_allocated(self, index):
        return 1

    def max_memory_allocated(self, index):
        return 2

    def get_device_properties(self, index):
        return type("Properties", (), {"total_memory": 3 * 2**30})

    def Stream(self, index):
        return None

    def stream(self, stream):
        return nullcontext(stream)


class FakeDevice(Accelerator):
    """An accelerator that torch knows only by name."""

    kind = "privateuseone"
    collective_backend = "gloo"
    module = FakeModule()

    @classmethod
    def unavailable(cls):
        return None


@pytest.fixture
def fake():
    register(FakeDevice, preference=9)
    yield
    unregister(FakeDevice.kind)


def test_a_registered_device_is_picked_by_preference(fake):
    device = select("auto", 1)
    assert isinstance(device, FakeDevice) and device.torch_device == torch.device("privateuseone", 1)
    assert device.memory() == Memory(1, 2, 3 * 2**30) and "Ascend910B2, 3 GiB, 2 on this machine" in device.describe()
    assert device.hardware().key == "ascend-910b2" and device.peak_flops(torch.bfloat16) == 354e12
    assert device.peak_flops(torch.float64) is None


def test_an_accelerators_random_state_comes_back(fake):
    device = select("auto")
    device.seed(7)
    state = device.rng_state()
    expected = torch.rand(3)
    device.seed(8)
    device.set_rng_state(state)
    assert device.module.state.tolist() == [7] * 4
    assert torch.equal(torch.rand(3), expected)


def test_a_rank_beyond_the_devices_is_refused(fake):
    with pytest.raises(DeviceUnavailable, match="local rank 2 has no privateuseone device, this machine has 2"):
        select("privateuseone", 2)


def test_unknown_names_get_a_suggestion():
    with pytest.raises(DeviceUnavailable, match="'cdua' is not a device, did you mean cuda"):
        select("cdua")


def test_a_kind_registers_once(fake):
    with pytest.raises(ValueError, match="registered already"):
        register(FakeDevice, preference=0)


@pytest.mark.skipif(CUDA is None, reason="this machine has a usable GPU")
def test_an_unusable_named_device_says_why_and_what_to_do():
    with pytest.raises(DeviceUnavailable, match=r"cuda cannot be used: .* Install a CUDA build .* or set device: cpu"):
        select("cuda")


@pytest.fixture
def no_cann(monkeypatch):
    """torch_npu is there and fails to load; set `error` to what it raises."""
    raised = type("Raised", (), {"error": ImportError("libhccl.so: cannot open shared object file\n[ERROR] 2026-01-01 (PID:1)")})

    def fail(name):
        raise raised.error

    npu._load.cache_clear()
    monkeypatch.setattr(npu.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(npu.importlib, "import_module", fail)
    monkeypatch.setattr(npu.importlib.metadata, "requires", lambda name: ["torch==2.13.0", "numpy"])
    monkeypatch.setattr(npu.importlib.metadata, "version", lambda name: "2.13.0")
    yield raised
    npu._load.cache_clear()


def test_npu_without_torch_npu_says_so(monkeypatch):
    npu._load.cache_clear()
    monkeypatch.setattr(npu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceUnavailable, match=r"torch_npu is not installed\. docs/npu.md tells"):
        select("npu")
    npu._load.cache_clear()


@pytest.mark.parametrize("kind", [ImportError, OSError, Exception])
def test_npu_without_cann_says_so(no_cann, kind):
    no_cann.error = kind("libhccl.so: no such file")
    with pytest.raises(DeviceUnavailable, match=r"torch_npu does not load: libhccl\.so: .*\. docs/npu"):
        select("npu")


def test_a_torch_npu_of_another_torch_says_which_pair_it_wants(no_cann, monkeypatch):
    monkeypatch.setattr(npu.torch, "__version__", "2.12.1+cpu")
    with pytest.raises(DeviceUnavailable, match=r"libhccl.so: .* \(torch_npu 2.13.0 wants torch==2.13.0, this is torch 2.12.1\+cpu\)"):
        select("npu")
    npu._load.cache_clear()
    monkeypatch.setattr(npu.torch, "__version__", "2.13.0")
    assert "wants" not in npu._load()


def test_auto_warns_when_it_passes_over_an_npu_that_the_machine_is_set_up_for(no_cann):
    with pytest.warns(UserWarning, match="auto passes over npu: torch_npu does not load: libhccl"):
        assert select("auto").kind in ("cpu", "cuda")


def test_hccl_waits_as_long_as_the_run_unless_the_user_says_otherwise(monkeypatch):
    names = ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    npu.limit_hccl(timedelta(seconds=20.5))
    assert [os.environ[name] for name in names] == ["120", "21"]
    npu.limit_hccl(timedelta(seconds=630))
    assert [os.environ[name] for name in names] == ["630", "630"]
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "99")
    npu.limit_hccl(timedelta(hours=9))
    assert [os.environ[name] for name in names] == ["7200", "99"]


def test_volta_has_no_bf16():
    assert unsupported_dtype(torch.bfloat16, (7, 0)) == "Volta has no bf16; use precision: fp16"
    assert unsupported_dtype(torch.bfloat16, (8, 0)) is None and unsupported_dtype(torch.float16, (7, 0)) is None


def test_autocast_follows_what_the_device_has(monkeypatch):
    monkeypatch.setattr(CudaDevice, "capability", lambda self: (7, 0))
    assert CudaDevice(0).autocast_dtype() == torch.float16
    assert select("cpu").autocast_dtype() == torch.bfloat16


def test_back_ends_and_options():
    assert (CudaDevice.collective_backend, NpuDevice.collective_backend, select("cpu").collective_backend) == ("nccl", "hccl", "gloo")
    assert CudaDevice(3).process_group_options(timedelta(1)) == {"device_id": torch.device("cuda", 3)}
    assert CudaDevice(3).group_options(timedelta(1)) is None and select("cpu").group_options(timedelta(1), buffer_mb=9) is None


class Streams:
    """What an accelerator's module is told, in order: `main` is the stream that computes, `side` another one."""

    def __init__(self):
        self.told: list[str] = []

    def Stream(self, index):
        return self._stream("side")

    def current_stream(self):
        return self._stream("main")

    def Event(self):
        told = {"record": lambda event: self.told.append("event"), "synchronize": lambda event: self.told.append("host")}
        return type("Event", (), told)()

    def stream(self, stream):
        return nullcontext()

    def _stream(self, name):
        waits = {"wait_stream": lambda stream, other: self.told.append(f"{name} waits for {other.name}")}
        waits["wait_event"] = lambda stream, event: self.told.append(f"{name} waits for event")
        return type("Stream", (), waits | {"name": name})()


class OnTheHost(StreamCopies):
    """Memory that is there without an accelerator."""

    host_memory = device_memory = HostCopies.host_memory


def test_copies_run_beside_what_the_device_computes():
    module = Streams()
    copies = OnTheHost(module, "cpu", 0)
    away = copies.to_host(torch.arange(3.0))
    assert module.told == ["side waits for main", "event"], "nothing waits for the copy yet"
    assert away.wait() is away.wait() and module.told[2:] == ["main waits for event"]
    back = copies.to_device(away.wait())
    assert torch.equal(back.finish(), torch.arange(3.0)) and module.told[3:] == ["side waits for main", "event", "host"]
    into = torch.zeros(3)
    assert copies.to_host(torch.ones(3), into=into).wait() is into and into.sum() == 3


class TestCpu:
    """The CPU as a device."""

    def test_has_every_method_of_the_interface(self):
        device = select("cpu", local_rank=5)
        assert device.count() == 1 and device.torch_device == torch.device("cpu")
        for method in ("set_current", "synchronize", "stream", "event", "empty_cache"):
            assert getattr(device, method)() is None
        assert device.unsupported_dtype(torch.float64) is None and device.capability() is None
        tensor = torch.arange(6.0).view(2, 3).t()
        copy = device.host_copies().to_host(tensor).wait()
        assert torch.equal(copy, tensor) and copy.stride() == tensor.stride() and copy.data_ptr() != tensor.data_ptr()
        assert isinstance(device, Device) and "cores" in device.describe()

    def test_peak_memory_sees_what_was_freed(self):
        device = select("cpu")
        device.reset_peak_memory()
        before = device.memory()
        torch.ones(64 * 2**20, dtype=torch.uint8)
        after = device.memory()
        assert after.peak - before.allocated >= 60 * 2**20 and after.total > after.peak > 0

    def test_peak_flops_is_measured_once_per_dtype(self):
        device = select("cpu")
        first = device.peak_flops(torch.float32)
        assert 1e9 < first < 1e15 and device.peak_flops(torch.float32) == first

    def test_random_state_comes_back(self):
        device = select("cpu")
        device.seed(3)
        state, expected = device.rng_state(), torch.rand(4)
        device.set_rng_state(state)
        assert torch.equal(torch.rand(4), expected)

    def test_deterministic_mode(self):
        device = select("cpu")
        device.deterministic(True)
        try:
            assert torch.are_deterministic_algorithms_enabled()
        finally:
            device.deterministic(False)
        assert not torch.are_deterministic_algorithms_enabled()
