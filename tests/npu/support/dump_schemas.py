"""The schemas of torch_npu's `npu::` operators as text, one a line: what call sites are compared with for versions that are not installed.

    pip download --no-deps torch-npu==2.14.0
    python tests/npu/support/dump_schemas.py torch_npu-2.14.0-*.whl tests/npu/schemas

They are read out of the library in the wheel, which holds them as the text that it registers, and printed by torch's own parser. So neither
the torch that the wheel was built for nor CANN is needed, only some torch. Operators that torch_npu registers from Python are left out.
"""

import re
import sys
import zipfile
from pathlib import Path

LIBRARY = "torch_npu/lib/libtorch_npu.so"
SCHEMA = re.compile(rb"\x00([A-Za-z_]\w*(?:\.\w+)?\([^\x00]*\) ?-> ?[^\x00]+)(?=\x00)")


def schemas(library: bytes) -> list[str]:
    """Every schema of an operator in the bytes of libtorch_npu.so, as `str(schema)` has it, sorted.

    Text that only looks like one (messages with C++ calls) does not parse and is passed over. Operators on torch_npu's class of process
    groups are of another namespace.
    """
    import torch

    found = set()
    for text in SCHEMA.findall(library):
        if b"ProcessGroupHCCL" in text:
            continue
        try:
            found.add(str(torch._C.parse_schema("npu::" + text.decode())))
        except RuntimeError:
            continue
    return sorted(found)


def main(wheel: str, folder: str) -> None:
    """Write the schemas in the file `wheel` to `folder`/torch_npu-VERSION.txt and say how many there are."""
    path = Path(folder) / f"torch_npu-{Path(wheel).name.split('-')[1]}.txt"
    with zipfile.ZipFile(wheel) as archive:
        lines = schemas(archive.read(LIBRARY))
    path.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} schemas -> {path}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(f"usage: python {sys.argv[0]} WHEEL FOLDER")
    main(*sys.argv[1:])
