"""llmtrain: train large language models from one YAML on CPUs, CUDA GPUs and Ascend NPUs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmtrain.config.run import RunConfig

__version__ = "0.1.0"
__all__ = ["RunConfig", "__version__", "run"]


def run(cfg: "RunConfig") -> int:
    """Pretrain as `cfg` says and return the exit code (0 done, 2 stopped by a signal after saving, 3 stopped by a guard)."""
    from llmtrain.stages import pretrain

    return pretrain.run(cfg)


def __getattr__(name: str) -> Any:
    if name == "RunConfig":
        from llmtrain.config.run import RunConfig

        return RunConfig
    raise AttributeError(f"module 'llmtrain' has no attribute {name!r}")
