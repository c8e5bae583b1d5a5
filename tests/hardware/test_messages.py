"""Known error texts are found, each by its own entry, and ordinary errors are left alone."""

from pathlib import Path

import pytest

from llmtrain.hardware import messages
from llmtrain.hardware.messages import MESSAGES, explain, explain_error, find

ROOT = Path(__file__).parents[2]

# Whole texts from public reports: what is found in each, and nothing else.
REPORTS = {
    "EI0006": """[rank1]: RuntimeError: InnerRunOpApi:OpParamMaker.cpp:281 OPS function error: HcclAllreduce, error code is 6
[rank1]: [ERROR] 2025-04-08-18:07:20 (PID:1292363, Device:1, RankID:1) ERR01100 OPS call acl api failed.
[rank1]: EI0006: [PID: 1292363] 2025-04-08-18:07:20.444.436 Getting socket times out. Reason: Remote Rank did not send the data in time.""",
    "507015": """RuntimeError: NPUStream.cpp:506 NPU function error: AclrtSynchronizeDeviceWithTimeout, error code is 507015
[ERROR] 2025-11-08-21:35:27 (PID:1234255, Device:0, RankID:-1) ERR00100 PTA call acl api failed
[Error]: The aicore execution is abnormal.
        Rectify the fault based on the error information in the ascend log.
EZ9999: Inner Error!
EZ9999: [PID: 1234255] 2025-11-08-21:35:27.904.479 The error from device(chipId:7, dieId:0), serial number is 134""",
    "207001": """NPU function error: aclrtMemcpy, error code is 507899
EL0004: [PID: 28794] 2025-08-26-03:58:55.257.127 Failed to allocate memory.
        Possible Cause: Available memory is insufficient.
        malloc physical memory failed, runtime result = 207001[FUNC:ReportCallError]""",
    "507014": """[ERROR] aclrtSynchronizeStream(stream) failed: 507014 (main.cpp:84)
[ERROR] RecentErrMsg: EZ9999: Inner Error!
       Kernel task happen error, retCode=0x25, [aicore timeout].[FUNC:PreCheckTaskErr][FILE:davinci_kernel_task.cc][LINE:1729]""",
    "torch_npu without CANN": "RuntimeError: Failed to load the backend extension: torch_npu. You can disable extension auto-loading with "
    "TORCH_DEVICE_BACKEND_AUTOLOAD=0.",
    "coreDim": "RuntimeError: grid should be less than 65536!",
}  # fmt: skip

ORDINARY = [
    "IndexError: index 507015 is out of range for tensor of size 207001",
    "ValueError: sequence length 107002 exceeds 65535",
    "RuntimeError: The size of tensor a (5) must match the size of tensor b (6) at non-singleton dimension 0",
    "KeyError: 'EI'",
    "FileNotFoundError: [Errno 2] No such file or directory: '/data/EI00/shard-507015.bin'",
    "OSError: [Errno 28] No space left on device: 'runs/x/checkpoints'",
    "llmtrain: model.vocab_size: 507015 is larger than the tokenizer's 32000",
    "loss 11.2 step 507015 result 3",
    "ImportError: /lib/libfoo.so: undefined symbol: _ZN3fooEv",
    "ValueError: Watchdog caught nothing",
    "torch.distributed.DistStoreError: Timed out after 61 seconds waiting for clients. 1/2 clients joined.",
    "",
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.name)
def test_each_sample_is_found_by_its_entry_alone(message):
    assert [found.name for found in find(message.sample)] == [message.name]
    assert message.source and message.meaning.endswith(".") and message.advice.endswith((".", ")")) and "  " not in message.advice


@pytest.mark.parametrize("name", REPORTS)
def test_texts_of_real_reports(name):
    assert [found.name for found in find(REPORTS[name])] == [name]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_errors_are_left_alone(text):
    assert explain(text) is None


def test_names_are_unique():
    assert len({message.name for message in MESSAGES}) == len(MESSAGES)


def test_the_issues_codes_are_known():
    assert {"EI0002", "EI0006", "EZ9999", "507015", "ub overflow", "coreDim"} <= {message.name for message in MESSAGES}


def test_an_error_is_explained_with_its_causes_but_not_its_source_lines():
    try:
        try:
            raise RuntimeError("EI0006: Getting socket times out.")
        except RuntimeError as error:
            raise ValueError("the step failed") from error
    except ValueError as error:
        assert "HCCL could not connect" in explain_error(error)
    try:
        "EI0006: this line of source is in the traceback only".index("y", 999)
    except ValueError as error:
        assert explain_error(error) is None


def test_at_most_some_are_shown():
    assert explain("\n".join(message.sample for message in MESSAGES)).count(messages.HEADING) == messages.LIMIT


def test_the_page_is_the_table():
    """docs/messages.md is made by `python -m llmtrain.hardware.messages`."""
    page = (ROOT / "docs/messages.md").read_text()
    assert messages.page() == page, "docs/messages.md is stale: run `python -m llmtrain.hardware.messages > docs/messages.md`"
