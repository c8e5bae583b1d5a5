"""What the package promises of its own source: no patches of torch, private torch names in one file, torch_npu in one file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("llmtrain/**/*.py"), *ROOT.glob("kernels/**/*.py")])
PATCHED = {"torch", "torch_npu"}
NPU_LOADERS = {Path("llmtrain/device/npu.py"), Path("llmtrain/tools/doctor/torch_child.py")}


def dotted(node):
    """`a.b.c` as a list, or nothing for other expressions."""
    if isinstance(node, ast.Attribute):
        start = dotted(node.value)
        return [*start, node.attr] if start else []
    return [node.id] if isinstance(node, ast.Name) else []


def imports(tree):
    """Local name -> full module path, for what comes from torch or torch_npu; and every full path imported."""
    names, paths = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                paths.append(alias.name)
                names[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                paths.append(f"{node.module}.{alias.name}")
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    ours = {name: path for name, path in names.items() if path.split(".")[0] in PATCHED}
    return ours, [path for path in paths if path.split(".")[0] in PATCHED]


def violations(source, *, may_be_private=False):
    """Lines that patch torch, and lines that use a private name of it."""
    tree = ast.parse(source)
    names, paths = imports(tree)
    found = [f"private {path}" for path in paths if not may_be_private and any(part.startswith("_") for part in path.split("."))]
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else []
        for target in targets:
            path = dotted(target)
            if len(path) > 1 and path[0] in names:
                found.append(f"line {node.lineno} assigns {'.'.join(path)}")
        if isinstance(node, ast.Call) and dotted(node.func) in (["setattr"], ["delattr"]) and (dotted(node.args[0]) or [""])[0] in names:
            found.append(f"line {node.lineno} sets an attribute of {'.'.join(dotted(node.args[0]))}")
        path = dotted(node) if isinstance(node, ast.Attribute) else []
        private = [part for part in path[1:] if part.startswith("_") and not part.startswith("__")]
        if path and path[0] in names and private and not may_be_private:
            found.append(f"line {node.lineno} uses {'.'.join(path)}")
    return found


def loads_torch_npu(source):
    """Whether a file imports torch_npu, by a statement or by its name."""
    tree = ast.parse(source)
    named = [node.args[0] for node in ast.walk(tree) if isinstance(node, ast.Call) and dotted(node.func)[-1:] == ["import_module"]]
    names = [node.value for node in named if isinstance(node, ast.Constant)] + imports(tree)[1]
    return any(str(name).split(".")[0] == "torch_npu" for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source(path):
    assert violations(path.read_text(), may_be_private=path.name == "compat.py") == []
    assert not loads_torch_npu(path.read_text()) or path.relative_to(ROOT) in NPU_LOADERS


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.nn.Linear.forward = print",
        "import torch.nn.functional as F\nF.softmax = None",
        "import torch\nsetattr(torch.cuda, 'x', 1)",
        "import torch\ntorch._C._x()",
        "from torch.distributed._tensor import DTensor",
        "from torch.optim import AdamW\nAdamW.step = None",
    ],
)
def test_the_check_finds(source):
    assert violations(source)


def test_imports_of_torch_npu_are_found():
    assert loads_torch_npu("import torch_npu.npu") and loads_torch_npu("import importlib\nimportlib.import_module('torch_npu')")
    assert not loads_torch_npu("text = 'import torch_npu'")
