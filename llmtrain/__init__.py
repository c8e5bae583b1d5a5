"""llmtrain: train large language models from one YAML on CPUs, CUDA GPUs and Ascend NPUs."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmtrain.api import RunResult, generate, run
    from llmtrain.config.run import RunConfig
    from llmtrain.errors import UserError
    from llmtrain.tools.open_model import open_model

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
