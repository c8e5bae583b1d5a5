"""Supervised fine-tuning: a pretrained model learns the answers of conversations.

llmtrain sft -c configs/smollm2_sft.yaml --data.train answers.jsonl

It is pretraining on sources of `kind: conversations` with other defaults.
"""

import math
import os
from pathlib import Path

from llmtrain.config.data import ConversationSource
from llmtrain.config.run import RunConfig
from llmtrain.data.errors import DataError
from llmtrain.stages import pretrain

EPOCHS = 2.0
LR = 2e-5
LR_OF_ADAPTERS = 2e-4
"""QLoRA's for models of up to 13 billion parameters (arXiv 2305.14314, table 9)."""
WARMUP = 0.03
"""Share of the steps."""


def main(argv: list[str]) -> int:
    """`llmtrain sft`."""
    return pretrain.main(argv, verb="sft", description="Train a pretrained model on the answers of conversations (docs/sft.md).")


def settled(cfg: RunConfig) -> RunConfig:
    """`cfg` with the defaults of fine-tuning where nothing else was said: 2 epochs, lr 2e-5 (2e-4 for adapters), no weight decay, 3% of the
    steps warm-up."""
    train, optim, schedule = cfg.train, cfg.optim, cfg.schedule
    if train.steps is None and train.tokens is None and train.epochs is None and not train.phases:
        train = train.model_copy(update={"epochs": EPOCHS})
    optim = _with_defaults(optim, lr=LR_OF_ADAPTERS if cfg.lora.rank else LR, weight_decay=0.0)
    cfg = pretrain.settled(cfg.model_copy(update={"train": train, "optim": optim}))
    if cfg.train.steps is not None:
        schedule = _with_defaults(schedule, warmup_steps=math.ceil(WARMUP * cfg.train.steps))
    return cfg.model_copy(update={"schedule": schedule})


def _with_defaults(section, **values):
    """`section` with the values of options that were not given."""
    return section.model_copy(update={name: value for name, value in values.items() if name not in section.model_fields_set})


def preflight(cfg: RunConfig) -> int:
    """As pretraining's, and that there are conversations."""
    if not any(isinstance(source, ConversationSource) for source in cfg.data.train):
        raise DataError("data.train has no conversations to learn answers from; give it a .jsonl, .json or .parquet file (docs/sft.md)")
    return pretrain.preflight(cfg)


def run(cfg: RunConfig) -> int:
    """Train; called on every rank. Returns the exit code, as pretraining's."""
    code = pretrain.run(cfg)
    if code == 0 and os.environ.get("RANK", "0") == "0" and cfg.checkpoint.export == "hf":
        _write_template(cfg, Path(cfg.output) / cfg.name / "hf")
    return code


def _write_template(cfg: RunConfig, export: Path) -> None:
    """Leave the chat template that the model was taught with its weights; `plain` is none."""
    from llmtrain.data.chat.template import find_template
    from llmtrain.data.chat.tokens import open_tokenizer

    taught = {source.template for source in cfg.data.train if isinstance(source, ConversationSource)} - {"plain"}
    if len(taught) == 1 and (choice := taught.pop()) != "auto":
        template = find_template(choice, open_tokenizer(cfg.tokenizer))
        (export / "chat_template.jinja").write_text(template.source, encoding="utf-8")
