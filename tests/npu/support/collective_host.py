"""A process in which torch_npu's own C++ runs up to the kernels, which do nothing: prints as JSON which cases and faults it refuses."""

import json
import sys

import stand_in

stand_in.start(kernels=False)

import torch  # noqa: E402
from checks import between  # noqa: E402
from collective_cases import CASES  # noqa: E402
from collective_faults import FAULTS  # noqa: E402

from llmtrain.compat import fake_world  # noqa: E402


def refusal(case) -> str:
    """The first line of the refusal, or nothing."""
    try:
        case.call(lambda *sizes: torch.ones(sizes, dtype=torch.bfloat16, device="npu"))
    except Exception as error:  # whatever the C++ throws is the finding
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return ""


def faulty(fault) -> str:
    """The first refusal of a call of the operators that have the fault."""
    with between(fault.change):
        return next(filter(None, (refusal(case) for case in CASES if case.wrapper in fault.wrappers)), "")


torch.set_num_threads(1)
with fake_world(0, 2):
    found = {case.name: refusal(case) for case in CASES}
    found |= {fault.name: faulty(fault) for fault in FAULTS}
json.dump(found, sys.stdout)
