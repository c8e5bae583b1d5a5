"""The health of mixtures of experts: the alarm when one collapses, and how much each expert gets."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from llmtrain.config.ffn import MoEConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.train import ExpertGuardConfig
from llmtrain.engine.base import StepResult
from llmtrain.train.metrics import worst

HASTY = 0.05
"""A router's bias that moves by more per step than scores differ sends all tokens to and fro."""


def limits(cfg: ExpertGuardConfig, ffn: MoEConfig) -> tuple[float, float]:
    """The highest load and the lowest entropy that are no collapse, of which guards.experts may leave both open."""
    load = (1 + ffn.experts / ffn.top_k) / 2 if cfg.load is None else cfg.load
    least = math.log(ffn.top_k) / math.log(max(2, ffn.experts))
    return load, (1 + least) / 2 if cfg.entropy is None else cfg.entropy


class Finding(NamedTuple):
    """Something to say, and whether the run has to end."""

    text: str
    stop: bool = False


class ExpertHealth:
    """Watches the mixtures of experts of a run, step by step; does nothing for a model without. Every rank judges alike."""

    def __init__(self, cfg: ExpertGuardConfig, model: ModelConfig):
        self.cfg, self.ffn = cfg, model.ffn
        self.layers = model.expert_layers + model.mtp.heads if model.ffn.kind == "moe" else 0
        self._counts: Tensor | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        self._beyond, self._within, self._collapsed = [0] * self.layers, [0] * self.layers, [False] * self.layers

    # --- the alarm ------------------------------------------------------------------------------------------------------------------

    def judge(self, result: StepResult) -> list[Finding]:
        """What is to be said after a step: layers that have been beyond a limit for `steps` steps, and collapsed ones that are no more."""
        experts = result.metrics.get("experts")
        if experts is None or self.cfg.action == "off" or self.ffn.router.force_balance:
            return []
        load, entropy = limits(self.cfg, self.ffn)
        news: dict[bool, list[int]] = {True: [], False: []}
        for layer, (its_load, its_entropy) in enumerate(zip(experts["load"], experts["entropy"])):
            bad = its_load > load or its_entropy < entropy
            self._beyond[layer] = self._beyond[layer] + 1 if bad else 0
            self._within[layer] = 0 if bad else self._within[layer] + 1
            if bad != self._collapsed[layer] and max(self._beyond[layer], self._within[layer]) >= self.cfg.steps:
                self._collapsed[layer] = bad
                news[bad].append(layer)
        findings = [Finding(self._alarm(news[True], experts), self.cfg.action == "stop")] if news[True] else []
        return findings + ([Finding(f"experts of {self._named(news[False])} are in balance again")] if news[False] else [])

    def _alarm(self, layers: Sequence[int], experts: dict[str, Any]) -> str:
        load, entropy = limits(self.cfg, self.ffn)
        its = worst({name: [experts[name][layer] for layer in layers] for name in ("load", "entropy")})
        return (
            f"experts of {self._named(layers)} collapse: for {self.cfg.steps} steps the fullest got more than {load:.3g} x the mean "
            f"(now {its['load']:.3g}) or entropy was below {entropy:.3g} (now {its['entropy']:.3g}); {advice(self.ffn)}"
        )

    def _named(self, layers: Sequence[int], limit: int = 8) -> str:
        numbers = ", ".join(str(layer + self.ffn.dense_layers) for layer in layers[:limit])
        more = f" and {len(layers) - limit} more" if len(layers) > limit else ""
        return f"layer{'s' * (len(layers) > 1)} {numbers}{more}"

    def state(self) -> dict[str, list]:
        """JSON-able: a resumed run raises the alarm when one that never stopped would."""
        return {"beyond": self._beyond, "within": self._within, "collapsed": self._collapsed}

    def load_state(self, state: dict[str, list] | None) -> None:
        """Take over state(); None, of a run that did not watch yet, and that of a model with other layers start anew."""
        if state is None or len(state["beyond"]) != self.layers:
            return self._start_anew()
        self._beyond, self._within, self._collapsed = (list(state[name]) for name in ("beyond", "within", "collapsed"))

    # --- who got how much -----------------------------------------------------------------------------------------------------------

    def add(self, result: StepResult) -> None:
        """Take a step's counts into the next `line`."""
        if result.expert_counts is not None:
            self._counts = result.expert_counts if self._counts is None else self._counts + result.expert_counts

    def line(self) -> dict[str, Any] | None:
        """A line of metrics: of each layer the share of every expert in all choices since the last line; None where there are none."""
        if self._counts is None:
            return None
        counts, self._counts = self._counts.double().cpu(), None
        shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
        rounded = [[round(share, 6) for share in layer] for layer in shares.tolist()]
        return {"kind": "experts", "first_layer": self.ffn.dense_layers, "shares": rounded}


def advice(ffn: MoEConfig) -> str:
    """What to change so that experts are used more evenly."""
    rate = ffn.router.bias_rate
    words = [f"raise model.ffn.balance.weight ({ffn.balance.weight:g})"] if ffn.balance is not None else []
    if rate:
        words.append(f"{'lower' if rate > HASTY else 'raise'} model.ffn.router.bias_rate ({rate:g})")
    if not words:
        return "nothing balances them: set model.ffn.balance (a loss) or model.ffn.router.bias_rate (a bias)"
    return " or ".join([*words, "lower the learning rate"])
