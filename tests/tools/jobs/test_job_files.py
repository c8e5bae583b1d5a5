"""What the job files say: shells and Kubernetes accept them, the mesh is the run's, the environment is explained line by line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from job_files import ROOT

from llmtrain.errors import UserError

DEVICES = ("cpu", "cuda", "npu")


def shell_of(text: str) -> str:
    """The script of a job file, which in a Kubernetes one is an argument of bash."""
    if not text.startswith("#!"):
        job = list(yaml.safe_load_all(text))[1]
        return "#!/usr/bin/env bash\n" + job["spec"]["template"]["spec"]["containers"][0]["args"][0]
    return text


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["torchrun", "slurm", "kubernetes"])
def test_shells_accept_the_script(write, tmp_path, kind, device):
    script = tmp_path / "script.sh"
    script.write_text(shell_of(write(kind, "--device", device, "--nodes", "2", "--per-node", "8").read_text()))
    check = [str(Path(sys.executable).with_name("shellcheck")), str(script)]
    for command in (["bash", "-n", str(script)], check):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["torchrun", "slurm", "kubernetes"])
def test_every_variable_is_explained(write, kind, device):
    lines = [line.strip() for line in shell_of(write(kind, "--device", device, "--nodes", "2").read_text()).splitlines()]
    exports = [n for n, line in enumerate(lines) if line.startswith("export ")]
    assert exports and all(re.match(r"# [\w'-]", lines[n - 1]) for n in exports)
    names = {lines[n].split()[1].split("=")[0] for n in exports}
    only_npu = {name for name in names if name.startswith(("HCCL_", "ASCEND_", "PYTORCH_NPU"))}
    only_cuda = {name for name in names if name.startswith("NCCL_") or name == "PYTORCH_ALLOC_CONF"}
    assert bool(only_npu) == (device == "npu") and bool(only_cuda) == (device == "cuda")


def test_kubernetes_accepts_the_job(write, tmp_path):
    import kubernetes_validate

    for device, resource in (("cpu", None), ("cuda", "nvidia.com/gpu"), ("npu", "huawei.com/Ascend910")):
        text = write(
            "kubernetes", "--device", device, "--nodes", "4", "--per-node", "8", "--claim", "work", "--namespace", "train"
        ).read_text()
        service, job = yaml.safe_load_all(text)
        for document in (service, job):
            kubernetes_validate.validate(document, "1.29", strict=True)
        spec, pod = job["spec"], job["spec"]["template"]["spec"]
        assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 4
        assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]} and service["spec"]["clusterIP"] == "None"
        assert pod["subdomain"] == service["metadata"]["name"] and service["metadata"]["namespace"] == "train"
        limits = pod["containers"][0]["resources"].get("limits", {})
        assert limits == ({resource: 8} if resource else {})
        mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]} and {"shm", "work"} <= mounts
        assert ("driver" in mounts) == (device == "npu")
        assert f"--master-addr {job['metadata']['name']}-0.{service['metadata']['name']} " in pod["containers"][0]["args"][0]


def test_kubernetes_refuses_a_wrong_name(write):
    with pytest.raises(UserError, match="--job-name"):
        write("kubernetes", "--device", "cpu", "--job-name", "My_Run")


def test_slurm_asks_for_the_mesh(write):
    text = write("slurm", "--device", "cuda", "--nodes", "16", "--partition", "gpu", "--time", "08:00:00").read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", text, re.MULTILINE))
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gres"], asked["partition"], asked["time"]) == (
        "16",
        "8",
        "gpu:8",
        "gpu",
        "08:00:00",
    )
    assert "16 nodes x 8 cuda = 128 ranks: dp_shard 128" in text
    assert "--guards.deadline=slurm" in text and "#SBATCH --requeue" not in text and "scontrol" not in text
    again = write("slurm", "--device", "npu", "--requeue", "--gres", "ascend:8").read_text()
    assert "#SBATCH --requeue" in again and 'scontrol requeue "$SLURM_JOB_ID"' in again and "--gres=ascend:8" in again


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cuda", "--nodes", "2", "--parallel.dp_shard", "4"], r"= 4 ranks, 16 were started"),
        (
            ["--device", "cuda", "--parallel.tp", "3", "--nodes", "3", "--per-node", "1"],
            r"parallel.tp 3 does not divide model.attention.heads 32",
        ),
        (["--device", "npu", "--nodes", "3"], r"global_batch"),
        (["--nodes", "2"], r"--device cpu\|cuda\|npu"),
        (["--device", "cpu", "--nodes", "0"], "at least 1"),
        (["--device", "cpu", "--train.stepz", "3"], "stepz"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(write, words, said, tmp_path):
    with pytest.raises(UserError, match=said):
        write("slurm", *words)
    assert not list(tmp_path.glob("job-*"))


def test_hosts_find_their_numbers(write):
    with pytest.raises(UserError, match="--hosts names 1 machines, --nodes is 2"):
        write("torchrun", "--device", "cpu", "--nodes", "2", "--hosts", "a")
    text = write("torchrun", "--device", "cpu", "--nodes", "2", "--hosts", "a,b").read_text()
    assert "master=a\n" in text and "hosts=(a b)" in text


def test_a_file_is_not_written_over(write, tmp_path):
    (tmp_path / "job-0").write_text("mine")
    from llmtrain.tools.jobs.verb import main

    words = ["slurm", "-c", str(ROOT / "configs" / "llama3_8b.yaml"), "--device", "cpu", "--out", "job-0"]
    with pytest.raises(UserError, match="--force"):
        main(words)
    assert (tmp_path / "job-0").read_text() == "mine"
    assert main([*words, "--force"]) == 0 and "sbatch" in (tmp_path / "job-0").read_text()


def test_hccl_numbers_follow_the_run(write):
    text = write("slurm", "--device", "npu", "--parallel.timeout", "3000", "--train.micro_batch", "4", "--interface", "bond0").read_text()
    values = dict(re.findall(r"^export (\w+)=(\S+)", text, re.MULTILINE))
    assert int(values["HCCL_EXEC_TIMEOUT"]) > 3000 and 120 <= int(values["HCCL_CONNECT_TIMEOUT"]) <= 7200
    assert values["HCCL_BUFFSIZE"] == str(4 * 8192 * 4096 * 2 // 2**20)  # micro-batch x sequence x width x bytes of bf16
    assert values["HCCL_SOCKET_IFNAME"] == values["GLOO_SOCKET_IFNAME"] == "bond0"
    named = write("slurm", "--device", "npu", "--parallel.hccl_buffer_mb", "64").read_text()
    assert "export HCCL_BUFFSIZE=64\n" in named
