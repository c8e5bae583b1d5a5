"""The model: blocks, initialisation, objectives. No collective and no device name in here."""

from llmtrain.model import transformer  # noqa: F401 (registers the built-in family)
from llmtrain.model.cache import KVCache
from llmtrain.model.family import build, register_family
from llmtrain.model.init import canonical_name, initialise, measure_branch_std, set_post_norm_gamma
from llmtrain.model.objective import Objective, ascent, cross_entropy

__all__ = [
    "KVCache",
    "Objective",
    "ascent",
    "build",
    "canonical_name",
    "cross_entropy",
    "initialise",
    "measure_branch_std",
    "register_family",
    "set_post_norm_gamma",
]
