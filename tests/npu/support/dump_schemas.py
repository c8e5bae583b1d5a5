"""The schemas of torch_npu's `npu::` operators as text, one a line: what call sites are compared with for versions that are not installed.

`python tests/npu/support/dump_schemas.py OUT` writes those of the torch_npu of this environment; OUT is a file, or a folder that gets
`torch_npu-VERSION.txt`. Needs gcc, torch_npu and the torch that it was built for; no CANN.
"""

import importlib.metadata
import os
import sys
from pathlib import Path


def schemas() -> list[str]:
    """Every schema of an operator `npu::*` that this process has registered, as torch prints it, by name and overload."""
    import torch

    known = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("npu::")]
    return [str(schema) for schema in sorted(known, key=lambda schema: (schema.name, schema.overload_name))]


def main(out: str) -> None:
    """Write the schemas to `out` and say how many there are."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    import cann_stubs

    cann_stubs.load()
    import torch_npu  # noqa: F401  registers the operators

    lines = schemas()
    path = Path(out)
    if path.is_dir():
        path /= f"torch_npu-{importlib.metadata.version('torch_npu')}.txt"
    path.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} schemas -> {path}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python {sys.argv[0]} OUT")
    main(sys.argv[1])
