"""A model as lm-eval's LM, and tasks run with it, without a network. Needs the package lm-eval."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from llmtrain.errors import UserError
from llmtrain.model.sampling import Sampling
from llmtrain.model.scoring import score
from llmtrain.tools.completions import Request, complete, runner_for
from llmtrain.tools.open_model import OpenModel, open_model
from llmtrain.tools.progress import Progress

MAX_NEW = 256
"""Tokens of an answer where the task sets no max_gen_toks (lm-eval's own default)."""


@register_model("llmtrain")
class LlmtrainLM(TemplateLM):
    """An opened model; lm-eval itself makes one by `--model llmtrain --model_args model=FOLDER,device=cpu,dtype=fp32`."""

    def __init__(
        self,
        model: str | OpenModel,
        device: str = "auto",
        dtype: str = "auto",
        checkpoint: str = "auto",
        batch_size: int | str = 8,
        max_length: int | None = None,
        **_: object,
    ):
        super().__init__()
        opened = model if isinstance(model, OpenModel) else open_model(model, device=device or "auto", dtype=dtype, checkpoint=checkpoint)
        self.opened, self.text = opened, opened.need_tokenizer()
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 8
        self.max_length = int(max_length or opened.cfg.max_seq_len)

    @property
    def eot_token_id(self) -> int:
        """Ends a document."""
        return self.opened.stop_ids[0] if self.opened.stop_ids else self.text.eod_id

    @property
    def prefix_token_id(self) -> int:
        """Stands where a text has nothing in front of it."""
        return self.eot_token_id if self.text.bos_id is None else self.text.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Ids, with the model's prefix unless `add_special_tokens` is False."""
        return self.text.encode(string) if add_special_tokens is False else self.opened.encode(string)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_: object) -> list[tuple[float, bool]]:
        pairs = []
        for _strings, context, continuation in requests:
            kept = [*context, *continuation][-(self.max_length + 1) :]  # the end counts, as in lm-eval's own models
            cut = max(1, len(kept) - len(continuation))
            pairs.append((kept[:cut], kept[cut:]))
        with Progress("log-likelihoods", len(pairs), "rows") as progress:
            scores = score(self.opened.model, pairs, batch=self.batch_size, done=progress.at)
        return [(value.logprob, value.greedy) for value in scores]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """log-probability of whole texts, in windows of the model's length with one token of context."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        rows, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(
                token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, cut):
                rows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (logprob, _greedy) in zip(owners, self._loglikelihood_tokens(rows)):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to one of the strings in `until`, which are not part of them."""
        asked = [self._request(*request.args) for request in requests]
        if not asked:
            return []
        return [item.text for item in complete(runner_for(self.opened, asked, batch=self.batch_size), self.text, asked)]

    def _request(self, context: str, kwargs: dict) -> Request:
        until = kwargs.get("until") or []
        until = tuple([until] if isinstance(until, str) else until)
        limit = int(kwargs.get("max_gen_toks", kwargs.get("max_new_tokens", MAX_NEW)))
        base = Sampling(max_new=min(limit, self.max_length - 1), temperature=0.0, stop_ids=self.opened.stop_ids)
        if kwargs.get("do_sample") and kwargs.get("temperature", 1.0) > 0:
            top = {"top_p": float(kwargs.get("top_p", 1.0)), "top_k": int(kwargs.get("top_k", 0))}
            base = replace(base, temperature=float(kwargs.get("temperature", 1.0)), **top)
        prompt = self.tok_encode(context)[-(self.max_length - base.max_new) :]  # its end fits, as in lm-eval's own models
        return Request(prompt, base, tuple(text for text in until if text))


def run(
    opened: OpenModel,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    batch: int = 8,
) -> dict:
    """lm-eval's results per task, and under `items` the value of each metric for every document.

    `tasks` are names (of lm-eval, or of files in `include`) or YAML files.

    Nothing is downloaded: data sets have to be local files or in the cache. Raises UserError for an unknown task.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such task file")
    folders = list(dict.fromkeys(str(folder) for folder in [*([include] if include else []), *(file.parent for file in files)]))
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(tasks))  # lm-eval's own take a while to index
    names = [_task_name(Path(task)) if Path(task) in files else task for task in tasks]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"task {unknown[0]!r} is not known to lm-eval; give a YAML file, or --include its folder")
    model = LlmtrainLM(opened, batch_size=batch)
    done = simple_evaluate(
        model, tasks=names, num_fewshot=fewshot, limit=limit, task_manager=manager, log_samples=True, bootstrap_iters=1000
    )
    results = {name: {key: value for key, value in values.items() if key != "alias"} for name, values in done["results"].items()}
    for name, samples in done["samples"].items():
        results[name]["items"] = _items(samples)
    return results


def _items(samples: list[dict]) -> dict[str, list[float]]:
    """Metric -> its value for every document, in order, of metrics that have one number per document."""
    rows = sorted(samples, key=lambda sample: sample["doc_id"])
    names = [name for name in (rows[0].get("metrics") or []) if all(isinstance(row.get(name), int | float) for row in rows)] if rows else []
    return {name: [float(row[name]) for row in rows] for name in names}


def _task_name(file: Path) -> str:
    for line in file.read_text(encoding="utf-8").splitlines():  # not parsed as YAML: task files hold tags of lm-eval's own
        if line.startswith("task:"):
            return line.removeprefix("task:").strip().strip("\"'")
    raise UserError(f"{file}: no line `task: NAME`; an lm-eval task file has one")


def table(results: dict) -> str:
    """Markdown: a row per task and metric."""
    lines = ["| task | metric | value | +/- |", "|---|---|--:|--:|"]
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filters = key.partition(",")
            if isinstance(value, int | float) and "_stderr" not in metric and filters:
                error = values.get(f"{metric}_stderr,{filters}")
                shown = f"{error:.4f}" if isinstance(error, int | float) else ""
                lines.append(f"| {task} | {metric} | {value:.4f} | {shown} |")
    return "\n".join(lines)
