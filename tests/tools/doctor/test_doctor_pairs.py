"""The table of pairs, and what it says."""

from pathlib import Path

import pytest

from llmtrain.tools.doctor import pairs
from llmtrain.tools.doctor.parsers import numbers, series


def test_every_entry_has_a_source():
    used = "".join(entry.source for entry in pairs.RELEASES) + "".join(source for _, source in pairs.DRIVERS.values())
    used += "".join(source for _, source in [*pairs.TRITON_ASCEND.values(), *pairs.CUDA_DRIVERS.values()]) + "I"
    assert set(used) == set(pairs.SOURCES)


def test_the_table_is_consistent():
    names = [entry.torch_npu for entry in pairs.RELEASES]
    assert len(set(names)) == len(names)
    for entry in pairs.RELEASES:
        assert numbers(entry.torch_npu)[:3] == numbers(entry.torch), entry
        assert series(entry.cann) in entry.works_with, entry
    for known, _ in pairs.DRIVERS.values():
        assert list(known) == sorted(known, key=numbers)


def test_torch_and_torch_npu():
    assert pairs.torch_and_torch_npu("2.13.0+cpu", "2.13.0").fits
    assert pairs.torch_and_torch_npu("2.9.0", "2.9.0.post9").fits
    wrong = pairs.torch_and_torch_npu("2.14.0", "2.13.0")
    assert wrong.fits is False and "torch==2.13.0" in wrong.fix and "torch-npu==2.14.0" in wrong.fix


@pytest.mark.parametrize(
    "torch_npu, cann, fits",
    [
        ("2.13.0", "9.2.0", True),
        ("2.13.0", "8.5.0", True),
        ("2.13.0", "9.1.1", True),
        ("2.13.0", "8.2.RC1", False),
        ("2.13.0", "9.3.0", None),
        ("2.7.1", "8.3.RC1", True),
        ("2.7.1", "8.5.0", None),
        ("2.6.0", "7.0.0", False),
        ("2.13.0.post9", "9.2.0", None),
        ("2.99.0", "9.2.0", None),
    ],
)
def test_torch_npu_and_cann(torch_npu, cann, fits):
    judged = pairs.torch_npu_and_cann(torch_npu, cann)
    assert judged.fits is fits and torch_npu in judged.text
    assert (judged.fix != "") == (fits is False)


def test_a_wrong_cann_names_what_to_install_for_either_side():
    fix = pairs.torch_npu_and_cann("2.9.0.post9", "8.3.RC1").fix
    assert "CANN 9.2.0" in fix and "torch-npu" not in fix  # no torch_npu for torch 2.9.0 works with CANN 8.3
    fix = pairs.torch_npu_and_cann("2.7.1.post11", "8.3.RC1").fix
    assert "CANN 9.2.0" in fix and "torch-npu==2.7.1`" in fix


@pytest.mark.parametrize(
    "cann, driver, fits",
    [
        ("9.1.0", "26.0.rc1", True),
        ("9.1.0", "25.0.rc1.1", False),
        ("9.0.0", "25.0.rc1.1", True),
        ("8.5.0", "24.1.rc2", False),
        ("8.2.RC1", "25.2.0", True),
        ("8.2.RC1", "25.5.1", None),
        ("9.2.0", "26.0.rc1", None),
    ],
)
def test_cann_and_driver(cann, driver, fits):
    assert pairs.cann_and_driver(cann, driver).fits is fits


def test_firmware():
    assert pairs.driver_and_firmware("7.7.0.1.231", ("7.0.0", "7.7.99")).fits
    assert pairs.driver_and_firmware("7.0.0", ("7.0.0", "7.2.99")).fits
    assert pairs.driver_and_firmware("7.7.0.1.231", ("7.0.0", "7.2.99")).fits is False
    assert pairs.driver_and_firmware("6.4.12.1.241", ("7.0.0", "7.2.99")).fits is False


def test_python():
    assert pairs.torch_npu_and_python("2.13.0", "3.14.0").fits
    assert pairs.torch_npu_and_python("2.13.0", "3.9.1").fits is False
    assert pairs.torch_npu_and_python("2.6.0", "3.12.1").fits is False


def test_triton_ascend():
    assert pairs.triton_and_cann("3.6.0", "9.2.0", "2.13.0").fits
    wrong = pairs.triton_and_cann("3.2.0", "9.2.0", "2.13.0")
    assert wrong.fits is False and "triton-ascend==3.6.0" in wrong.fix
    assert pairs.triton_and_cann("3.2.0", "8.5.0", None).fits
    assert pairs.triton_and_cann("3.2.0", "9.0.0", None).fits is None


def test_cuda_and_driver():
    assert pairs.cuda_and_driver("13.0", "580.65.06").fits
    assert pairs.cuda_and_driver("12.6", "580.65.06").fits and pairs.cuda_and_driver("12.6", "530.30.02").fits
    wrong = pairs.cuda_and_driver("13.0", "570.158.01")
    assert wrong.fits is False and "cu126" in wrong.fix
    assert "cu126" not in pairs.cuda_and_driver("12.6", "470.1").fix
    assert pairs.cuda_and_driver("14.0", "600.1").fits is None


@pytest.mark.parametrize(
    "capability, architectures, fits",
    [
        ((7, 0), ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"], True),
        ((7, 0), ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"], False),
        ((8, 9), ["sm_75", "sm_80", "sm_86", "sm_90"], True),
        ((8, 0), ["sm_75", "sm_86"], False),
        ((9, 0), ["sm_75", "sm_80", "sm_90"], True),
        ((12, 1), ["sm_90", "sm_120"], True),
        ((10, 3), ["sm_90", "compute_90"], True),
        ((7, 0), [], False),
    ],
)
def test_architectures(capability, architectures, fits):
    judged = pairs.architecture("a GPU", capability, architectures)
    assert judged.fits is fits
    assert ("cu126" in judged.fix) == (fits is False and capability == (7, 0))


def test_the_page_has_the_tables():
    """docs/doctor.md ends with what `pairs.page()` gives."""
    page = (Path(__file__).parents[3] / "docs/doctor.md").read_text()
    assert page.endswith(pairs.page()), "docs/doctor.md is stale: its end has to be llmtrain.tools.doctor.pairs.page()"
