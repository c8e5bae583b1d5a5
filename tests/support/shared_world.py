"""Models that this world's ranks share for generation: logits, losses, and generated tokens."""

from pathlib import Path

import torch

from llmtrain.config.train import ParallelConfig
from llmtrain.device import select
from llmtrain.model.decode import CachedRunner, generate
from llmtrain.model.sampling import Sampling
from llmtrain.model.scoring import cross_entropy_sum
from llmtrain.ops import Mask
from llmtrain.parallel import mesh as world
from llmtrain.tools.open_model import open_model

PROMPTS = [[5, 3, 9], [1, 2, 3, 4, 5, 6, 7], [11]]


def ask(folder: str, meshes: dict[str, dict], dtype: str = "fp64") -> dict[str, dict]:
    """What the model in `folder` answers on each mesh."""
    torch.set_num_threads(1)
    answers = {}
    for name, axes in meshes.items():
        mesh = world.start(ParallelConfig(**axes), device=select("cpu"))
        opened = open_model(Path(folder), device="cpu", dtype=dtype, mesh=mesh if mesh.world > 1 else None)
        tokens = torch.arange(22).reshape(2, 11) * 7 % 97
        with torch.no_grad():
            logits = opened.model(tokens, mask=Mask())["logits"]
        rule = Sampling(max_new=9, temperature=0)
        rows = generate(CachedRunner(opened.model, slots=3, capacity=20), PROMPTS, rule)
        nats, count = cross_entropy_sum(opened.model, torch.arange(40) * 5 % 97, context=16)
        held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in opened.model.parameters())
        answers[name] = {"logits": logits.numpy(), "tokens": [row.tokens for row in rows], "loss": nats / count, "held": mesh.gather(held)}
        mesh.leave()
    return answers
