"""llmtrain: train large language models from one YAML on CPUs, CUDA GPUs and Ascend NPUs."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmtrain.api import RunResult, generate, run
    from llmtrain.config.run import RunConfig
    from llmtrain.errors import UserError
    from llmtrain.tools.open_model import open_model

# With torch_npu installed and no CANN, `import torch` fails on loading it. It is loaded when an NPU is asked for (device/npu.py).
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

__version__ = "0.1.0"
__all__ = ["RunConfig", "RunResult", "UserError", "__version__", "generate", "open_model", "run"]

_PLACES = {
    "RunConfig": "llmtrain.config.run",
    "RunResult": "llmtrain.api",
    "UserError": "llmtrain.errors",
    "generate": "llmtrain.api",
    "open_model": "llmtrain.tools.open_model",
    "run": "llmtrain.api",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'llmtrain' has no attribute {name!r}; it has {', '.join(__all__)}")
