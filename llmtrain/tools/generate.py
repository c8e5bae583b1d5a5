"""Text from a trained model.

llmtrain generate runs/quickstart -p "ROMEO:"
"""

import argparse
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from llmtrain.config.run import RunConfig
from llmtrain.config.train import PrecisionConfig
from llmtrain.device import select
from llmtrain.device.dtypes import torch_dtype
from llmtrain.errors import UserError
from llmtrain.layout.steps import StepPlan
from llmtrain.model import family
from llmtrain.model.cache import KVCache
from llmtrain.ops import Mask, resolve
from llmtrain.tools.history import read_config
from llmtrain.train import checkpoint_files, checkpoint_state
from llmtrain.train.checkpoint import Checkpointer


def main(argv: list[str]) -> int:
    """`llmtrain generate RUN -p TEXT`: print the prompt and its continuation, in one process on the CPU."""
    options = _parse(argv)
    cfg = _config(options.run)
    tokenizer = _tokenizer(cfg)
    prompt = tokenizer.encode(options.prompt)
    longest = len(prompt) + options.max_new
    if longest > cfg.model.max_seq_len:
        asked = f"a prompt of {len(prompt)} tokens and --max-new {options.max_new}"
        raise UserError(f"{asked} exceed model.max_seq_len {cfg.model.max_seq_len}; lower --max-new")
    model = load_model(cfg, checkpoint=_checkpoint(options.run, cfg, options.checkpoint))
    tokens = sample(
        cached_logits(model, capacity=longest),
        prompt,
        max_new=options.max_new,
        seed=options.seed,
        temperature=options.temperature,
        top_p=options.top_p,
        stop_ids=(tokenizer.eod_id,),
    )
    print(tokenizer.decode(tokens))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="llmtrain generate", description="Continue a text with the newest checkpoint of a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder, such as runs/quickstart")
    parser.add_argument("-p", "--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new", type=int, default=120, help="tokens to add at most (120)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of the probability that is drawn from (0.95)")
    parser.add_argument("--seed", type=int, default=1234, help="the same seed gives the same text (1234)")
    parser.add_argument("--checkpoint", default="auto", help="a checkpoint folder; the newest complete one of RUN if not given")
    return parser.parse_args(argv)


def _config(run: Path) -> RunConfig:
    cfg = read_config(run)
    if cfg is None:
        raise UserError(f"{run} is no run folder: it has no config.yaml")
    if cfg.plugins:
        from llmtrain.plugins import load_plugins

        load_plugins(cfg.plugins)
    return cfg


def _tokenizer(cfg: RunConfig):
    from llmtrain.data.tokenizer import load

    if cfg.tokenizer.path is None:
        raise UserError("the run has no tokenizer (tokenizer.path), so there is no text to read or write")
    return load(cfg.tokenizer.path, cfg.tokenizer.kind)


def _checkpoint(run: Path, cfg: RunConfig, wanted: str) -> Path:
    path = Checkpointer(run, cfg.checkpoint, writable=False).find(wanted)
    if path is None:
        raise UserError(
            f"{run} has no complete checkpoint; give --checkpoint, or train longer than checkpoint.every {cfg.checkpoint.every}"
        )
    return path


@torch.no_grad()
def load_model(cfg: RunConfig, *, checkpoint: Path) -> nn.Module:
    """The model of a run with the weights of `checkpoint` (moments are not read), on the CPU in the format of precision.params.

    Its RoPE base is that of the phase the checkpoint ends in. Raises CheckpointError if the weights do not fit.
    """
    from llmtrain.stages.session import op_call

    here = cfg.model_copy(update={"precision": PrecisionConfig(compute=cfg.precision.params)})
    ops = resolve({}, op_call(here, select("cpu")))  # cfg.kernels may name kernels of the device trained on
    with torch.device("meta"):
        model = family.build(cfg.model, ops, cfg.train.loss_chunk).to(torch_dtype(cfg.precision.params))
    model.to_empty(device="cpu").eval()
    weights = {f"{name}.weight": parameter.detach() for name, parameter in model.named_parameters()}
    metadata = checkpoint_state.read_metadata(checkpoint)
    _require_weights(checkpoint, weights, metadata)
    checkpoint_state.read(checkpoint, weights, metadata)
    if cfg.model.position.kind == "rope":
        step = json.loads((checkpoint / checkpoint_files.META).read_bytes())["step"]
        model.set_rope_base(StepPlan.from_config(cfg).step(step - 1).rope_base)
    return model


def _require_weights(checkpoint: Path, weights: dict[str, Tensor], metadata) -> None:
    stored = metadata.state_dict_metadata
    named = {name for name in stored if name.endswith(".weight")}
    wrong = sorted(named ^ set(weights)) or sorted(n for n, w in weights.items() if tuple(stored[n].size) != tuple(w.shape))
    if wrong:
        raise checkpoint_files.CheckpointError(f"{checkpoint} does not fit the run's config.yaml: {', '.join(wrong[:5])}")


def next_token(logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token id from logits [V].

    `temperature` 0 takes the likeliest (the lowest id of equals). Else draws from softmax(logits / temperature) cut to its nucleus: the
    likeliest tokens until their probabilities reach `top_p` (arXiv 1904.09751). Computed in float64 on the CPU, so that equal logits and
    generator state give an equal token everywhere.
    """
    logits = logits.detach().to("cpu", torch.float64)
    if not torch.isfinite(logits).any():
        raise UserError("no logit is finite: the model's weights hold NaN or infinities")
    if temperature == 0:
        return int(logits.argmax())
    probabilities, ids = torch.softmax(logits / temperature, -1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities * (before < top_p)  # the first always stays
    return int(ids[torch.multinomial(kept, 1, generator=generator)])


def sample(
    logits_fn: Callable[[Tensor], Tensor],
    tokens: Sequence[int],
    *,
    max_new: int,
    seed: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    stop_ids: Collection[int] = (),
) -> list[int]:
    """`tokens` and up to `max_new` more, drawn from `logits_fn`: tokens [1,S] int64 -> logits [1,V] of the last position.

    A token of `stop_ids` ends it and is not returned. The same seed and logits give the same tokens. Raises UserError for an empty
    prompt, a negative temperature or a top_p outside (0, 1].
    """
    if not tokens:
        raise UserError("the prompt is empty; give at least one token")
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"temperature {temperature} and top_p {top_p}: allowed are temperature >= 0 and 0 < top_p <= 1")
    generator = torch.Generator().manual_seed(seed)
    result = list(tokens)
    for _ in range(max_new):
        logits = logits_fn(torch.tensor([result]))[0]
        token = next_token(logits, temperature=temperature, top_p=top_p, generator=generator)
        if token in stop_ids:
            break
        result.append(token)
    return result


def cached_logits(model, *, capacity: int) -> Callable[[Tensor], Tensor]:
    """A `logits_fn` for `sample` that runs `model` on the new tokens only, keys and values of the earlier ones being kept.

    `model` as in docs/interfaces.md, on one rank; `capacity` is the longest sequence in tokens. Calls must extend one another.
    """
    cache = KVCache(capacity)
    device = next(model.parameters()).device

    @torch.no_grad()
    def logits(tokens: Tensor) -> Tensor:
        new = tokens[:, cache.length :].to(device)
        return model(new, positions=cache.positions(new), mask=Mask(), cache=cache)["logits"][:, -1]

    return logits
