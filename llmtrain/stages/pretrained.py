"""`model.pretrained`: an existing model's weights into any engine, on any mesh."""

import time
from collections.abc import Callable

from llmtrain.config.model import ModelConfig
from llmtrain.config.pretrained import conflicts, departures, run_folder, stored_model, trained_adapters
from llmtrain.config.run import RunConfig
from llmtrain.config.train import CheckpointConfig
from llmtrain.convert.adapters import is_adapter
from llmtrain.convert.import_hf import left_out, load_into
from llmtrain.convert.shapes import keeps_format
from llmtrain.engine.base import Engine
from llmtrain.errors import UserError
from llmtrain.stages.session import Session
from llmtrain.train.checkpoint import Checkpointer


def check_base(cfg: RunConfig) -> None:
    """Raise UserError for adapters beside weights that nobody has trained."""
    if cfg.lora.rank and cfg.model.pretrained is None:
        raise UserError(f"lora.rank {cfg.lora.rank} trains adapters of a model that exists: give model.pretrained, or lora.rank 0")


def loader(s: Session, engine: Engine) -> Callable[[], None] | None:
    """What loads `model.pretrained` into `engine`, to be called by all ranks at a fresh start; None if the run has none."""
    return None if s.cfg.model.pretrained is None else lambda: load_pretrained(s, engine)


def load_pretrained(s: Session, engine: Engine) -> None:
    """Fill the engine's weights from `model.pretrained`; each rank reads only what it holds. Moments stay as they are, at zero.

    Raises UserError or CheckpointError if the folder is gone, is not whole, or holds another model than the configuration says.
    """
    model, started = s.cfg.model, time.perf_counter()
    if problems := conflicts(model):
        raise UserError("; ".join(f"model.{problem}" for problem in problems))
    if s.mesh.rank == 0:
        s.console.message(f"reading the weights of {model.pretrained}")
    state, stored = engine.state(), stored_model(model)
    read = _without_new_biases({key: tensor for key, tensor in state.items() if not is_adapter(key.rpartition(".")[0])}, model, stored)
    if run := run_folder(model.pretrained):
        _load_native(model.pretrained, run, read)
    else:
        weights = {key.removesuffix(".weight"): tensor for key, tensor in read.items() if key.endswith(".weight")}
        load_into(weights, model.pretrained, stored)
        if s.mesh.rank == 0 and (note := left_out(model.pretrained, stored)):
            s.console.message(note)
    engine.load_state(state)
    differing = "".join(f"; {text}" for text in departures(model))
    if s.mesh.rank == 0:
        s.console.message(f"weights: {model.pretrained}, read in {time.perf_counter() - started:.1f} s{differing}")


def _without_new_biases(state: dict, model: ModelConfig, stored: ModelConfig) -> dict:
    """What of `state` the stored model has: not the biases that its routers are given, which begin at zero."""
    if model.ffn.kind != "moe" or model.ffn.router.bias_rate is None or stored.ffn.router.bias_rate is not None:
        return state
    new = {key for key in state if keeps_format(key.removesuffix(".weight"))}
    for key in new:
        state[key].zero_()
    return {key: tensor for key, tensor in state.items() if key not in new}


def _load_native(path: str, run, state: dict) -> None:
    if trained_adapters(run).rank:
        raise UserError(
            f"model.pretrained: {path} is a run that trained adapters; add them to its weights first: "
            f"llmtrain convert {path} FOLDER --to hf --merge"
        )
    checkpointer = Checkpointer(run, CheckpointConfig(), writable=False)
    found = checkpointer.find("auto" if run.samefile(path) else path)
    if found is None:
        raise UserError(f"model.pretrained: {path} has no complete checkpoint")
    checkpointer.load(found, state, weights_only=True)
