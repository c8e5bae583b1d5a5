"""MetaLadder (arXiv 2503.14891): which variant is trained on, for how long, in how many rounds, and how it is asked."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from llmtrain.config.base import Section


class MetaLadderConfig(Section):
    """What `llmtrain metaladder` trains on and asks."""

    data: str | None = None
    """Folder that `llmtrain data metaladder` wrote."""
    variant: str = "metaladder"
    """What the responses are: metaladder, cot, no_strategy, no_analogy, no_restate, post, analogyaug, refaug, pre_refaug; with `+reverse`
    every similar problem is an example too, with the problem as its analogue."""
    epochs: PositiveFloat = 1.0
    """Passes over the training examples of a round; train.steps, tokens, epochs or phases, where given, say the length instead."""
    tokens_of: str | None = None
    """Train for as many tokens as `epochs` over this variant have, so that variants can be compared at equal tokens."""
    rounds: NonNegativeInt = 0
    """Rounds of self-evolve after the first training: every training problem is answered, right answers are added to the examples of all
    rounds before, and the base model is trained anew."""
    sets: list[Literal["validation", "unseen_instances", "unseen_templates"]] = ["unseen_instances", "unseen_templates"]
    """Problems asked after every round, as far as the data have them."""
    inference: list[Literal["plain", "shortcut"]] = ["plain"]
    """How they are asked; `shortcut` leaves the similar problem out."""
    sampling: Literal["plain", "shortcut"] = "plain"
    """How training problems are answered between rounds."""
    max_new: PositiveInt = 512
    """Tokens of a response at most."""
    batch: PositiveInt = 16
    """Problems answered at a time by each rank."""
