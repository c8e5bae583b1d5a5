"""Models between Hugging Face, GGUF, checkpoints of DeepSpeed and Megatron-LM, and llmtrain.

llmtrain convert hf-folder runs/mine --to native --verify
llmtrain convert runs/mine hf-folder --to hf --dtype bf16
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llmtrain.config.lora import adapter_parameters
from llmtrain.config.model import ModelConfig
from llmtrain.config.pretrained import run_folder
from llmtrain.convert.adapters import is_adapter
from llmtrain.convert.export import export_hf
from llmtrain.convert.folders import whole_folder
from llmtrain.convert.peft import export_peft
from llmtrain.convert.shapes import keeps_format
from llmtrain.device.dtypes import DTYPES
from llmtrain.errors import UserError
from llmtrain.tools.history import read_config
from llmtrain.tools.model_source import ModelSource, open_source
from llmtrain.tools.native_model import write_native
from llmtrain.tools.verify_model import compare, reference_of, require_transformers, round_weights

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: list[str]) -> int:
    """`llmtrain convert SRC DST --to native|hf`."""
    options = parser().parse_args(argv)
    destination, dtype = Path(options.destination), DTYPES.get(options.dtype)
    _check_destination(Path(options.source), destination, force=options.force)
    started = time.perf_counter()
    with open_source(options.source) as source:
        apart = _apart(source, options)
        if options.verify:
            _check_verifiable(source, options.to)
        with _progress(source) as seen:
            if apart:
                adapters = ((name, source.adapters.read(name)) for name in source.adapters.names if is_adapter(name))
                beside = {"tokenizer": source.tokenizer, "companions": source.companions}
                export_peft(destination, _with_base(source), source.lora, adapters, dtype=dtype, **beside)
            elif options.to == "hf":
                _to_hf(source, destination, dtype, shard_bytes=_bytes(options.shard_size), seen=seen)
            else:
                with whole_folder(destination) as partial:
                    write_native(source, partial, final=destination, dtype=dtype, seen=seen)
        seconds = time.perf_counter() - started
        if source.left_out:
            print(source.left_out, file=sys.stderr)
        count = adapter_parameters(source.lora, source.cfg) if apart else source.parameters
        print(f"{destination}: {count:,} parameters of {source.path} ({source.kind}), written in {seconds:.1f} s")
        if options.verify:
            _verify(source, destination, to=options.to, dtype=dtype)
    return 0


def parser() -> argparse.ArgumentParser:
    """The words after `llmtrain convert`."""
    words = argparse.ArgumentParser(prog="llmtrain convert", description="Convert a model; nothing is left half written.")
    words.add_argument(
        "source",
        metavar="SRC",
        help="a Hugging Face folder, a run folder or a checkpoint in one, one of Megatron-LM's, DeepSpeed's universal one, or a .gguf file",
    )
    words.add_argument("destination", metavar="DST", help="the folder to write")
    words.add_argument("--to", choices=("native", "hf"), required=True, help="native: a run folder with weights; hf: a Hugging Face folder")
    words.add_argument("--dtype", choices=tuple(DTYPES), help="store the weights in this format (as they are)")
    words.add_argument(
        "--merge", action="store_true", help="of a run that trained adapters, the model with these added, not a PEFT adapter"
    )
    words.add_argument("--verify", action="store_true", help="compare the logits with those of transformers, in fp32")
    words.add_argument("--shard-size", default="5GB", help="largest safetensors file, with --to hf (5GB)")
    words.add_argument("--force", action="store_true", help="replace DST if it is a model's folder")
    return words


def _apart(source: ModelSource, options: argparse.Namespace) -> bool:
    """Whether a run's adapters are to be written alone."""
    if source.lora is None or options.merge:
        if options.merge and source.lora is None:
            raise UserError(f"--merge: {source.path} holds no adapters; leave it out")
        return False
    if options.to == "native" or options.verify:
        word = "--verify" if options.verify else "--to native"
        raise UserError(f"{source.path} trained adapters (lora.rank {source.lora.rank}), and {word} takes a whole model: give --merge too")
    return True


def _with_base(source: ModelSource) -> ModelConfig:
    """The model, with the name of what its adapters stand beside."""
    cfg = read_config(run_folder(source.path))
    return source.cfg.model_copy(update={"pretrained": cfg.model.pretrained})


def _to_hf(source: ModelSource, folder: Path, dtype: torch.dtype | None, *, shard_bytes: int, seen: Callable[[int], None]) -> None:
    def told() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in source.weights():
            yield name, tensor
            seen(tensor.numel())

    export_hf(folder, source.cfg, told(), dtype=dtype, shard_bytes=shard_bytes, tokenizer=source.tokenizer, companions=source.companions)


def _verify(source: ModelSource, destination: Path, *, to: str, dtype: torch.dtype | None) -> None:
    """The side that is a Hugging Face folder in transformers, the other one here: each half of the conversion is in one of them."""
    with open_source(destination) as made:
        reference, ours = (reference_of(destination), source) if to == "hf" else (_reference(source), made)
        if dtype is not None:  # both sides are to hold the rounded weights
            round_weights(reference, dtype)
            ours.tensors = _Rounded(ours.tensors, dtype)
        comparison = compare(ours, reference)
    print(f"verify: {comparison}")
    if not comparison.equal:
        raise UserError(f"{destination} does not compute what transformers does; it is kept for you to look at")


def _check_verifiable(source: ModelSource, to: str) -> None:
    require_transformers()
    kinds = {"native": "a run folder", "deepspeed": "a checkpoint of DeepSpeed", "megatron": "a checkpoint of Megatron-LM"}
    if source.kind in kinds and to == "native":
        raise UserError(f"--verify needs a side that transformers reads; from {kinds[source.kind]} to a run folder there is none")


class _Rounded:
    """Weights as they are after storing in a format."""

    def __init__(self, tensors: Any, dtype: torch.dtype):
        self._tensors, self._dtype, self.names = tensors, dtype, tensors.names

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        shape, stored = self._tensors.describe(name)
        return shape, stored if keeps_format(name) else self._dtype

    def read(self, name: str) -> torch.Tensor:
        tensor = self._tensors.read(name)
        return tensor if keeps_format(name) else tensor.to(self._dtype)


def _reference(source: ModelSource) -> Any:
    return source.reference if source.reference is not None else reference_of(source.path)


def _check_destination(source: Path, destination: Path, *, force: bool) -> None:
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if source.exists() and source.resolve() in (destination.resolve(), *destination.resolve().parents):
        raise UserError(f"{destination} is SRC or lies in it; name another folder")
    model = any((destination / name).is_file() for name in ("config.json", "config.yaml", "adapter_config.json"))
    if not force or not model:
        hint = "--force replaces it" if model else "it is no model's folder, so --force would not replace it either; name another one"
        raise UserError(f"{destination} exists; {hint}")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UserError(f"--shard-size {text!r} is not allowed; allowed: a size such as 5GB, 500MB or 1000000")
    unit = match[2].upper().removesuffix("B")
    return max(1, int(float(match[1]) * UNITS[f"{unit}B" if unit else ""]))


@contextmanager
def _progress(source: ModelSource) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not Console(stderr=True).is_terminal, transient=True) as bar:
        task = bar.add_task(f"{source.kind} {source.path.name}", total=source.parameters)
        yield lambda elements: bar.advance(task, elements)
