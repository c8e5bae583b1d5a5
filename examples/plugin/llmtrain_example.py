"""From outside of llmtrain: a model family, an op, a data source and a stage, each with options of its own."""

from glob import glob
from pathlib import Path
from typing import Literal

import numpy as np
from torch import sigmoid

from llmtrain.config.base import Section
from llmtrain.config.data import Source
from llmtrain.config.extend import register_section
from llmtrain.data.packing import shuffled
from llmtrain.data.sources import register_source
from llmtrain.model.block import Block
from llmtrain.model.family import register_family
from llmtrain.model.transformer import Transformer
from llmtrain.ops import register
from llmtrain.stages import pretrain
from llmtrain.stages.registry import register_stage


class ParallelOptions(Section):
    """Attention and feed-forward branch side by side (GPT-J)."""

    scale: float = 1.0
    """What the feed-forward branch is multiplied by."""


class ParallelBlock(Block):
    def __init__(self, cfg, *, ops):
        super().__init__(cfg, ops=ops)
        self.scale = cfg.parallel.scale

    def after_attention(self, x, attended):  # x [B,S,D], attended [B,H,S,d]
        return x + self.attention.output(attended) + self.scale * self.ffn(self.ffn_norm(x))


register_section("model.parallel", ParallelOptions)


@register_family("parallel")
class ParallelTransformer(Transformer):
    block = ParallelBlock


@register("swiglu", "sigmoid", speed=0)
def swiglu(gate, up):
    return gate * sigmoid(gate) * up


class Bytes(Source):
    kind: Literal["bytes"] = "bytes"
    """The bytes of files as tokens 0..255."""
    files: str
    """Shell pattern of the files."""


@register_source(Bytes)
class ByteSamples:
    def __init__(self, source, *, seq_len, seed, shuffle, cache):
        text = b"\n".join(Path(name).read_bytes() for name in sorted(glob(source.files)))
        self.tokens, self.seq_len, self.seed = np.frombuffer(text, np.uint8), seq_len, seed
        self.samples_per_epoch = (len(text) - 1) // seq_len

    def sample(self, index):
        epoch, place = divmod(index, self.samples_per_epoch)
        first = shuffled(self.samples_per_epoch, self.seed, epoch)[place] * self.seq_len
        return self.tokens[first : first + self.seq_len + 1]


class UnlearnOptions(Section):
    weight: float = 1.0
    """Step length of the ascent, relative to training."""


@register_stage("unlearn", help="gradient ascent: away from the text given", section=UnlearnOptions)
def unlearn(cfg):
    return pretrain.run(cfg, objective=lambda outputs: -cfg.unlearn.weight * outputs["ce_sum"])
