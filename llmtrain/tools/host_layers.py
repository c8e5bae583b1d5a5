"""Layers whose keys and values stay on the host in generation: how many, and a plan of what fits (docs/long-generation.md)."""

import argparse

from llmtrain.config.cache_split import Answering, CacheSplit, cache_split, layer_bytes, longest
from llmtrain.config.model import ModelConfig
from llmtrain.errors import UserError

RESERVED = 0.05
"""Share of a device's memory left to its driver, to communicators and to fragments. Assumed, not measured."""
GIB = 2**30


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --host-layers, and --plan with --hardware and --host-memory."""
    parser.add_argument(
        "--host-layers",
        default="0",
        metavar="N|auto",
        help="first layers whose keys and values stay in the host's memory, with attention on the CPU; auto: as few as memory asks for (0)",
    )
    parser.add_argument("--plan", type=int, metavar="TOKENS", help="print what of sequences of so many tokens fits where, and end")
    parser.add_argument("--hardware", metavar="KEY", help="device for --plan, such as v100-32 (this machine's)")
    parser.add_argument("--host-memory", type=float, metavar="GIB", help="GiB of the host for --plan (what is free here)")


def check(options: argparse.Namespace) -> None:
    """Raise UserError for options that mean nothing, before any rank starts."""
    if options.host_layers != "auto" and not options.host_layers.isdecimal():
        raise UserError(f"--host-layers {options.host_layers}: allowed are auto and a number of layers from 0 on")
    if options.host_layers != "0" and options.pp > 1:
        raise UserError(f"--host-layers {options.host_layers} with --pp {options.pp}: layers on the host need --pp 1; --tp shares them")
    if options.ep > options.tp and (options.host_layers != "0" or options.plan is not None):
        raise UserError(
            f"--host-layers and --plan with --ep {options.ep} above --tp {options.tp}: ranks would keep the same cache; raise --tp"
        )
    if options.plan is None and (options.hardware or options.host_memory):
        raise UserError("--hardware and --host-memory belong to --plan, which reckons for another machine")


def plan(options: argparse.Namespace) -> str:
    """What --plan prints. Raises UserError for numbers that cannot be, or a model that fits in no way."""
    from llmtrain.hardware import load
    from llmtrain.tools.open_model import read_model_config

    model = read_model_config(options.model)
    asked = _asked(options, rows=options.batch, tokens=options.plan, itemsize=_itemsize(options.dtype))
    if options.hardware:
        name, memory = options.hardware, load(options.hardware).memory.value
    else:
        name, memory = _this_device(options)
    host = _host_memory() if options.host_memory is None else options.host_memory * GIB
    usable = (1 - RESERVED) * memory
    split = _split(model, asked, usable, where=name)
    most = [longest(model, asked, memory=usable, host=size) for size in (0, host)]
    return "\n".join(_lines(model, asked, split, name=name, memory=memory, host=host, most=most))


def _lines(model: ModelConfig, asked: Answering, split: CacheSplit, *, name: str, memory: float, host: float, most: list[int]) -> list[str]:
    sequences = f"{asked.rows} sequence{'s' * (asked.rows > 1)} of {asked.tokens:,} tokens"
    parts = split.parts | {f"cache of {split.device_layers} layers": split.device_layers * split.layer}
    rows = [f"  {part:<24} {size / GIB:9.2f} GiB" for part, size in parts.items()]
    fits = "fits" if split.host <= host else f"does not fit: the host has {host / GIB:.0f} GiB"
    return [
        f"{sequences} on {asked.ranks} x {name} of {memory / GIB:.1f} GiB, {asked.itemsize} bytes a number, --tp-chunks {asked.chunks}",
        f"on each device, {RESERVED:.0%} left free:",
        *rows,
        f"  {'together':<24} {split.device / GIB:9.2f} GiB",
        f"on the host: {split.host_layers} of {model.layers} layers, {split.host / GIB:.1f} GiB: {fits}",
        f"a layer's keys and values: {split.layer * asked.ranks / GIB:.2f} GiB over all devices",
        f"longest sequence: {most[0]:,} tokens without the host, {most[1]:,} with {host / GIB:.0f} GiB of it",
        f"the same by hand: --host-layers {split.host_layers}",
    ]


def host_blocks(options: argparse.Namespace, opened, mesh, *, slots: int, capacity: int):
    """The blocks that --host-layers keeps on the host, as a CachedRunner takes them; None for none. Raises UserError if they do not fit."""
    from llmtrain.device import select
    from llmtrain.model.host_cache import HostBlocks
    from llmtrain.ops import Call, Ops, choose

    model = opened.cfg
    dtype = next(opened.model.parameters()).dtype
    asked = _asked(options, rows=slots, tokens=capacity, itemsize=dtype.itemsize)
    device = select(opened.device.type, opened.device.index or 0) if mesh is None else mesh.device
    count = _count(options, model, asked, device)
    if count == 0:
        return None
    needed = count * layer_bytes(model, asked) * asked.ranks
    if needed > _host_memory():
        raise UserError(
            f"--host-layers {options.host_layers}: {count} layers take {needed / GIB:.1f} GiB, {_host_memory() / GIB:.1f} are free"
        )
    heads = {"head_dim": model.head_dim, "value_head_dim": model.value_head_dim, "heads": model.attention.heads, "kv_heads": model.kv_heads}
    call = Call(device="cpu", dtype=dtype, backward=False, window=model.attention.window, offsets=True, **heads)
    ops = Ops({op: choose(op, call) for op in ("attention", "decode_attention")})
    return HostBlocks([str(i) for i in range(count)], copies=device.host_copies(), ops=ops)


def _count(options: argparse.Namespace, model: ModelConfig, asked: Answering, device) -> int:
    if options.host_layers == "auto":
        return _split(model, asked, (1 - RESERVED) * device.memory().total, where=device.kind).host_layers
    count = int(options.host_layers)
    if count > model.layers:
        raise UserError(f"--host-layers {count}: the model has {model.layers} layers")
    return count


def _split(model: ModelConfig, asked: Answering, usable: float, *, where: str) -> CacheSplit:
    split = cache_split(model, asked, memory=usable)
    if split is None:
        raise UserError(
            f"{asked.rows} x {asked.tokens:,} tokens: weights and a prompt's pass alone exceed the {usable / GIB:.1f} GiB of {where} that "
            f"can be used; raise --tp or --tp-chunks, or lower --batch or the number of tokens"
        )
    return split


def _asked(options: argparse.Namespace, *, rows: int, tokens: int, itemsize: int) -> Answering:
    if tokens < 1:
        raise UserError(f"--plan {tokens}: give a number of tokens from 1 on")
    return Answering(rows=rows, tokens=tokens, ranks=options.tp, itemsize=itemsize, chunks=options.tp_chunks)


def _itemsize(dtype: str) -> int:
    from llmtrain.config.parameters import BYTES

    return BYTES.get(dtype, BYTES["fp16"])  # auto: most models are stored in 16 bits


def _host_memory() -> int:
    import psutil

    return psutil.virtual_memory().available


def _this_device(options: argparse.Namespace) -> tuple[str, int]:
    from llmtrain.device import select

    device = select(options.device)
    return device.name(), device.memory().total
