"""What can be known to be wrong with a run's data before any rank starts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.config.data import DataSource, Source
from llmtrain.config.run import RunConfig
from llmtrain.data.errors import DataError


@dataclass(frozen=True)
class CheckedSource:
    """One source that passed."""

    where: str
    """Path of its entry in the configuration."""
    name: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class Report:
    """A run's data as it was found."""

    vocab_size: int
    sources: tuple[CheckedSource, ...]


def check_inputs(cfg: RunConfig) -> Report:
    """Open everything that the run will read and check it; no torch, no side effect.

    Checked are: the tokenizer loads and is the one that made the tokens; every pair exists and is whole; ids are below the vocabulary's
    size (all of up to 67 M tokens, blocks spread over a larger file); each source has a sample of every sequence length it is asked for;
    a phase's mix names sources; the folder of the sample index can be written.

    Raises:
        DataError: the first thing wrong, with the option to change.
    """
    from llmtrain.data.dataset import cache_folder, source_names, source_weights

    vocab_size, fingerprint = _vocabulary(cfg)
    data, sources = cfg.data, []
    if not data.train:
        raise DataError("data.train is empty; give at least one source, the prefix of a .bin/.idx pair that `llmtrain data tokenize` wrote")
    for section, group in (("data.train", data.train), ("data.validation", data.validation)):
        names = source_names(group)
        for index, source in enumerate(group):
            where = f"{section}.{index}"
            sources.append(_check_source(where, source, names[index], vocab_size=vocab_size, fingerprint=fingerprint))
    for where, seq_len, weights in _demands(cfg):
        for index, weight in enumerate(source_weights(data.train, weights)):
            if weight:
                _enough(cfg, data.train[index], sources[index], seq_len=seq_len, option=where)
    for source, checked in zip(data.validation, sources[len(data.train) :]):
        _enough(cfg, source, checked, seq_len=cfg.train.seq_len, option="train.seq_len")
    _check_cache(cache_folder(data.train, data.cache))
    if cfg.metrics.bigram_baseline and not all(isinstance(s, DataSource) for s in (*data.train, *data.validation)):
        raise DataError("metrics.bigram_baseline reads tokenised files only, and a source is of another kind; set it to false")
    return Report(vocab_size, tuple(sources))


def _vocabulary(cfg: RunConfig) -> tuple[int, str | None]:
    """The model's vocabulary size, and the tokenizer's fingerprint if there is one."""
    given = cfg.model.vocab_size
    if cfg.tokenizer.path is None:
        if given is None:
            raise DataError("neither tokenizer.path nor model.vocab_size is set; give one of them")
        return given, None
    from llmtrain.data.tokenizer import load

    tokenizer = load(cfg.tokenizer.path, cfg.tokenizer.kind)
    if given is not None and given < tokenizer.vocab_size:
        raise DataError(
            f"model.vocab_size {given} is below the {tokenizer.vocab_size} of tokenizer.path {cfg.tokenizer.path}; raise it or leave it out"
        )
    return given or tokenizer.vocab_size, tokenizer.fingerprint()


def _check_source(where: str, source: Source, name: str, *, vocab_size: int, fingerprint: str | None) -> CheckedSource:
    if not isinstance(source, DataSource):
        return CheckedSource(where, name, 0, 0)  # its size depends on the sequence length: see _enough
    from llmtrain.data.token_file import TokenFile
    from llmtrain.data.tokenize import read_notes

    try:
        file, notes = TokenFile(source.path), read_notes(source.path)
        made_by = (notes or {}).get("tokenizer")
        if fingerprint and made_by and made_by != fingerprint:
            raise DataError(
                f"{source.path} was tokenised with another tokenizer (fingerprint {made_by}, tokenizer.path has {fingerprint}); "
                f"set tokenizer.path to that one or tokenise again; if the two are the same vocabulary, delete {source.path}.json"
            )
        file.validate(vocab_size)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return CheckedSource(where, name, len(file), len(file.tokens))


def _demands(cfg: RunConfig) -> Sequence[tuple[str, int, dict[str, float] | None]]:
    """(option, sequence length, weights) of each phase."""
    train = cfg.train
    if not train.phases:
        return [("train.seq_len", train.seq_len, None)]
    options = [f"train.phases.{i}.seq_len" if p.seq_len else "train.seq_len" for i, p in enumerate(train.phases)]
    return [(option, p.seq_len or train.seq_len, p.mix) for option, p in zip(options, train.phases)]


def _enough(cfg: RunConfig, source: Source, checked: CheckedSource, *, seq_len: int, option: str) -> None:
    if not isinstance(source, DataSource):
        _try_samples(cfg, source, checked, seq_len=seq_len)
    elif checked.tokens < seq_len + 1:
        raise DataError(
            f"{checked.where}: {checked.name} has {checked.tokens} tokens, fewer than one sample of {seq_len} + 1; "
            f"lower {option}, or give the source more text"
        )


def _try_samples(cfg: RunConfig, source: Source, checked: CheckedSource, *, seq_len: int) -> None:
    """Open a source of conversations, or a plugin's, as the run will, and look at a few of its samples."""
    from llmtrain.data.dataset import cache_folder
    from llmtrain.data.sources import open_source

    try:
        cache = cache_folder(cfg.data.train, cfg.data.cache)
        options = {"seq_len": seq_len, "seed": cfg.seed, "shuffle": cfg.data.shuffle, "cache": cache, "tokenizer": cfg.tokenizer}
        samples = open_source(source, **options)
        vocab_size, _ = _vocabulary(cfg)
        for index in (0, samples.samples_per_epoch // 2, samples.samples_per_epoch - 1):
            if (largest := int(samples.sample(index).tokens.max())) >= vocab_size:
                raise DataError(f"sample {index} holds the token id {largest}, the vocabulary has {vocab_size} (model.vocab_size)")
    except DataError as error:
        raise DataError(f"{checked.where}: {error}") from error


def _check_cache(folder: Path) -> None:
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise DataError(f"data.cache: the sample index cannot be written to {folder} ({existing} is not a writable folder); set data.cache")
