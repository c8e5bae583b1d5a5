"""Which experts each domain uses, and which experts are chosen together, measured on a trained model.

Shapes: D domains, L layers with experts, E experts, N tokens, k experts of a token.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from llmtrain.model.router import Router
from llmtrain.ops import Mask


def measure(run: Path) -> dict[str, list]:
    """`counts` [D,L,E] and `pairs` [D,L,E,E] of a run's last checkpoint on the sequences of its validation; kept in routing.json."""
    kept = run / "routing.json"
    if not kept.exists():
        from llmtrain.stages.pretrain import inputs
        from llmtrain.tools.history import read_config
        from llmtrain.tools.open_model import open_model

        cfg, found = read_config(run), []
        model = open_model(run, device="cpu").model
        for dataset in inputs(cfg).validation.values():
            samples, rows = min(cfg.train.validate_samples, len(dataset)), cfg.train.micro_batch
            batches = (dataset.batch(first, min(rows, samples - first)) for first in range(0, samples, rows))
            found.append(count(model, batches))
        counts, pairs = ([one[at].tolist() for one in found] for at in (0, 1))
        kept.write_text(json.dumps({"counts": counts, "pairs": pairs}))
    return json.loads(kept.read_text())


@torch.no_grad()
def count(model: nn.Module, batches: Iterator) -> tuple[Tensor, Tensor]:
    """Over all tokens of `batches`: choices of each expert [L,E], and tokens that chose both of two experts [L,E,E] (diagonal 0)."""
    counts = pairs = 0
    for batch in batches:
        with watched(model) as chosen:
            model(batch.tokens, positions=batch.positions, mask=Mask(documents=batch.documents))
        picked = torch.stack(chosen)  # [L,N,E], 1 where the token chose the expert
        together = picked.transpose(1, 2) @ picked
        counts, pairs = counts + picked.sum(1), pairs + together - torch.diag_embed(together.diagonal(dim1=1, dim2=2))
    return counts, pairs


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Gives a list that a forward pass fills with [N,E] per router, 1 where a token chose the expert; dropped choices count too."""
    chosen: list[Tensor] = []

    def look(router: Router, _arguments: tuple, choice) -> None:
        chosen.append(torch.zeros(choice.scores.shape).scatter_(1, choice.ids, 1.0))

    hooks = [layer.register_forward_hook(look) for layer in model.modules() if isinstance(layer, Router)]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


def shares(counts) -> np.ndarray:
    """Of each domain's choices the share that each expert got, [D,L,E] -> [D,L,E]."""
    counts = np.asarray(counts, dtype=float)
    return counts / counts.sum(-1, keepdims=True)


def specialisation(counts) -> np.ndarray:
    """Mutual information between domain and expert over the entropy of the domains (equally likely), by layer: [D,L,E] -> [L].

    0: every domain uses the experts alike. 1: an expert that was chosen tells the domain.
    """
    of_domain = shares(counts)
    mean = of_domain.mean(0)
    logs = np.log(np.where(of_domain > 0, of_domain / np.where(mean > 0, mean, 1), 1))
    return (of_domain * logs).sum(-1).mean(0) / np.log(len(of_domain))


def independent(pairs) -> np.ndarray:
    """What `pairs` [E,E] would be if experts differed only in how often they are chosen: a_i a_j off the diagonal with the same row sums.

    (Quasi-independence; a product of the loads would forget that a token's experts differ.)
    """
    pairs = np.asarray(pairs, dtype=float)
    a, rows = np.sqrt(pairs.sum(1)), pairs.sum(1)
    for _ in range(500):
        others = a.sum() - a
        a = np.sqrt(a * rows / np.where(others > 0, others, 1))  # the root damps what would swing between two solutions
    expected = np.outer(a, a)
    np.fill_diagonal(expected, 0)
    return expected


def departure(pairs) -> float:
    """Share of the pairs [E,E] that would have to be others for experts to be chosen independently: total variation, 0 to 1."""
    pairs = np.asarray(pairs, dtype=float)
    return float(np.abs(pairs - independent(pairs)).sum() / 2 / pairs.sum())


def lift(pairs) -> np.ndarray:
    """How much more often than independently two experts are chosen together, [E,E]; 1 on the diagonal and where nothing is expected."""
    expected = independent(pairs)
    return np.where(expected > 0, np.asarray(pairs, dtype=float) / np.where(expected > 0, expected, 1), 1.0)
