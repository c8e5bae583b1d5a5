"""A process in which torch_npu's own C++ runs up to the kernels, which do nothing: prints as JSON which cases and faults it refuses."""

import json
import sys

import stand_in

stand_in.start(kernels=False)

import torch  # noqa: E402
from checks import between  # noqa: E402
from collective_cases import CASES  # noqa: E402

from llmtrain.compat import fake_world  # noqa: E402

FAULTS = {
    "rows of three dims": lambda args, options: ([args[0][None], *args[1:]], options),
    "matrices of too few dims": lambda args, options: ([args[0], args[1][0], *args[2:]], options),
}


def refusal(case) -> str:
    """The first line of the refusal, or nothing."""
    try:
        case.call(lambda *sizes: torch.ones(sizes, dtype=torch.bfloat16, device="npu"))
    except Exception as error:  # whatever the C++ throws is the finding
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return ""


def faulty(case, fault) -> str:
    with between(lambda name, operator: lambda *args, **options: (lambda a, o: operator(*a, **o))(*fault(list(args), options))):
        return refusal(case)


torch.set_num_threads(1)
first = {case.wrapper: case for case in reversed(CASES)}
with fake_world(0, 2):
    found = {case.name: refusal(case) for case in CASES}
    found |= {f"{case.wrapper}: {name}": faulty(case, fault) for case in first.values() for name, fault in FAULTS.items()}
json.dump(found, sys.stdout)
