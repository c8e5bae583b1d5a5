"""The accelerators' figures."""

import subprocess
import sys

import pytest

from llmtrain.errors import UserError
from llmtrain.hardware import keys, load, match


@pytest.mark.parametrize(("key", "dtype", "peak"), [
    ("v100-32", "float16", 125e12), ("a100-80", "bfloat16", 312e12), ("h100-80", "bfloat16", 989.4e12), ("h200", "bfloat16", 989.4e12),
    ("b200", "bfloat16", 2250e12), ("gb200", "bfloat16", 2500e12),
    ("ascend-910b", "bfloat16", 354e12), ("ascend-910c", "bfloat16", 376e12),
])  # fmt: skip
def test_published_peaks(key, dtype, peak):
    assert load(key).peak_flops(dtype) == peak


@pytest.mark.parametrize("key", keys())
def test_every_number_has_a_source_and_plausible_units(key):
    hardware = load(key)
    quantities = [
        *hardware.peak.values(),
        hardware.memory,
        hardware.memory_bandwidth,
        *hardware.links.values(),
        *hardware.rates.matrix.values(),
    ]
    assert all(quantity.source for quantity in quantities if quantity)
    assert 2**34 <= hardware.memory.value <= 3e11 and 5e11 <= hardware.memory_bandwidth.value <= 2e13
    assert all(5e9 <= link.value <= 1e12 for link in hardware.links.values())
    if "float16" in hardware.peak:
        assert hardware.peak_flops("float16") >= hardware.peak_flops("float32" if "float32" in hardware.peak else "float16")


@pytest.mark.parametrize("key", keys())
def test_rates_are_shares_of_the_figures(key):
    hardware = load(key)
    assert all(0.5 < share.value < 1 for share in hardware.rates.matrix.values())
    assert set(hardware.rates.matrix) <= set(hardware.peak)


def test_a_file_outside_the_package_is_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "vendor: me\nnames: []\npeak: {float32: {value: 1.0e11, source: measured}}\nmemory: {value: 1.0e10, source: measured}\n"
    )
    assert load(str(path)).peak_flops("float32") == 1e11 and load(str(path)).key == "mine"
    path.write_text("vendor: me\n")
    with pytest.raises(UserError, match=r"mine\.yaml"):
        load(str(path))
    with pytest.raises(UserError, match="no such file"):
        load(str(tmp_path / "none.yaml"))


def test_volta_has_no_bf16_peak():
    assert load("v100-32").peak_flops("bfloat16") is None


@pytest.mark.parametrize(("name", "key"), [
    ("Tesla V100-SXM2-32GB", "v100-32"), ("Tesla V100-PCIE-32GB", "v100-32-pcie"), ("NVIDIA A100-SXM4-80GB", "a100-80"),
    ("NVIDIA A100 80GB PCIe", "a100-80-pcie"), ("NVIDIA H100 80GB HBM3", "h100-80"), ("NVIDIA H100 PCIe", "h100-80-pcie"),
    ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200"), ("NVIDIA GB200", "gb200"), ("NVIDIA B300", "b300"),
    ("Ascend910B2", "ascend-910b2"), ("Ascend910B4", "ascend-910b4"),
    ("Ascend910B1", "ascend-910b1"), ("Ascend910B2C", "ascend-910b2"), ("Ascend910B3", "ascend-910b3"), ("Ascend910B4-1", "ascend-910b4-1"),
    ("Ascend910_9362", "ascend-910c"), ("Ascend910_9382", "ascend-910c"), ("Ascend910_9392", "ascend-910c"),
    ("Ascend950PR_9599", "ascend-950"), ("Ascend950DT_95A1", "ascend-950dt"),
])  # fmt: skip
def test_names_that_drivers_report(name, key):
    assert match(name).key == key


@pytest.mark.parametrize("name", ["NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090", "AMD EPYC", "Ascend310P3", "Ascend910ProB", ""])
def test_unknown_names_match_nothing(name):
    assert match(name) is None


def test_variants_differ_only_where_they_say():
    base, variant = load("h100-80"), load("h100-80-pcie")
    assert variant.memory == base.memory and variant.peak_flops("bfloat16") < base.peak_flops("bfloat16")
    assert variant.links["network"] == base.links["network"]


def test_unknown_keys_get_a_suggestion():
    with pytest.raises(UserError, match="'H100-08' is not known, did you mean h100-80"):
        load("H100-08")


def test_reading_them_needs_no_torch():
    code = "import sys, llmtrain.hardware as h; h.load('h200'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
