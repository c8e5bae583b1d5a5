"""NVIDIA's disassembler of CUDA 12.4, the last that we found on the package index to know sm_70: it lies in the wheel of triton 3.2.0.

Run as a script it puts cuobjdump and nvdisasm into the environment of the Python that runs it; triton is not installed.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(sys.prefix) / "cuda-12.4-tools"
NAMES = ("cuobjdump", "nvdisasm")
WHEEL = ["triton==3.2.0", "--no-deps", "--only-binary=:all:", "--python-version=3.11", "--platform=manylinux2014_x86_64"]


def tool(name: str) -> Path | None:
    """Where a tool is, or None."""
    path = FOLDER / name
    return path if path.exists() else None


def run(name: str, *arguments: object) -> str:
    """What a tool prints."""
    return subprocess.run([FOLDER / name, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def fetch() -> None:
    """Download the wheel and keep the two programs."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder, *WHEEL], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        FOLDER.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in NAMES:
                (FOLDER / name).write_bytes(archive.read(f"triton/backends/nvidia/bin/{name}"))
                (FOLDER / name).chmod(0o755)


if __name__ == "__main__":
    if not all(map(tool, NAMES)):
        fetch()
