"""A GGUF file, dequantised by transformers, under canonical names."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtrain.config.model import ModelConfig
from llmtrain.convert.families import pick_family
from llmtrain.convert.hf_read import model_values
from llmtrain.convert.names import from_hf
from llmtrain.convert.shapes import canonical_shapes
from llmtrain.errors import UserError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
UNREADABLE = (OSError, ValueError, KeyError, NotImplementedError)
"""What transformers raises for a GGUF file, or a part of one, that it does not know."""


@dataclass(frozen=True)
class GGUFModel:
    """What a GGUF file held."""

    cfg: ModelConfig
    weights: dict[str, torch.Tensor]
    """Canonical name -> fp32 tensor."""
    reference: Any
    """transformers' own model, which made the weights."""
    tokenizer: Any
    """transformers' tokenizer; None if the file holds none that it reads."""


def read_gguf(path: str | Path) -> GGUFModel:
    """Read and dequantise a GGUF file; the whole model is in memory, in fp32.

    Raises:
        UserError: transformers, gguf or accelerate is missing; no GGUF file; an architecture that is not one of ARCHITECTURES; tensors
            that transformers leaves out; weights that are not those of the configuration.
    """
    path = Path(path)
    _require_packages()
    _check_file(path)
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}
    with _by_transformers(path):
        config = AutoConfig.from_pretrained(**where).to_dict()
    config.pop("quantization_config", None)
    cfg = ModelConfig.model_validate(model_values(config, where=str(path)))
    with _by_transformers(path):
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    return GGUFModel(cfg, _canonical(model, cfg, path), model, _tokenizer(where))


@contextmanager
def _by_transformers(path: Path) -> Iterator[None]:
    """Name the file in what transformers raises for one that it cannot read."""
    try:
        yield
    except UNREADABLE as error:
        raise UserError(f"{path}: transformers cannot read it: {error}") from error


def _require_packages() -> None:
    for package in ("transformers", "gguf", "accelerate"):
        try:
            importlib.import_module(package)
        except ImportError:
            needed = "a GGUF file is read by transformers, gguf and accelerate"
            raise UserError(f"{needed}; {package} is missing: pip install llmtrain[hf]") from None


def _check_file(path: Path) -> None:
    """Architecture and tensors, from the file's own header: transformers would pass over a RoPE that is stretched by a tensor."""
    from gguf import GGUFReader

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise UserError(f"{path} is cut short or no GGUF file: {error}") from None
    field = reader.get_field("general.architecture")
    architecture = field.contents() if field else None
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: architecture {architecture!r} cannot be imported; allowed: {', '.join(ARCHITECTURES)}")
    if any(tensor.name.startswith("rope_freqs") for tensor in reader.tensors):
        raise UserError(
            f"{path}: its RoPE is stretched by a tensor (rope_freqs), which transformers passes over; allowed: a GGUF file without it, "
            "or the model's Hugging Face folder"
        )


def _canonical(model: Any, cfg: ModelConfig, path: Path) -> dict[str, torch.Tensor]:
    family, shapes = pick_family(cfg), canonical_shapes(cfg)
    weights = {from_hf(name, family): tensor for name, tensor in model.state_dict().items()}
    if cfg.tie_embeddings:
        weights.pop("head.weight", None)
    wrong = sorted(weights.keys() ^ shapes.keys()) or sorted(n for n, shape in shapes.items() if tuple(weights[n].shape) != shape)
    if wrong:
        raise UserError(f"{path} does not hold the weights of its {family} model: {', '.join(wrong[:5])}")
    return weights


def _tokenizer(where: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**where)
    except UNREADABLE as error:
        print(f"{where['gguf_file']}: converted without a tokenizer, which transformers cannot read: {error}", file=sys.stderr)
        return None
