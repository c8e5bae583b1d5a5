"""A run small enough to start for real, and the command that writes job files."""

from collections.abc import Callable
from pathlib import Path

import pytest
from job_files import ROOT, llmtrain

TINY = """
name: tiny
model: {vocab_size: 340, layers: 1, hidden: 32, attention: {heads: 2}, ffn: {hidden: 48}}
tokenizer: {path: tok.model}
data: {train: [words]}
train: {steps: 3, seq_len: 32, global_batch: 4, micro_batch: 1, compile: 'off'}
parallel: {dp_shard: -1}
"""


@pytest.fixture
def write(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Write a job file in this process; returns its path. The words after the kind are those of the command line."""
    from llmtrain.tools.jobs.verb import main

    monkeypatch.chdir(tmp_path)

    def go(kind: str, *words: str, config: Path = ROOT / "configs" / "llama3_8b.yaml") -> Path:
        out = tmp_path / f"job-{len(list(tmp_path.glob('job-*')))}"
        assert main([kind, "-c", str(config), "--out", str(out), *words]) == 0
        return out

    return go


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with a configuration, a tokenizer and tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "words.txt").write_text("\n\n".join(f"In year {n} the king said {n * n} words to the queen." for n in range(600)))
    tokenizer = ["data", "tokenizer", "--input", "words.txt", "--vocab-size", "340", "--out", "tok.model"]
    tokens = ["data", "tokenize", "--input", "words.txt", "--tokenizer", "tok.model", "--out", "words"]
    for words in (tokenizer, tokens):
        done = llmtrain(words, folder)
        assert done.returncode == 0, done.stderr
    return folder
