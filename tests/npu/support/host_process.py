"""A process in which torch_npu's own C++ runs up to the kernels, which do nothing: prints as JSON which cases and mutations it refuses."""

import json
import sys

import stand_in

stand_in.start(kernels=False)

import torch  # noqa: E402
from cases import BY_NAME, CASES  # noqa: E402
from checks import between, run_through  # noqa: E402
from mutations import MUTATIONS  # noqa: E402


def refusal(case, change) -> str:
    """The first line of the refusal, or nothing."""
    try:
        if change is None:
            for dtype in case.dtypes:
                run_through(case, dtype)
        else:
            with between(change):
                run_through(case, torch.float32)
    except Exception as error:  # whatever the C++ throws is the finding
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return ""


torch.set_num_threads(1)
found = {case.name: refusal(case, None) for case in CASES}
found |= {mutation.name: refusal(BY_NAME[mutation.case], mutation.change) for mutation in MUTATIONS}


def optimizer_refusal() -> str:
    weight = torch.nn.Parameter(torch.ones(3, device="npu"))
    weight.grad = torch.ones_like(weight)
    try:
        torch.optim.AdamW([weight], fused=True).step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


found["adamw"] = optimizer_refusal()
found["adamw kernel"] = torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_adamw_", "PrivateUse1")
json.dump(found, sys.stdout)
