"""What DeepSpeed keeps in files (`engine.offload_optimizer nvme`, `engine.offload_params nvme`): where, and in which order."""

import atexit
import shutil
import tempfile
from collections.abc import Mapping

from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError

SWAPPED = 1024**2 // 4
"""Elements that a rank has of a parameter from which on DeepSpeed may swap it, by itself and its gradient."""
ALIGNED = 256
"""Elements of which these have to be a multiple: reads past the cache of the system go to addresses that are multiples of 512 bytes."""


def own_folder(cfg: RunConfig) -> str | None:
    """A folder of this process, removed when it ends; None if nothing is offloaded to files."""
    if not cfg.engine.swaps:
        return None
    folder = tempfile.mkdtemp(prefix="llmtrain-", dir=cfg.engine.nvme_path)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def in_order(sizes: Mapping[str, int], *, ranks: int) -> list[str]:
    """Names of parameters, the largest first, for optimizers that are swapped.

    DeepSpeed 0.19.8 reads the gradient of a large parameter straight to its place in a group. Where what comes before it in the group was
    not aligned, gradients were wrong without a word. Raises UserError for a large parameter that would put the next one there.
    """
    parts = {name: -(-size // ranks) for name, size in sizes.items()}
    for name, part in parts.items():
        if part >= SWAPPED and part % ALIGNED:
            raise UserError(
                f"engine deepspeed: offloading to nvme: {name} has {part} elements on each of {ranks} ranks, which is no multiple of "
                f"{ALIGNED}, so that files could not be read to where DeepSpeed wants them; change the number of ranks, or offload to cpu"
            )
    return sorted(parts, key=lambda name: -parts[name])
