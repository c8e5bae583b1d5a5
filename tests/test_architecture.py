"""The house: each floor imports only the floors below it (docs/interfaces.md), and the command line imports no torch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "cli": 9,
    "api": 8,
    "__main__": 9,
    "stages": 6,
    "tools": 6,
    "train": 5,
    "engine": 4,
    "parallel": 3,
    "model": 2,
    "data": 1,
    "ops": 1,
    "simulate": 1,
    "device": 1,
    "plugins": -1,
    "packages": -1,
    "layout": 0,
    "hardware": 0,
    "config": 0,
    "convert": 0,
    "errors": -1,
    "compat": -1,
}
NO_TORCH = ("config", "layout", "hardware", "simulate", "cli", "errors", "plugins", "packages")
FILES = sorted((ROOT / "llmtrain").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Absolute names that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor(path: Path) -> str:
    return path.relative_to(ROOT / "llmtrain").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    own = floor(path)
    if own == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "llmtrain" or len(parts) < 2 or parts[1] not in FLOORS:
            continue
        assert FLOORS[parts[1]] <= FLOORS[own], f"{path.name} on floor {own} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if floor(p) in NO_TORCH], ids=lambda p: str(p.relative_to(ROOT)))
def test_arithmetic_needs_no_torch(path):
    assert not {name for name in imports(path) if name.split(".")[0] == "torch"}


def test_data_and_model_call_no_collective():
    for path in FILES:
        if floor(path) in ("data", "model"):
            text = path.read_text()
            assert "import torch.distributed as" not in text and "torch.distributed.all" not in text, path


def test_kernels_stand_alone():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not {name for name in imports(path) if name.split(".")[0] == "llmtrain"}, path
