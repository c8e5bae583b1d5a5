"""Verdicts on whole machines made of recorded outputs, each with one thing broken."""

import os
from pathlib import Path

import pytest

from llmtrain.tools.doctor import ascend, clock, nvidia, packages, smoke, torch_probe
from llmtrain.tools.doctor.machine import AUTOLOAD, Answer, Line, Verdict, users_environment

FACTS = {"torch": "2.13.0+cpu", "python": "3.11.7", "threads": 8, "cuda": None, "hip": None}
INSTALL_INFO = "/usr/local/Ascend/cann/aarch64-linux/ascend_toolkit_install.info"
V100 = {"name": "Tesla V100-SXM2-32GB", "capability": [7, 0], "memory": 2**35}


def wrong(lines):
    """Names of the WRONG lines."""
    return [line.name for line in lines if line.verdict is Verdict.WRONG]


def of(lines, name):
    """The lines of a name."""
    return next(line for line in lines if line.name == name)


def npu(machine, *, torch_npu="2.13.0", facts=FACTS, triton=None, wanted=False):
    return ascend.lines(machine, facts, wanted=wanted, torch_npu=torch_npu, triton_ascend=triton)


def test_a_wrong_line_has_to_say_what_to_do():
    with pytest.raises(ValueError, match="what to do"):
        Line("a", "b", Verdict.WRONG, "broken")


def test_a_good_npu_machine(npu_machine):
    lines = npu(npu_machine())
    assert wrong(lines) == []
    assert "8 x 910B3" in of(lines, "npu-smi").text and of(lines, "CANN").text == "8.5.0 in /usr/local/Ascend/cann"
    assert of(lines, "torch_npu + CANN").verdict is Verdict.OK and of(lines, "CANN + driver").verdict is Verdict.OK
    assert of(lines, "firmware").verdict is Verdict.OK
    assert "4.0: 21784 of 65536 MB" in of(lines, "NPU memory").text


@pytest.mark.parametrize(
    "broken, names, words",
    [
        ({"files": {"/usr/local/Ascend/driver/version.info": "driver_24.1.rc1.info"}}, ["firmware", "CANN + driver"], "same Ascend HDK"),
        ({"env": {"ASCEND_TOOLKIT_HOME": "", "ASCEND_HOME_PATH": ""}}, ["CANN"], "source /usr/local/Ascend/cann/set_env.sh"),
        ({"env": {"LD_LIBRARY_PATH": "/usr/lib"}}, ["CANN"], "LD_LIBRARY_PATH"),
        ({"files": {INSTALL_INFO: "cann_8.2.RC1_install.info"}}, ["torch_npu + CANN"], "CANN 9.2.0"),
        ({"files": {"/dev/devmm_svm": None}}, ["devices"], "--device /dev/devmm_svm"),
        ({"answers": {"npu-smi info": "npu_smi_no_driver.txt"}}, ["npu-smi"], "device"),
    ],
)  # fmt: skip
def test_one_thing_broken(npu_machine, recorded, broken, names, words):
    def texts(values, folder=False):
        return {name: recorded(text) if text and text.endswith((".info", ".txt")) else text for name, text in values.items()}

    files, env = texts(broken.get("files", {})), broken.get("env", {})
    lines = npu(npu_machine(files, env, texts(broken.get("answers", {}))))
    assert wrong(lines) == names
    assert any(words in line.fix for line in lines if line.verdict is Verdict.WRONG)


def test_no_cann_at_all(machine):
    lines = npu(machine(), wanted=True)
    assert {"devices", "CANN", "driver"} <= set(wrong(lines))
    quiet = npu(machine())
    assert wrong(quiet) == [] and of(quiet, "CANN").verdict is Verdict.NOTE
    assert [line.text for line in npu(machine(), torch_npu=None)] == ["none here"]


def test_npus_without_torch_npu(npu_machine):
    assert wrong(npu(npu_machine(), torch_npu=None)) == ["torch_npu"]


def test_another_torch(npu_machine):
    lines = npu(npu_machine(), facts={**FACTS, "torch": "2.14.0"})
    assert wrong(lines) == ["torch + torch_npu"]


def test_bad_health(npu_machine, recorded):
    text = recorded("npu_smi_910b3.txt").replace("| 2     910B3               | OK   ", "| 2     910B3               | Alarm")
    assert wrong(npu(npu_machine(answers={"npu-smi info": text}))) == ["NPU 2.0"]


def test_a_link_that_is_down_is_a_note(npu_machine):
    lines = npu(npu_machine(answers={"hccn_tool -i 1 -link -g": "link status: DOWN\n"}))
    assert of(lines, "links").verdict is Verdict.NOTE and "davinci1 DOWN" in of(lines, "links").text


def test_a_second_cann_is_named(npu_machine, recorded):
    old = {"/usr/local/Ascend/ascend-toolkit/latest/version.cfg": recorded("cann_8.0.0_version.cfg")}
    assert "8.0.0 in /usr/local/Ascend/ascend-toolkit/latest" in of(npu(npu_machine(old)), "CANN copies").text


def test_cann_versions_of_other_layouts(machine, recorded):
    home = "/usr/local/Ascend/ascend-toolkit/latest"
    assert ascend.cann_version(machine({f"{home}/toolkit/version.info": recorded("cann_8.2.RC1_toolkit_version.info")}), home) == "8.2.RC1"
    assert ascend.cann_version(machine({f"{home}/version.cfg": recorded("cann_8.0.0_version.cfg")}), home) == "8.0.0"


GPU_FACTS = {**FACTS, "torch": "2.13.0+cu126", "cuda": "12.6", "architectures": ["sm_70", "sm_80"], "gpus": [V100]}


@pytest.mark.parametrize(
    "smi, changes, names, words",
    [
        ("nvidia_smi_v100.txt", {}, [], ""),
        ("nvidia_smi_v100.txt", {"architectures": ["sm_75", "sm_80"]}, ["torch + GPU"], "cu126"),
        ("nvidia_smi_v100.txt", {"architectures": ["sm_75"], "gpus": []}, ["torch + GPU", "torch"], "cu126"),
        ("nvidia_smi_v100.txt", {"cuda": "13.0"}, ["CUDA + driver"], "cu126"),
        ("nvidia_smi_h100.txt", {"cuda": None}, ["torch"], "cu130"),
        ("nvidia_smi_v100.txt", {"cuda": None}, ["torch"], "cu126"),
    ],
)
def test_gpus(machine, recorded, smi, changes, names, words):
    lines = nvidia.lines(machine(answers={"nvidia-smi": recorded(smi)}), {**GPU_FACTS, **changes}, wanted=False)
    assert wrong(lines) == names
    assert words in "".join(line.fix for line in lines if line.verdict is Verdict.WRONG)


def test_gpu_links(machine, recorded):
    two = recorded("nvidia_smi_h100.txt")
    row = next(line for line in two.splitlines() if "|   0  NVIDIA" in line)
    memory = next(line for line in two.splitlines() if "MiB /" in line)
    two = two.replace(memory, f"{memory}\n{row.replace('|   0 ', '|   1 ')}\n{memory}", 1)
    found = nvidia.lines(
        machine(answers={"nvidia-smi": two, "nvidia-smi topo -m": recorded("nvidia_topo_pcie.txt")}), GPU_FACTS, wanted=False
    )
    assert of(found, "links").verdict is Verdict.NOTE and "PHB (1 pairs)" in of(found, "links").text


def test_no_gpu(machine):
    assert wrong(nvidia.lines(machine(), FACTS, wanted=True)) == ["nvidia-smi"]
    assert [line.verdict for line in nvidia.lines(machine(), FACTS, wanted=False)] == [Verdict.OK]
    failed = machine(answers={"nvidia-smi": Answer(18, "Failed to initialize NVML: Driver/library version mismatch\n")})
    assert wrong(nvidia.lines(failed, FACTS, wanted=False)) == ["nvidia-smi"]


NO_CANN = "RuntimeError: Failed to load the backend extension: torch_npu. <- ImportError: libhccl.so: cannot open shared object file"


def test_torch_npu_that_keeps_torch_from_loading():
    facts = {**FACTS, "plain_error": NO_CANN, "npu_error": "ImportError: libhccl.so: cannot open shared object file"}
    here, elsewhere = (torch_probe.lines(facts, npu_wanted=wanted) for wanted in (True, False))
    assert wrong(here) == ["torch_npu"] and "set_env.sh" in here[-1].fix
    assert wrong(elsewhere) == [] and "pip uninstall torch-npu" in elsewhere[-1].fix and "plain `import torch` fails" in elsewhere[-1].text


def test_torch_npu_that_does_not_load_beside_a_torch_that_does():
    facts = {**FACTS, "npu_error": "ImportError: libhccl.so: cannot open shared object file"}
    assert wrong(torch_probe.lines(facts, npu_wanted=False)) == []
    asked = torch_probe.lines(facts, npu_wanted=True)
    assert wrong(asked) == ["torch_npu"] and "set_env.sh" in asked[-1].fix and "plain" not in asked[-1].text


def test_torch_that_does_not_load_or_computes_wrongly():
    assert wrong(torch_probe.lines({"torch_error": "ImportError: libc10.so"}, npu_wanted=False)) == ["import"]
    good = {**FACTS, "torch_npu": "2.13.0", "npus": ["Ascend910B2"], "npu_sum": 8.0}
    assert wrong(torch_probe.lines(good, npu_wanted=True)) == []
    assert wrong(torch_probe.lines({**good, "npu_sum": 7.0}, npu_wanted=True)) == ["torch_npu"]
    assert wrong(torch_probe.lines({**good, "npus": []}, npu_wanted=True)) == ["torch_npu"]


def test_the_users_own_autoload_is_told_from_llmtrains(tmp_path, monkeypatch):
    monkeypatch.setenv(AUTOLOAD, "0")
    started = tmp_path / "environ"
    started.write_bytes(b"A=b\0PATH=/bin\0")
    assert AUTOLOAD not in users_environment(started)
    started.write_bytes(f"A=b\0{AUTOLOAD}=0\0".encode())
    assert users_environment(started)[AUTOLOAD] == "0"


def install(folder: Path, name: str, version: str, *files: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("")


@pytest.fixture
def site(tmp_path):
    """A folder with a sound torch."""
    install(tmp_path / "site", "torch", "2.13.0", "torch/__init__.py")
    return tmp_path / "site"


def test_sound_packages(site):
    lines = packages.lines([str(site)])
    assert wrong(lines) == [] and of(lines, "torch").text == "2.13.0"
    assert wrong(packages.lines([str(site / "empty")])) == ["torch"]


@pytest.mark.parametrize("hiding", ["torch/__init__.py", "torch.py"])
def test_a_local_torch_hides_the_package(site, tmp_path, hiding):
    (tmp_path / "here" / hiding).parent.mkdir(parents=True)
    (tmp_path / "here" / hiding).write_text("")
    lines = packages.lines([str(tmp_path / "here"), str(site)])
    assert wrong(lines) == ["torch"] and str(tmp_path / "here" / "torch") in lines[-1].text
    assert wrong(packages.lines([str(site), str(tmp_path / "here")])) == []


def test_a_local_folder_without_code_hides_nothing(site, tmp_path):
    (tmp_path / "here/torch").mkdir(parents=True)
    assert wrong(packages.lines([str(tmp_path / "here"), str(site)])) == []


def test_a_local_kernels_folder_hides_the_package_only_if_it_is_installed(site, tmp_path):
    (tmp_path / "here/kernels").mkdir(parents=True)
    (tmp_path / "here/kernels/__init__.py").write_text("")
    assert wrong(packages.lines([str(tmp_path / "here"), str(site)])) == []
    install(site, "kernels", "0.10", "kernels/__init__.py")
    assert wrong(packages.lines([str(tmp_path / "here"), str(site)])) == ["kernels"]


def test_two_copies(site, tmp_path):
    install(tmp_path / "user", "torch", "2.12.0", "torch/__init__.py")
    lines = packages.lines([str(tmp_path / "user"), str(site)])
    assert wrong(lines) == ["torch"] and "2.12.0 in" in of([ln for ln in lines if ln.verdict is Verdict.WRONG], "torch").text
    install(site, "torch", "2.11.0")
    assert "2 copies" in next(line.text for line in packages.lines([str(site)]) if line.verdict is Verdict.WRONG)


def test_both_tritons(site):
    install(site, "triton", "3.9.0", "triton/__init__.py")
    assert wrong(packages.lines([str(site)])) == []
    install(site, "triton-ascend", "3.6.0")
    assert wrong(packages.lines([str(site)])) == ["triton"]


@pytest.mark.parametrize(
    ("version", "npu", "verdict", "words"),
    [
        ("0.16.1", False, Verdict.OK, "runs megatron-core 0.16.1"),
        ("0.19.2", False, Verdict.NOTE, "megatron-core==0.16.1"),
        ("0.12.1", True, Verdict.NOTE, "pins megatron-core 0.12.1, which is installed"),
        ("0.16.1", True, Verdict.NOTE, "pins megatron-core 0.12.1, not 0.16.1"),
    ],
)
def test_versions_of_megatron_core(site, version, npu, verdict, words):
    install(site, "megatron-core", version)
    if npu:
        install(site, "torch-npu", "2.13.0")
    line = of(packages.lines([str(site)]), "engine megatron")
    assert line.verdict is verdict and words in line.text


def test_the_wrong_apex(site):
    install(site, "apex", "0.9.10", "apex/__init__.py")
    lines = packages.lines([str(site)])
    assert wrong(lines) == ["apex"] and "web toolkit" in lines[-1].text
    (site / "apex/optimizers").mkdir()
    assert wrong(packages.lines([str(site)])) == []


@pytest.mark.parametrize(
    "seconds, precision, verdict",
    [(0.2, 0.01, Verdict.OK), (-1.5, 0.01, Verdict.NOTE), (1.5, 1.0, Verdict.OK), (31.0, 0.1, Verdict.WRONG), (-3600, 1, Verdict.WRONG)],
)
def test_clocks(seconds, precision, verdict):
    assert clock.verdict("of node7", seconds, precision=precision).verdict is verdict


def test_the_file_systems_clock(tmp_path, monkeypatch):
    assert clock.file_system(tmp_path).verdict is Verdict.OK and not list(tmp_path.iterdir())
    true = clock.time.time
    monkeypatch.setattr(clock.time, "time", lambda: true() + 100)
    assert clock.file_system(tmp_path).verdict is Verdict.WRONG
    assert clock.file_system(tmp_path / "missing").verdict is Verdict.NOTE


def result(rank, *, right=True, world=2, clocks=()):
    outcome = {"all_reduce": {"right": True, "seconds": 0.001}, "all_to_all": {"right": right, "seconds": 0.002}}
    nodes = [{"host": f"node{r}", "local": "0", "lines": [{"verdict": "OK", "name": str(r)}]} for r in range(world)]
    return {"rank": rank, "world": world, "collectives": outcome, "nodes": nodes, "clocks": dict(clocks)}


def test_results_of_the_collective_test():
    good = smoke.judge("cpu", 2, [result(0, clocks={"node1": [40.0, 0.001]}), result(1)], "")
    assert [line.verdict for line in good.lines] == [Verdict.OK, Verdict.WRONG] and good.lines[1].name == "of node1"
    assert list(good.others) == ["node1"]
    bad = smoke.judge("npu", 2, [result(0), result(1, right=False)], "")
    assert wrong(bad.lines) == ["hccl, 2 ranks"] and "all_to_all" in bad.lines[0].text
    lost = smoke.judge("npu", 2, [result(0)], "RuntimeError: EI0006: Getting socket times out.\nsome more")
    assert wrong(lost.lines) == ["hccl, 2 ranks"] and "HCCL_CONNECT_TIMEOUT" in lost.lines[0].fix


def test_permissions(npu_machine):
    if os.getuid() == 0:
        pytest.skip("root may open every file")
    machine = npu_machine()
    machine.at("/dev/davinci0").chmod(0)
    assert wrong(npu(machine)) == ["devices"]
