"""report.md: a run in one page, from what it recorded.

llmtrain report runs/quickstart
"""

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmtrain.config.model import ModelConfig
from llmtrain.config.run import RunConfig
from llmtrain.tools.history import History, read_config
from llmtrain.tools.markdown import fence, table
from llmtrain.tools.report_experts import experts_section
from llmtrain.tools.report_plot import draw, sparkline
from llmtrain.train.console import duration

PLOT = "report.png"
EXTRA = "report.json"
LAST_EVENTS = 15


def main(argv: list[str]) -> int:
    """`llmtrain report RUN`: write the report of a run folder again."""
    print(write_report(parser().parse_args(argv).run, {}))
    return 0


def parser() -> argparse.ArgumentParser:
    """The words of `llmtrain report`."""
    p = argparse.ArgumentParser(prog="llmtrain report", description="Write RUN/report.md and its plot from RUN/metrics.jsonl.")
    p.add_argument("run", type=Path, metavar="RUN", help="the run folder, such as runs/quickstart")
    return p


def write_report(run_folder: Path, extra: dict[str, Any]) -> Path:
    """Write report.md and report.png of a run folder and return the page's path.

    `extra` is what the metrics do not hold: `sample` (text), `bigram` (nats/token of the first validation source), `export` (folder). It is
    kept in report.json, so that the report can be written again. Raises UserError if there is nothing to report.
    """
    folder = Path(run_folder)
    history = History.read(folder)
    extra = _keep_extra(folder / EXTRA, extra)
    cfg = read_config(folder)
    name = cfg.name if cfg else folder.resolve().name
    parts = [
        f"# Run {name}",
        _results(history),
        _validation(history, extra),
        _plot(history, folder, name=name, baseline=extra.get("bigram")),
        experts_section(history, folder),
        _sample(extra.get("sample")),
        _configuration(cfg),
        _files(folder, extra),
        _events(history),
        _environment(folder / "env.json"),
    ]
    path = folder / "report.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _keep_extra(path: Path, extra: dict[str, Any]) -> dict[str, Any]:
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = {**old, **{name: str(value) if isinstance(value, Path) else value for name, value in extra.items() if value is not None}}
    if kept:
        path.write_text(json.dumps(kept, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return kept


def _results(history: History) -> str:
    loss, count = history.final_loss()
    last = history.train[-1]
    seconds, speed, mfu = history.seconds(), history.tokens_per_second(), history.column("mfu")
    recorded = "" if history.complete else f" (of the {len(history.train)} recorded steps)"
    rows = [
        ("steps", f"{history.steps:,}"),
        ("tokens", f"{last['tokens']:,}"),
        ("training time, without validation and checkpoints", duration(seconds) + recorded),
        ("tokens/s, all ranks", f"{speed:,.0f}" if speed else None),
        ("MFU, mean", f"{100 * math.fsum(mfu) / len(mfu):.1f}%" if mfu else None),
        ("waiting for data", _share(history, "data_seconds", seconds)),
        ("memory of rank 0, peak", f"{max(history.column('memory_gb')):.2f} GiB" if history.column("memory_gb") else None),
        (f"training loss, mean of the last {count} steps", f"{loss:.4f} nats/token (perplexity {_perplexity(loss)})"),
        ("spikes", history.total("spike")),
        ("skipped steps", history.total("skipped")),
    ]
    return table(("result", ""), [row for row in rows if row[1] is not None])


def _share(history: History, column: str, seconds: float) -> str | None:
    waited = history.column(column)
    return f"{100 * math.fsum(waited) / max(seconds, 1e-9):.2f}% of the time" if waited else None


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 50 else "beyond 1e21"


def _validation(history: History, extra: dict) -> str:
    if not history.validation:
        return ""
    rows = []
    for source, lines in history.sources().items():
        best = min(lines, key=lambda line: line["loss"] if math.isfinite(line["loss"]) else math.inf)
        rows.append(
            (
                source,
                *(f"{line['loss']:.4f} (step {line['step']:,})" for line in (lines[0], best, lines[-1])),
                _perplexity(lines[-1]["loss"]),
            )
        )
    text = "## Validation\n\n" + table(("source", "first loss", "best", "last", "perplexity, last"), rows)
    if extra.get("bigram") is not None:
        source, lines = next(iter(history.sources().items()))
        gap = extra["bigram"] - lines[-1]["loss"]
        text += f"\n\nAn interpolated bigram model of the same tokens has {extra['bigram']:.4f} nats/token on {source}; "
        text += f"the run ends {abs(gap):.4f} {'below' if gap > 0 else 'above'} it."
    return text


def _plot(history: History, folder: Path, *, name: str, baseline: float | None) -> str:
    try:
        draw(history, folder / PLOT, title=f"{name}: {history.steps:,} steps, {history.train[-1]['tokens']:,} tokens", baseline=baseline)
    except ImportError as error:
        (folder / PLOT).unlink(missing_ok=True)  # a plot of an earlier state would pass for this one
        losses = history.column("loss")
        ends = f"training loss {losses[0]:.3f} -> {losses[-1]:.3f}" if losses else "no finite training loss"
        hint = f"No plot: {error}. `pip install llmtrain[viz]`, then `llmtrain report {folder}` draws it."
        return f"## Loss\n\n{ends}\n\n{fence(sparkline(losses))}\n\n{hint}"
    return f"## Loss\n\n![loss, gradient norm and learning rate over the steps]({PLOT})"


def _sample(text: str | None) -> str:
    return f"## A passage by the model\n\n{fence(text)}" if text else ""


def _configuration(cfg: RunConfig | None) -> str:
    if cfg is None:
        return ""
    model, train, optim = cfg.model, cfg.train, cfg.optim
    mesh = [f"{axis} {getattr(cfg.parallel, axis)}" for axis in _AXES if getattr(cfg.parallel, axis) != 1]
    phases = ", ".join(phase.name or str(i) for i, phase in enumerate(train.phases))
    rows = [
        ("model", f"{model.layers} layers, width {model.hidden}, vocabulary {model.vocab_size or 'of the tokenizer'}"),
        ("attention", _attention(model)),
        ("feed-forward", _feed_forward(model)),
        ("balance of experts", _balance(model)),
        ("multi-token prediction", f"{model.mtp.heads} head(s), loss weight {model.mtp.loss_weight:g}" if model.mtp.heads else ""),
        ("norm, initialisation", f"{model.norm.kind} {model.norm.placement}, {model.init.kind}"),
        ("data", ", ".join(getattr(source, "path", source.label) for source in cfg.data.train)),
        ("batch", f"{train.global_batch} sequences of {train.seq_len} tokens, {train.micro_batch} at a time on a rank"),
        ("phases", phases),
        ("optimizer", f"{optim.kind}, peak learning rate {cfg.schedule.lr or optim.lr:g}, {cfg.schedule.kind}"),
        ("precision", cfg.precision.compute),
        ("mesh", ", ".join(mesh) or "one rank"),
        ("engine, device, seed", f"{cfg.engine.kind}, {cfg.device}, {cfg.seed}"),
    ]
    return "## Configuration\n\n" + table(("option", ""), [row for row in rows if row[1]]) + "\n\nEverything: [config.yaml](config.yaml)."


def _attention(model: ModelConfig) -> str:
    a = model.attention
    if a.kind == "gqa":
        return f"{a.heads} heads, {model.kv_heads} key/value heads, head width {model.head_dim}"
    queries = f"queries from {a.query_rank}, " if a.query_rank else ""
    return (
        f"{a.heads} latent heads, {queries}keys and values from {a.kv_rank}, head width {a.nope_dim} + {a.rope_dim}, values {a.value_dim}"
    )


def _feed_forward(model: ModelConfig) -> str:
    ffn = model.ffn
    if ffn.kind == "dense":
        return f"{ffn.hidden} ({ffn.activation})"
    parts = [f"{ffn.experts} experts, {ffn.top_k} per token by {ffn.router.score}, width {ffn.hidden} ({ffn.activation})"]
    parts += [f"between projections to {ffn.descend}"] if ffn.descend else []
    parts += [f"{ffn.shared_experts} shared"] if ffn.shared_experts else []
    parts += [f"first {ffn.dense_layers} blocks dense, {model.of_block(0).ffn.hidden}"] if ffn.dense_layers else []
    parts += [f"capacity {ffn.capacity.factor:g}"] if ffn.capacity else []
    return "; ".join(parts)


def _balance(model: ModelConfig) -> str:
    """How experts are kept evenly used."""
    if model.ffn.kind == "dense":
        return ""
    balance, router = model.ffn.balance, model.ffn.router
    parts = []
    if balance is not None:
        group = {"step": "the step", 1: "each sequence"}.get(balance.sequences, f"{balance.sequences} sequences")
        parts.append(f"loss {balance.weight:g} over {group}")
    parts += [f"z-loss {router.z_loss:g}"] if router.z_loss else []
    parts += [f"bias moved by {router.bias_rate:g}"] if router.bias_rate else []
    parts += ["tokens dealt out evenly"] if router.force_balance else []
    return ", ".join(parts) or "nothing"


_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")


def _files(folder: Path, extra: dict) -> str:
    checkpoints = sorted(p.name for p in (folder / "checkpoints").glob("step-*") if not p.name.endswith(".partial"))
    lines = [f"- checkpoints: `{folder / 'checkpoints'}` ({', '.join(checkpoints)})" if checkpoints else "- no checkpoint"]
    if extra.get("export"):
        lines.append(f"- exported weights (Hugging Face): `{extra['export']}`")
    lines.append(f"- every recorded number: `{folder / 'metrics.jsonl'}`")
    if (folder / "tb").is_dir():
        lines.append(f"- TensorBoard: `tensorboard --logdir {folder / 'tb'}`")
    return "## Files\n\n" + "\n".join(lines)


def _events(history: History) -> str:
    if not history.events:
        return ""
    shown = history.events[-LAST_EVENTS:]
    more = f" (the last {len(shown)} of {len(history.events)})" if len(shown) < len(history.events) else ""
    return f"## Events{more}\n\n" + "\n".join(f"- step {event['step']:,}: {event['text']}" for event in shown)


def _environment(path: Path) -> str:
    if not path.exists():
        return ""
    rows = list(_flat(json.loads(path.read_text(encoding="utf-8"))))
    return "## Environment\n\n" + table(("", ""), rows) if rows else ""


def _flat(values: dict, prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value not in (None, "", [], {}):
            yield prefix + name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
