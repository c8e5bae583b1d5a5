"""A model to generate with or to evaluate: a run folder, converted or trained, or a Hugging Face folder."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmtrain.config.lora import adapted
from llmtrain.config.model import ModelConfig
from llmtrain.config.pretrained import pretrained_tokenizer
from llmtrain.config.run import RunConfig
from llmtrain.convert.adapters import A, B, added, is_adapter
from llmtrain.convert.companions import token_ids
from llmtrain.convert.hf_read import model_config, read_config
from llmtrain.convert.import_hf import left_out, load_into
from llmtrain.convert.placed import fill, held, local_part
from llmtrain.data.tokenizer import Tokenizer, load
from llmtrain.device import Device, select
from llmtrain.device.dtypes import DTYPES, torch_dtype
from llmtrain.errors import UserError
from llmtrain.layout.steps import StepPlan
from llmtrain.model import family
from llmtrain.ops import Call, resolve
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.serve import SharedModel, share
from llmtrain.tools import history
from llmtrain.train import checkpoint_files, checkpoint_state
from llmtrain.train.checkpoint import Checkpointer


class OpenModel(NamedTuple):
    """A model in evaluation mode on its device, and what it needs to read and write text."""

    model: nn.Module
    cfg: ModelConfig
    tokenizer: Tokenizer | None
    """None if the folder has none."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a text."""
    prefix: tuple[int, ...] = ()
    """Tokens that stand in front of every text (a beginning-of-sequence token, where the model was trained with one)."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def encode(self, text: str) -> list[int]:
        """Ids of a text, the prefix in front. Raises UserError without a tokenizer."""
        return [*self.prefix, *self.need_tokenizer().encode(text)]

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer; UserError if there is none."""
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer (tokenizer.path of its config.yaml), so there is no text to read or write")
        return self.tokenizer


def open_model(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    checkpoint: str = "auto",
    mesh: Mesh | None = None,
    local_rank: int = 0,
) -> OpenModel:
    """Read a model.

    Args:
        path: a run folder (config.yaml with checkpoints/), or a Hugging Face folder (config.json with safetensors).
        device: `auto`, `cpu`, `cuda` or `npu`.
        dtype: `fp64`, `fp32`, `bf16`, `fp16`, or `auto`: as stored, but fp32 for 16-bit weights on the CPU, which computes faster in it.
        checkpoint: of a run folder, the checkpoint's folder; the newest complete one if `auto`.
        mesh: share the model over its axes pp, tp, ep and etp; all ranks call this, and the model, together.
        local_rank: without a mesh, which of this machine's devices.

    Raises:
        UserError: no such folder, no complete checkpoint, weights that do not fit, a model that cannot be read.
    """
    path = Path(path)
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype {dtype!r}: allowed are auto, {', '.join(DTYPES)}")
    place = _place(device, mesh, local_rank)
    cfg = history.read_config(path)
    if cfg is not None:
        return _open_run(path, cfg, place, dtype, checkpoint, mesh)
    _require_hf(path)
    return _open_hf(path, place, dtype, mesh)


def read_model_config(path: str | Path) -> ModelConfig:
    """The shape of the model in `path`, as in `open_model`; raises UserError if there is none."""
    cfg = history.read_config(Path(path))
    if cfg is not None:
        return cfg.model
    _require_hf(Path(path))
    return model_config(Path(path))


def _require_hf(path: Path) -> None:
    if not (path / "config.json").is_file():
        what = "a GGUF file; `llmtrain convert` makes a folder of it" if path.suffix == ".gguf" else "neither"
        if (path / "adapter_config.json").is_file():
            what = "an adapter alone; give the run that trained it, or merge it: llmtrain convert RUN FOLDER --to hf --merge"
        raise UserError(f"{path} is no run folder (config.yaml) and no Hugging Face folder (config.json): it is {what}")


def load_model(cfg: RunConfig, *, checkpoint: Path, device: str = "cpu", dtype: str = "auto", mesh: Mesh | None = None) -> nn.Module:
    """The model of a run with the weights of `checkpoint` (moments are not read); other arguments as in `open_model`.

    Adapters are added to them. Its RoPE base is that of the phase the checkpoint ends in. Raises CheckpointError if the weights do not fit.
    """
    return _load(cfg, checkpoint, _place(device, mesh), dtype, mesh)


def _load(cfg: RunConfig, checkpoint: Path, place: Device, dtype: str, mesh: Mesh | None) -> nn.Module:
    model = empty_model(cfg.model, place, _compute_dtype(torch_dtype(cfg.precision.params), place, dtype), mesh)
    weights = {f"{name}.weight": tensor for name, tensor in weights_of(model).items()}
    metadata = checkpoint_state.read_metadata(checkpoint)
    _require_weights(checkpoint, weights, metadata, whole=mesh is None or mesh.shape.pp == 1)
    _read(checkpoint, weights, metadata)
    if cfg.lora.rank:
        _add_adapters(checkpoint, weights, metadata, cfg)
    step = json.loads((checkpoint / checkpoint_files.META).read_bytes())["step"]
    if cfg.model.position.kind == "rope" and step > 0:
        model.set_rope_base(StepPlan.from_config(cfg).step(step - 1).rope_base)
    return model


def _open_run(run: Path, cfg: RunConfig, place: Device, dtype: str, wanted: str, mesh: Mesh | None) -> OpenModel:
    if cfg.plugins:
        from llmtrain.plugins import load_plugins

        load_plugins(cfg.plugins)
    checkpoint = Checkpointer(run, cfg.checkpoint, writable=False).find(wanted)
    if checkpoint is None:
        every = cfg.checkpoint.every
        raise UserError(f"{run} has no complete checkpoint; give --checkpoint, or train longer than checkpoint.every {every}")
    tokenizer = run_tokenizer(run, cfg)
    model = _load(cfg, checkpoint, place, dtype, mesh)
    return OpenModel(model, cfg.model, tokenizer, (tokenizer.eod_id,) if tokenizer else ())


def run_tokenizer(run: Path, cfg: RunConfig) -> Tokenizer | None:
    """The tokenizer of a run: where tokenizer.path says, else in its folder `tokenizer`; None if the run has none."""
    named, own = cfg.tokenizer.path, run / "tokenizer"
    if named is not None and (Path(named).exists() or not own.exists()):
        return load(named, cfg.tokenizer.kind)
    return load(own, cfg.tokenizer.kind) if own.exists() else None


def _open_hf(folder: Path, place: Device, dtype: str, mesh: Mesh | None) -> OpenModel:
    cfg, config = model_config(folder), read_config(folder)
    stored = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), torch.float32)
    model = empty_model(cfg, place, _compute_dtype(stored, place, dtype), mesh)
    load_into(weights_of(model), folder, cfg)
    if note := left_out(folder, cfg):
        print(note, file=sys.stderr)
    tokenizer = load(folder) if pretrained_tokenizer(folder) else None
    return OpenModel(model, cfg, tokenizer, stop_ids_of(folder, tokenizer), prefix_of(folder, tokenizer))


def _place(device: str, mesh: Mesh | None, local_rank: int = 0) -> Device:
    """The rank's own device if several share the model."""
    return select(device, local_rank) if mesh is None else mesh.device


def _compute_dtype(stored: torch.dtype, place: Device, wanted: str) -> torch.dtype:
    if wanted != "auto":
        dtype = torch_dtype(wanted)
    else:
        dtype = torch.float32 if place.kind == "cpu" and stored.itemsize == 2 else stored
    reason = place.unsupported_dtype(dtype)
    if reason:
        raise UserError(f"--dtype {wanted}: {reason}")
    return dtype


def empty_model(cfg: ModelConfig, place: Device, dtype: torch.dtype, mesh: Mesh | None = None) -> nn.Module:
    """The model of `cfg`, or this rank's part of it, in evaluation mode, its parameters in `dtype` on `place` and not yet filled.

    No expert is ever full: a capacity belongs to training, where a token's place may depend on those after it, and on other sequences.
    """
    call = Call(
        device=place.kind,
        dtype=dtype,
        capability=place.capability(),
        backward=False,
        head_dim=cfg.head_dim,
        value_head_dim=cfg.value_head_dim,
        heads=cfg.attention.heads,
        kv_heads=cfg.kv_heads,
        window=cfg.attention.window,
        expert_widths=(cfg.ffn.descend or cfg.hidden, cfg.ffn.hidden // (mesh.shape.etp if mesh else 1)) if cfg.ffn.kind == "moe" else (),
    )
    if cfg.ffn.kind == "moe":
        cfg = cfg.model_copy(update={"ffn": cfg.ffn.model_copy(update={"capacity": None})})
    with torch.device("meta"):
        model = family.build(cfg, resolve({}, call), None).to(dtype)
        if mesh is not None:
            model = share(model, mesh)
    return model.to_empty(device=place.torch_device).eval().requires_grad_(False)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers (biases of routers) by canonical name, as far as this rank holds them."""
    part = model.part if isinstance(model, SharedModel) else model
    return {name: tensor.detach() for name, tensor in (*part.named_parameters(), *part.named_buffers())}


def _read(checkpoint: Path, weights: dict[str, Tensor], metadata) -> None:
    """Fill `weights` in place. The reader wants whole CPU tensors of the stored format, so others are copied over, one at a time."""
    stored = {name: metadata.state_dict_metadata[name].properties.dtype for name in weights}
    direct = {name: w for name, w in weights.items() if w.device.type == "cpu" and w.dtype == stored[name] and not isinstance(w, DTensor)}
    checkpoint_state.read(checkpoint, direct, metadata)
    for name in weights.keys() - direct.keys():
        weight = weights[name]
        whole = torch.empty(weight.shape, dtype=stored[name])
        checkpoint_state.read(checkpoint, {name: whole}, metadata)
        place = held(weight)
        fill(weight, whole[tuple(slice(part[0], part[-1] + 1) for part in place)], place)


@torch.no_grad()
def _add_adapters(checkpoint: Path, weights: dict[str, Tensor], metadata, cfg: RunConfig) -> None:
    """Add the run's adapters to this rank's part of the projections."""
    for projection in adapted(cfg.lora, cfg.model):
        weight = weights.get(f"{projection}.weight.weight")
        if weight is None:  # another stage's
            continue
        keys = {kind: f"{projection}.{kind}.weight" for kind in (A, B)}
        entries = {key: metadata.state_dict_metadata[key] for key in keys.values()}
        pair = {key: torch.empty(tuple(entry.size), dtype=entry.properties.dtype) for key, entry in entries.items()}
        checkpoint_state.read(checkpoint, pair, metadata)
        (rows, columns), local = (torch.tensor(list(part)) for part in held(weight)), local_part(weight)
        local.copy_(added(local, pair[keys[A]][:, columns], pair[keys[B]][rows], cfg.lora.scale))


def _require_weights(checkpoint: Path, weights: dict[str, Tensor], metadata, *, whole: bool) -> None:
    """`whole`: the checkpoint must hold nothing else; a stage of a pipeline needs some of it."""
    stored = {name for name in metadata.state_dict_metadata if name.endswith(".weight") and not is_adapter(name.removesuffix(".weight"))}
    if problems := checkpoint_state.misfits(weights, metadata, stored if whole else stored & weights.keys()):
        raise checkpoint_files.CheckpointError(f"{checkpoint} does not fit the run's config.yaml: {'; '.join(problems[:5])}")


def stop_ids_of(folder: Path, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The end tokens that the folder's own files name, else the tokenizer's."""
    given = token_ids(folder).get("eos_token_id", tokenizer.eod_id if tokenizer else ())
    return tuple(given) if isinstance(given, Iterable) else (int(given),)


def prefix_of(folder: Path, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """What the model's own tokenizer puts in front of a text: by tokenizer.json's post-processor, else by tokenizer_config.json."""
    if tokenizer is None:
        return ()
    if tokenizer.standard_name == "tokenizer.json":
        from tokenizers import Tokenizer as Library

        library = Library.from_file(str(tokenizer.path))
        plain, special = (library.encode("a", add_special_tokens=flag).ids for flag in (False, True))
        return tuple(special[: next((i for i in range(len(special)) if special[i : i + len(plain)] == plain), 0)])
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return (tokenizer.bos_id,) if values.get("add_bos_token", True) and tokenizer.bos_id is not None else ()
