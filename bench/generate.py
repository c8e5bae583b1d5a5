"""Greedy generation against transformers' `generate`: same weights, same prompts, same tokens, interleaved rounds in one process.

    python bench/generate.py MODEL [--batch 1 8] [--new 64] [--rounds 9] [--threads 2]     # writes bench/results/generate-cpu.md

MODEL is a Hugging Face folder that both read. Prompts have unequal lengths (transformers pads on the left); no stop token ends a row, so
both add exactly --new tokens per row. Each round times one whole call of each, prompts included, and alternates which goes first.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from llmtrain.model.decode import CachedRunner, generate
from llmtrain.model.sampling import Sampling
from llmtrain.tools.open_model import open_model

ROOT = Path(__file__).resolve().parent.parent
TEXT = (
    "The old harbour lay quiet under the morning fog, and the gulls had not yet begun to cry. A boy of ten came down with a lantern "
    "in one hand and a rope in the other, counting the boats as he went, for his father had told him that one of them would be gone."
)


def prompts(encode, batch: int) -> list[list[int]]:
    """Beginnings of a text, of 8 to about 60 tokens."""
    tokens = encode(TEXT)
    return [tokens[: 8 + (len(tokens) - 8) * i // max(1, batch - 1)] for i in range(batch)]


def ours(opened, rows: list[list[int]], new: int) -> list[list[int]]:
    """New tokens per row, by llmtrain."""
    runner = CachedRunner(opened.model, slots=len(rows), capacity=max(map(len, rows)) + new)
    return [row.new for row in generate(runner, rows, Sampling(max_new=new, temperature=0))]


def theirs(model, rows: list[list[int]], new: int) -> list[list[int]]:
    """New tokens per row, by transformers with left padding."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[:, longest:].tolist()


def compare(opened, model, *, batch: int, new: int, rounds: int) -> str:
    """A table row of medians."""
    rows = prompts(opened.encode, batch)
    runs = [lambda: ours(opened, rows, new), lambda: theirs(model, rows, new)]
    model.generation_config.eos_token_id = None
    results = [run() for run in runs]  # warms up
    same = sum(a == b for a, b in zip(*results))
    times: list[list[float]] = [[], []]
    for index in range(rounds):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            started = time.perf_counter()
            runs[which]()
            times[which].append(time.perf_counter() - started)
    speeds = [batch * new / statistics.median(t) for t in times]
    ratio = statistics.median(b / a for a, b in zip(*times))
    spread = " / ".join(f"{min(t):.2f}-{max(t):.2f}" for t in times)
    return f"| {batch} | {speeds[0]:.1f} | {speeds[1]:.1f} | {ratio:.2f}x | {spread} s | {same} of {batch} |"


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/generate-cpu.md")
    args = parser.parse_args()
    import transformers

    torch.set_num_threads(args.threads)
    opened = open_model(args.model, device="cpu", dtype="fp32")
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    lines = [compare(opened, model, batch=batch, new=args.new, rounds=args.rounds) for batch in args.batch]
    text = (
        f"# Greedy generation on {args.threads} CPU threads\n\n"
        f"`python bench/generate.py MODEL --new {args.new} --rounds {args.rounds}`, {time.strftime('%Y-%m-%d')}; {args.model.name}, "
        f"fp32, torch {torch.__version__}, transformers {transformers.__version__} (sdpa). Medians of interleaved rounds; the ratio is "
        "the median of the rounds' ratios.\n\n"
        "| batch | llmtrain, tokens/s | transformers, tokens/s | ratio | spread | rows with equal tokens |\n|--:|--:|--:|--:|---|---|\n"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text + "\n".join(lines) + "\n")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
