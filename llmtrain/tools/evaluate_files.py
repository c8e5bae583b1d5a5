"""What `llmtrain eval` does with files alone, without a model: compare two results, error rates of transcripts."""

import argparse
import json
from pathlib import Path

VERBS = ("compare", "error-rate")


def main(argv: list[str]) -> int:
    """`llmtrain eval compare A.json B.json`, `llmtrain eval error-rate REFERENCES HYPOTHESES`: print a table; --out writes JSON."""
    options = _parse(argv)
    text, values = options.run(options)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        whole = {"evaluation": options.evaluation, "results": values}
        options.out.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="llmtrain eval", description="Evaluate files.")
    kinds = parser.add_subparsers(dest="evaluation", required=True, metavar="EVALUATION")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")

    add = kinds.add_parser("compare", parents=[shared], help="differences item by item between two results of dialogue or tasks")
    add.add_argument("first", type=Path, metavar="FIRST", help="a file that --out wrote")
    add.add_argument("second", type=Path, metavar="SECOND", help="another, of the same items")
    add.set_defaults(run=_compare)

    add = kinds.add_parser("error-rate", parents=[shared], help="mixed and character error rate of Chinese and English text")
    add.add_argument("references", type=Path, help="a text file, an utterance a line")
    add.add_argument("hypotheses", type=Path, help="as many lines")
    add.add_argument("--as-written", action="store_true", help="count punctuation and case too")
    add.set_defaults(run=_error_rate)
    return parser.parse_args(argv)


def _compare(options: argparse.Namespace):
    from llmtrain.tools import paired

    results = paired.compare(options.first, options.second)
    return paired.table(results), results


def _error_rate(options: argparse.Namespace):
    from llmtrain.tools import error_rates

    rates = error_rates.of_files(options.references, options.hypotheses, normalised=not options.as_written)
    return error_rates.table(rates), [rate._asdict() for rate in rates]
