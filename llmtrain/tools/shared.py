"""Tools whose model is shared by several ranks: `--tp N --pp N --ep N`."""

import argparse
import contextlib
import os
from collections.abc import Iterator

from llmtrain.config.model import ModelConfig
from llmtrain.errors import UserError
from llmtrain.tools.launch import is_launched, run_local


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --tp, --pp, --ep, --tp-chunks and --timeout."""
    parser.add_argument("--tp", type=int, default=1, help="ranks that share every layer of the model (1)")
    parser.add_argument("--pp", type=int, default=1, help="stages of consecutive layers, a rank or --tp ranks each (1)")
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts of every layer, those of --tp among them (1)")
    parser.add_argument("--tp-chunks", type=int, default=1, metavar="N", help="add up the partial sums of --tp in N tiles of a prompt (1)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a rank waits for another before the run ends (600)")


def start_ranks(verb: str, argv: list[str], options: argparse.Namespace) -> int | None:
    """Start the local ranks that the options ask for and see them through: the exit code. None if this process does the work itself."""
    given = f"--tp {options.tp} --pp {options.pp} --ep {options.ep}"
    if min(options.tp, options.pp, options.ep) < 1:
        raise UserError(f"{given}: all must be at least 1")
    if options.tp % options.ep and options.ep % options.tp:
        raise UserError(f"{given}: one of --tp and --ep must be a multiple of the other")
    if options.tp_chunks < 1 or (options.tp_chunks > 1 and options.tp == 1):
        raise UserError(f"--tp-chunks {options.tp_chunks}, --tp {options.tp}: at least 1, and above 1 with a --tp above 1 alone")
    if options.timeout <= 0:
        raise UserError(f"--timeout {options.timeout:g}: must be above 0")
    ranks = ranks_of(options)
    if ranks == 1 or is_launched():
        return None
    _check(options)
    return run_local([verb, *argv], ranks)


def ranks_of(options: argparse.Namespace) -> int:
    """How many ranks the options ask for."""
    return options.pp * max(options.tp, options.ep)


def _check(options: argparse.Namespace) -> None:
    """Refuse what the model cannot be split by before any rank starts."""
    from llmtrain.layout.stages import split_layers
    from llmtrain.parallel.ep import check_shares
    from llmtrain.parallel.tp import check_tp
    from llmtrain.tools.open_model import read_model_config

    model = read_model_config(options.model)
    axes = mesh_axes(options, model)
    if options.ep > 1 or axes["etp"] > 1:
        check_shares(model, ep=options.ep, etp=axes["etp"])
    if options.tp > 1:
        check_tp(model, options.tp)
    if options.pp > 1:
        split_layers(model, options.pp, seq_len=model.max_seq_len)


def mesh_axes(options: argparse.Namespace, model: ModelConfig) -> dict[str, int]:
    """`parallel.*` of the mesh that the options ask for.

    Experts are split by their width over the ranks of --tp, unless --ep shares them out whole.
    """
    width = options.tp if options.ep == 1 and model.ffn.kind == "moe" else 1
    replicas = max(1, options.ep // options.tp)  # of the dense parts
    return {"pp": options.pp, "tp": options.tp, "ep": options.ep, "etp": width, "dp_shard": replicas}


@contextlib.contextmanager
def shared_mesh(options: argparse.Namespace) -> Iterator:
    """The mesh of the ranks that share the model, for `open_model`; None on one. Only the first rank writes to stdout and stderr.

    A rank that others wait for longer than --timeout ends the run with a report on stderr (docs/hangs.md) and exit code 3.
    """
    if ranks_of(options) == 1:
        yield None
        return
    from llmtrain.config.train import ParallelConfig
    from llmtrain.device import select
    from llmtrain.parallel import mesh as world
    from llmtrain.parallel.hang.watch import watching
    from llmtrain.parallel.hang.where import at
    from llmtrain.tools.open_model import read_model_config

    device = select(options.device, int(os.environ.get("LOCAL_RANK", 0)))
    device.set_current()
    axes = mesh_axes(options, read_model_config(options.model))
    mesh = world.start(ParallelConfig(**axes, timeout=options.timeout), device=device)
    try:
        with watching(mesh, timeout=options.timeout, path=None), _quiet(mesh.rank > 0):
            at(phase="inference")
            yield mesh
            mesh.meet()
    finally:
        world.stop(mesh)


def open_shared(options: argparse.Namespace, mesh):
    """`open_model` with the options --device, --dtype, --checkpoint and --tp-chunks, for the mesh that `shared_mesh` gave."""
    from llmtrain.tools.open_model import open_model

    opened = open_model(options.model, device=options.device, dtype=options.dtype, checkpoint=options.checkpoint, mesh=mesh)
    if options.tp_chunks > 1:
        opened.model.set_tp_chunks(options.tp_chunks)
    return opened


@contextlib.contextmanager
def _quiet(on: bool) -> Iterator[None]:
    with contextlib.ExitStack() as streams:
        if on:
            nowhere = streams.enter_context(open(os.devnull, "w", encoding="utf-8"))
            streams.enter_context(contextlib.redirect_stdout(nowhere))
            streams.enter_context(contextlib.redirect_stderr(nowhere))
        yield
