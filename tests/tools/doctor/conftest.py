"""A machine made of recorded files and answers."""

import os
from pathlib import Path

import pytest

from llmtrain.tools.doctor.machine import Answer, Machine

RECORDED = Path(__file__).parent / "recorded"


class FakeMachine(Machine):
    """Files below a folder, answers of tools by the command's words."""

    def __init__(self, root, answers, env):
        super().__init__(root=root, env=env)
        object.__setattr__(self, "answers", answers)

    def run(self, command, *, patience=20.0):
        return self.answers.get(" ".join([os.path.basename(command[0]), *command[1:]]), Answer(None))


@pytest.fixture
def recorded():
    """The text of a recorded output."""
    return lambda name: (RECORDED / name).read_text()


@pytest.fixture
def machine(tmp_path):
    """`machine(files={path: text}, answers={command: text or Answer}, env={})`."""

    def make(files=(), answers=(), env=()):
        for path, text in dict(files).items():
            place = tmp_path / path.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        replies = {name: text if isinstance(text, Answer) else Answer(0, text) for name, text in dict(answers).items()}
        return FakeMachine(tmp_path, replies, {"HOME": "/root", **dict(env)})

    return make


@pytest.fixture
def npu_machine(machine, recorded):
    """A server with 8 x 910B3, driver 25.0.rc1.1, CANN 8.5.0 and its set_env.sh run; `**changes` replace files or variables."""

    def make(files=(), env=(), answers=()):
        home = "/usr/local/Ascend/cann"
        everything = {
            "/usr/local/Ascend/driver/version.info": recorded("driver_25.0.rc1.1.info"),
            "/usr/local/Ascend/firmware/version.info": recorded("firmware_7.7.0.1.231.info"),
            f"{home}/aarch64-linux/ascend_toolkit_install.info": recorded("cann_8.5.0_install.info"),
            f"{home}/set_env.sh": "",
            **{f"/dev/{name}": "" for name in ("davinci0", "davinci1", "davinci_manager", "devmm_svm", "hisi_hdc")},
            **dict(files),
        }
        variables = {"ASCEND_TOOLKIT_HOME": home, "ASCEND_HOME_PATH": home, "LD_LIBRARY_PATH": f"{home}/lib64", **dict(env)}
        replies = {"npu-smi info": recorded("npu_smi_910b3.txt"), "hccn_tool -i 0 -link -g": recorded("hccn_link_up.txt"), **dict(answers)}
        return machine(
            {name: text for name, text in everything.items() if text is not None}, replies, {k: v for k, v in variables.items() if v}
        )

    return make
