"""`llmtrain data metaladder`: problems with analogous problems, split by template, and the variants to train on."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from llmtrain.data.errors import DataError

ABOUT = (
    "Build MetaLadder's training data (arXiv 2503.14891) in a folder: rungs.jsonl (problems with similar ones), VARIANT.jsonl (prompts and "
    "responses), validation.jsonl and the problems to ask, unseen_instances.jsonl and unseen_templates.jsonl."
)


def add_words(verb: argparse.ArgumentParser) -> None:
    """The options."""
    add = verb.add_argument
    add("--out", required=True, type=Path, metavar="FOLDER", help="folder to write; with --source none its rungs are rendered anew")
    add("--source", default="procedural", help="procedural, gym (reasoning-gym's gsm_symbolic), none, or a .jsonl file of problems")
    add("--problems", type=int, default=1000, metavar="N", help="training problems")
    add("--test", type=int, default=300, metavar="N", help="problems of each test set")
    add("--validation", type=int, default=100, metavar="N", help="problems to choose options with")
    add("--held-out", type=float, default=0.25, metavar="SHARE", help="of the templates, asked only (unseen_templates)")
    add("--largest", type=int, default=20, metavar="N", help="procedural: the largest number, given or computed")
    add("--seed", type=int, default=0, metavar="N", help="of instances and of what is held out")
    add("--variants", nargs="+", default=["all"], metavar="NAME", help="all, or cot metaladder no_analogy ...; NAME+reverse swaps each too")
    add("--tokenizer", metavar="PATH", help="count tokens with it instead of characters")
    for name in ("question", "solution", "answer", "label", "strategy", "reflection"):
        add(f"--{name}-field", default=name, metavar="NAME", help=f"field of a .jsonl file that holds the {name}")
    _teacher_words(verb.add_argument_group("a teacher", "writes type and method, the similar problem and its solution"))


def _teacher_words(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--teacher",
        metavar="URL|FOLDER",
        help="OpenAI-compatible endpoint (https://host/v1), or a model's folder (with a chat template)",
    )
    add("--teacher-model", default="teacher", metavar="NAME", help="model named in the requests")
    add("--key-variable", default="OPENAI_API_KEY", metavar="NAME", help="environment variable with the key")
    add("--per-minute", type=float, default=60, metavar="N", help="requests at most per minute; 0 is no limit")
    add("--workers", type=int, default=4, metavar="N", help="requests at a time")
    add("--temperature", type=float, default=0.7, help="of the teacher")
    add("--max-tokens", type=int, default=1024, metavar="N", help="of an answer")
    add("--tries", type=int, default=2, metavar="N", help="answers asked for until one can be used; then the problem is dropped")
    add("--retries", type=int, default=6, metavar="N", help="tries of one request that is refused (429, 5xx) or lost")
    add("--timeout", type=float, default=120, metavar="S", help="seconds for one answer")
    add("--recheck", action="store_true", help="have similar problems solved again, and keep those with the same answer")
    add("--reflections", action="store_true", help="ask for reflections too (refaug, pre_refaug)")
    add("--cache", type=Path, metavar="FOLDER", help="answers by request; OUT/teacher if not given")


def run(options: argparse.Namespace) -> int:
    """Build, write, and print what there is."""
    from llmtrain.data.metaladder import build

    _check(options)
    if options.source != "none":
        build.write_split(options.out, _split(options))
    rungs = build.rungs_of(options.out)
    asked = {name: len(problems) for name, problems in build.asked_of(options.out).items()}
    names = build.variant_names(options.variants, rungs)
    count, unit = _counter(options.tokenizer)
    sizes = build.write_variants(options.out, names, count=count)
    print(build.table(sizes, unit=unit))
    print(f"\n{options.out}: {len(rungs):,} rungs; to ask: {', '.join(f'{n:,} {name}' for name, n in asked.items()) or 'none'}")
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.problems < 1 or min(options.test, options.validation) < 0 or not 0 <= options.held_out < 1:
        given = f"--problems {options.problems} --test {options.test} --validation {options.validation} --held-out {options.held_out:g}"
        raise DataError(f"{given}: allowed are at least 1, 0 and 0, and a share of 0 up to below 1")
    if min(options.workers, options.tries, options.retries) < 1:
        raise DataError(f"--workers {options.workers} --tries {options.tries} --retries {options.retries}: all must be at least 1")


def _split(options: argparse.Namespace):
    from llmtrain.data.metaladder.split import split

    sizes = {"problems": options.problems, "test": options.test, "validation": options.validation}
    found = split(_source(options), **sizes, share=options.held_out, seed=options.seed, similar=not options.teacher)
    if options.teacher:
        found.rungs = _taught(options, [rung.problem for rung in found.rungs])
    if found.alone:
        print(f"left out: {found.alone:,} problems whose label no other training problem has", file=sys.stderr)
    return found


def _source(options: argparse.Namespace):
    from llmtrain.data.metaladder.labelled import Fields, Gym, Labelled
    from llmtrain.data.metaladder.procedural import Procedural

    if options.source == "procedural":
        return Procedural(largest=options.largest, seed=options.seed)
    if options.source == "gym":
        return Gym(seed=options.seed)
    if not options.source.endswith((".jsonl", ".ndjson")):
        raise DataError(f"--source {options.source!r}: allowed are procedural, gym, none, or a .jsonl file of problems")
    fields = Fields(**{name: getattr(options, f"{name}_field") for name in Fields.__dataclass_fields__})
    return Labelled(options.source, fields, seed=options.seed)


def _taught(options: argparse.Namespace, problems: list) -> list:
    from llmtrain.data.metaladder.cache import AnswerCache
    from llmtrain.data.metaladder.teach import Lesson, teach

    lesson = Lesson(
        model=options.teacher_model,
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        tries=options.tries,
        reflections=options.reflections,
        recheck=options.recheck,
        workers=options.workers,
    )
    cache = AnswerCache(options.cache or options.out / "teacher")
    taught = teach(problems, _sender(options), cache, lesson)
    print(f"teacher: {taught.asked:,} requests sent, {taught.cached:,} answered from {cache.folder}", file=sys.stderr)
    for reason, count in taught.refused.most_common():
        print(f"  answers refused: {count:,}, {reason}", file=sys.stderr)
    print(f"  problems dropped: {sum(taught.dropped.values()):,} of {len(problems):,}", file=sys.stderr)
    return taught.rungs


def _sender(options: argparse.Namespace) -> Callable[[dict], str]:
    if Path(options.teacher).is_dir():
        from llmtrain.tools.local_teacher import local_teacher

        return local_teacher(options.teacher)
    from llmtrain.data.metaladder.endpoint import Endpoint

    return Endpoint(
        options.teacher,
        key_variable=options.key_variable,
        per_minute=options.per_minute,
        tries=options.retries,
        timeout=options.timeout,
    )


def _counter(tokenizer: str | None) -> tuple[Callable[[str], int], str]:
    if tokenizer is None:
        return len, "characters"
    from llmtrain.data.tokenizer import load

    encode = load(tokenizer).encode
    return lambda text: len(encode(text)), "tokens"
