"""Recorded outputs of npu-smi, nvidia-smi, hccn_tool and version files, read."""

import pytest

from llmtrain.tools.doctor import parsers


def test_npu_smi_of_a_910b(recorded):
    smi = parsers.npu_smi(recorded("npu_smi_910b3.txt"))
    assert smi.version == "25.2.0"
    assert [(npu.card, npu.chip, npu.name, npu.health) for npu in smi.npus] == [(card, 0, "910B3", "OK") for card in range(8)]
    assert (smi.npus[4].bus, smi.npus[4].used, smi.npus[4].total) == ("0000:01:00.0", 21784, 65536)


def test_npu_smi_of_a_910c_has_two_chips_per_card(recorded):
    smi = parsers.npu_smi(recorded("npu_smi_910c.txt"))
    assert [(npu.card, npu.chip) for npu in smi.npus] == [(card, chip) for card in range(8) for chip in range(2)]
    assert smi.npus[-1].used == 57132 and {npu.name for npu in smi.npus} == {"Ascend910"}


def test_npu_smi_shows_bad_health(recorded):
    text = recorded("npu_smi_910b3.txt").replace(
        "| 2     910B3               | OK            |", "| 2     910B3               | Alarm         |"
    )
    assert [npu.health for npu in parsers.npu_smi(text).npus].count("Alarm") == 1


def test_npu_smi_with_a_hidden_bus_and_columns_that_touch():
    text = """
| npu-smi 25.0.rc1.b010            Version: 25.0.rc1.b010                                        |
| 0     910B4               | OK            | 105.5       39                0    / 0             |
| 0                         | xxxx:xx:xx.x  | 5           0    / 0          59718/ 65536         |"""
    assert parsers.npu_smi(text).npus == [parsers.Npu(0, 0, "910B4", "OK", "xxxx:xx:xx.x", 59718, 65536)]


@pytest.mark.parametrize("text", ["", "command not found", "dcmi module initialize failed. ret is -8005", "Version: 1"])
def test_other_text_is_nothing(text):
    assert parsers.npu_smi(text) is None and parsers.nvidia_smi(text) is None
    assert parsers.version_cfg(text) is None and parsers.firmware_range(text) is None and parsers.hccn_link(text) is None
    assert parsers.topology(text) == {}


@pytest.mark.parametrize(
    "name, driver, cuda, gpu, total, used, ecc",
    [
        ("nvidia_smi_v100.txt", "570.158.01", "12.8", "Tesla V100-SXM2-32GB", 32768, 31589, None),
        ("nvidia_smi_v100_old_driver.txt", "530.30.02", "12.1", "Tesla V100-SXM2-32GB", 32768, 0, 0),
        ("nvidia_smi_h100.txt", "580.105.08", "13.0", "NVIDIA H100 80GB HBM3", 81559, 0, 0),
    ],
)
def test_nvidia_smi(recorded, name, driver, cuda, gpu, total, used, ecc):
    smi = parsers.nvidia_smi(recorded(name))
    assert (smi.driver, smi.cuda) == (driver, cuda)
    assert [(g.index, g.name, g.total, g.used, g.ecc) for g in smi.gpus] == [(0, gpu, total, used, ecc)]


def test_topologies(recorded):
    nvlink = parsers.topology(recorded("nvidia_topo_nvlink.txt"))
    assert len(nvlink) == 28 and set(nvlink.values()) == {"NV8"} and ("GPU0", "GPU7") in nvlink
    assert parsers.topology(recorded("nvidia_topo_pcie.txt")) == {("GPU0", "GPU1"): "PHB"}


def test_versions(recorded):
    assert parsers.version_cfg(recorded("cann_8.0.0_version.cfg")) == "8.0.0"
    assert parsers.version_cfg("toolkit_running_version=[8.3.RC2]\n") == "8.3.RC2"
    assert parsers.fields(recorded("cann_8.2.RC1_install.info"))["version"] == "8.2.RC1"
    assert parsers.fields(recorded("cann_8.2.RC1_toolkit_version.info"))["version_dir"] == "8.2.RC1"
    assert parsers.fields("package_name=Ascend-cann-toolkit\nversion: 8.5.0\n")["version"] == "8.5.0"
    assert parsers.fields(recorded("driver_24.1.rc1.info"))["Version"] == "24.1.rc1"
    assert parsers.firmware_range(recorded("driver_25.0.rc1.1.info")) == ("7.0.0", "7.7.99")
    assert parsers.hccn_link(recorded("hccn_link_up.txt")) == "UP" and parsers.hccn_link("link status: DOWN\n") == "DOWN"


@pytest.mark.parametrize(
    "version, numbers, series",
    [
        ("25.0.rc1.1", (25, 0), "25.0"),
        ("8.2.RC1", (8, 2), "8.2"),
        ("9.1.0-beta.3", (9, 1, 0), "9.1"),
        ("2.13.0+cpu", (2, 13, 0), "2.13"),
        ("580.105.08", (580, 105, 8), "580.105"),
    ],
)
def test_numbers(version, numbers, series):
    assert parsers.numbers(version) == numbers and parsers.series(version) == series
