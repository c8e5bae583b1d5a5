"""The same tokens through transformers and through the model here: do the logits agree?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtrain.convert.hf_read import read_config
from llmtrain.device import select
from llmtrain.errors import UserError
from llmtrain.ops import Mask
from llmtrain.tools.model_source import ModelSource
from llmtrain.tools.open_model import empty_model, weights_of

BOUND = 1e-5
"""Largest difference of two logits that counts as equal, relative to the largest logit: fp32 rounding over the depth of a model."""
ROWS, LENGTH, SEED = 2, 128, 1234


@dataclass(frozen=True)
class Comparison:
    """How far two models are apart on the same tokens, in fp32."""

    difference: float
    """Largest absolute difference of a logit."""
    largest: float
    """Largest absolute logit of transformers."""

    @property
    def equal(self) -> bool:
        """Whether the difference is within BOUND of the largest logit; false for NaN."""
        return self.difference <= BOUND * self.largest

    def __str__(self) -> str:
        relative = self.difference / self.largest if self.largest else float("nan")
        return f"logits differ by at most {self.difference:.2e}, {relative:.1e} of the largest ({self.largest:.2f}); allowed {BOUND:.0e}"


@torch.no_grad()
def compare(source: ModelSource, reference: Any) -> Comparison:
    """Logits of `source`, built and run here, against those of transformers' fp32 `reference`, on the CPU, on fixed random tokens."""
    length = min(LENGTH, source.cfg.max_seq_len)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, source.cfg.vocab_size, (ROWS, length), generator=generator)
    expected = reference.eval()(tokens).logits
    got = our_model(source)(tokens, mask=Mask())["logits"]
    return Comparison((got - expected).abs().max().item(), expected.abs().max().item())


@torch.no_grad()
def our_model(source: ModelSource) -> torch.nn.Module:
    """The model of `source` on the CPU in fp32."""
    model = empty_model(source.cfg, select("cpu"), torch.float32)
    weights = weights_of(model)
    for name, tensor in source.weights():
        weights.pop(name).copy_(tensor)
    if weights:
        raise UserError(f"{source.path} lacks {', '.join(sorted(weights)[:5])}")
    return model


def reference_of(folder: Path) -> Any:
    """The Hugging Face folder as transformers loads it, in fp32. An openPangu folder by the classes of `llmtrain.convert.openpangu`."""
    require_transformers()
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if read_config(folder).get("architectures") == ["PanguEmbeddedForCausalLM"]:
        from llmtrain.convert.openpangu import register

        register()
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


@torch.no_grad()
def round_weights(reference: Any, dtype: torch.dtype) -> None:
    """Give every parameter the value that it has after storing in `dtype`; what follows from the configuration stays exact."""
    for parameter in reference.parameters():
        parameter.copy_(parameter.to(dtype))


def require_transformers() -> None:
    """Raise UserError if transformers is not installed."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError("--verify compares with transformers, which is missing: pip install llmtrain[hf]") from None
