"""Text from a trained model.

llmtrain generate runs/quickstart -p "ROMEO:"
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llmtrain.data.errors import DataError
from llmtrain.errors import UserError
from llmtrain.model.cache import cache_bytes
from llmtrain.model.sampling import Sampling
from llmtrain.tools import host_layers
from llmtrain.tools.completions import Completion, Request, Texts, capacity_for, runner_for, slots_for
from llmtrain.tools.open_model import OpenModel
from llmtrain.tools.shared import add_options, open_shared, ranks_of, shared_mesh, start_ranks

INTERRUPTED = 130


def main(argv: list[str]) -> int:
    """`llmtrain generate MODEL -p TEXT`: print prompts and their continuations. Ctrl-C keeps what there is."""
    options = _parse(argv)
    host_layers.check(options)
    if options.plan is not None:
        print(host_layers.plan(options))
        return 0
    prompts = _prompts(options)
    code = start_ranks("generate", argv, options)
    if code is not None:
        return code
    with shared_mesh(options) as mesh:
        return _generate(options, prompts, mesh)


def _generate(options: argparse.Namespace, prompts: list[dict], mesh) -> int:
    opened = open_shared(options, mesh)
    tokenizer = opened.need_tokenizer()
    requests = _requests(options, opened, prompts)
    slots, capacity = slots_for(requests, options.batch), capacity_for(requests)
    host = host_layers.host_blocks(options, opened, mesh, slots=slots, capacity=capacity)
    runner = runner_for(opened, requests, batch=options.batch, host=host)
    printer = Printer([p["prompt"] for p in prompts for _ in range(options.samples)], options.stream)
    texts, started = Texts(runner, tokenizer, requests), time.time()
    code = _run(texts, printer)
    if options.out and (mesh is None or mesh.rank == 0):
        _write(options.out, printer.prompts, texts.items)
    _summary(opened, runner, texts.items, seconds=time.time() - started, interrupted=code == INTERRUPTED)
    return code


def _run(texts: Texts, printer: "Printer") -> int:
    """Print texts as they come; the exit code. After Ctrl-C what there is of each is printed."""
    try:
        for index, piece in texts:
            printer.take(index, piece, ended=texts.items[index].finished is not None)
    except KeyboardInterrupt:
        for index, item in enumerate(texts.items):
            if item.finished is None:
                printer.take(index, item.flush(), ended=True)
        return INTERRUPTED
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="llmtrain generate", description="Continue texts with a trained model, several at a time.")
    parser.add_argument("model", type=Path, metavar="MODEL", help="a run folder (runs/quickstart) or a Hugging Face folder")
    parser.add_argument("-p", "--prompt", action="append", default=[], help="text to continue; may be given several times")
    parser.add_argument(
        "--prompts", metavar="FILE", help="prompts from a file: a line each, or .jsonl with `prompt` (and `seed`); - is stdin"
    )
    parser.add_argument("--max-new", type=int, default=120, help="tokens to add at most (120)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)")
    parser.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of the probability that is drawn from (0.95)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from this many likeliest tokens (0: no limit)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    parser.add_argument("--seed", type=int, default=1234, help="the same seed gives the same text, alone or in a batch (1234)")
    parser.add_argument(
        "--samples", type=int, default=1, metavar="N", help="continue every prompt N times, with seeds seed, seed + 1, ... (1)"
    )
    parser.add_argument("--batch", type=int, default=8, help="sequences at a time (8); the cache's memory grows with it")
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True, help="print text as it comes (on)")
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's message in the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message of --chat")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write results as JSON lines as well")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or npu (auto)")
    parser.add_argument("--dtype", default="auto", help="fp64, fp32, bf16, fp16, or auto: as stored, on the CPU at least fp32 (auto)")
    parser.add_argument("--checkpoint", default="auto", help="of a run folder; the newest complete one if not given")
    add_options(parser)
    host_layers.add_options(parser)
    return parser.parse_args(argv)


def _prompts(options: argparse.Namespace) -> list[dict]:
    """Every prompt as {"prompt": text[, "seed": n]}."""
    prompts = [{"prompt": text} for text in options.prompt]
    if options.prompts == "-" and ranks_of(options) > 1:
        raise UserError("--prompts - reads stdin, which the ranks of --tp, --pp and --ep do not have; give a file")
    if options.prompts:
        lines = (sys.stdin.read() if options.prompts == "-" else Path(options.prompts).read_text(encoding="utf-8")).split("\n")
        as_json = options.prompts.endswith((".jsonl", ".ndjson"))
        prompts += [
            _parse_line(options.prompts, n, line) if as_json else {"prompt": line} for n, line in enumerate(lines, 1) if line.strip()
        ]
    if not prompts:
        raise UserError("no prompt: give -p TEXT, or --prompts FILE")
    if options.samples < 1 or options.batch < 1:
        raise UserError(f"--samples {options.samples}, --batch {options.batch}: both must be at least 1")
    return prompts


def _parse_line(file: str, number: int, line: str) -> dict:
    try:
        value = json.loads(line)
        assert isinstance(value["prompt"], str)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f'{file}, line {number}: not a JSON mapping with a text `prompt`, such as {{"prompt": "Once"}}') from None
    return value


def _requests(options: argparse.Namespace, opened: OpenModel, prompts: list[dict]) -> list[Request]:
    base = Sampling(
        max_new=options.max_new,
        temperature=0.0 if options.greedy else options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        stop_ids=opened.stop_ids,
    )
    if "" in options.stop:
        raise UserError("--stop '' would stop at once; give a text")
    encode = _chat_encode(options, opened) if options.chat else opened.encode
    requests = []
    for prompt in prompts:
        tokens, seed = encode(prompt["prompt"]), int(prompt.get("seed", options.seed))
        requests += [Request(tokens, replace(base, seed=seed + n), tuple(options.stop)) for n in range(options.samples)]
    return requests


def _chat_encode(options: argparse.Namespace, opened: OpenModel) -> Callable[[str], list[int]]:
    from llmtrain.data.chat.template import folder_template

    tokenizer = opened.need_tokenizer()
    system = [{"role": "system", "content": options.system}] if options.system else []
    try:
        template = folder_template(tokenizer.path.parent)
    except DataError as error:
        raise UserError(f"--chat: {error}; leave --chat out") from error
    return lambda text: tokenizer.encode_marked(template.render([*system, {"role": "user", "content": text}], answer_follows=True))


class Printer:
    """Prints texts one after another, in order: the first that has not ended as it comes, later ones when their turn is there."""

    def __init__(self, prompts: list[str], live: bool):
        self.prompts, self._live, self._turn = prompts, live, 0
        self._held = list(prompts)
        self._ended = [False] * len(prompts)
        if live and prompts:
            self._flush()

    def take(self, index: int, piece: str, *, ended: bool) -> None:
        """New text of one of them."""
        self._held[index] += piece
        self._ended[index] = ended
        while self._turn < len(self._held):
            if self._live or self._ended[self._turn]:
                self._flush()
            if not self._ended[self._turn]:
                break
            self._turn += 1
            print("\n" if self._turn < len(self._held) else "", flush=True)

    def _flush(self) -> None:
        print(self._held[self._turn], end="", flush=True)
        self._held[self._turn] = ""


def _write(path: Path, prompts: list[str], items: list[Completion]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for prompt, item in zip(prompts, items):
            ended = {"tokens": item.tokens, "finished": item.finished or "interrupted", "seed": item.request.sampling.seed}
            file.write(json.dumps({"prompt": prompt, "text": item.text} | ended, ensure_ascii=False) + "\n")


def _summary(opened: OpenModel, runner, items: list[Completion], *, seconds: float, interrupted: bool) -> None:
    tokens = sum(len(item.tokens) for item in items)
    itemsize = next(opened.model.parameters()).dtype.itemsize
    size = cache_bytes(opened.cfg, slots=runner.slots, capacity=runner.capacity, itemsize=itemsize)
    words = f"{tokens} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):.1f} tokens/s) on {opened.device}"
    cache = f"cache {size / 2**20:.1f} MiB for {runner.slots} x {runner.capacity} tokens"
    if runner.cache.host is not None:
        cache += f", of {len(runner.cache.host.names)} of {opened.cfg.layers} layers on the host"
    print(f"{'interrupted: ' if interrupted else ''}{words}, {cache}", file=sys.stderr)
