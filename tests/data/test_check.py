"""What is found before any rank starts."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config.run import RunConfig
from llmtrain.data.check import check_inputs
from llmtrain.data.errors import DataError
from llmtrain.data.token_file import TokenWriter
from llmtrain.data.tokenize import tokenize


@pytest.fixture
def corpus(tmp_path, sp_model, text_file):
    tokenize([str(text_file)], tmp_path / "words", tokenizer=sp_model, workers=1)
    with TokenWriter(tmp_path / "short", np.uint16) as writer:
        writer.add(range(40))
    return tmp_path


def config(folder, sp_model, **changes):
    values = {
        "tokenizer": {"path": str(sp_model)},
        "data": {"train": [{"path": str(folder / "words")}], "validation": [{"path": str(folder / "short")}]},
        "train": {"steps": 1, "seq_len": 16},
    }
    for section, change in changes.items():
        values[section] = change if section == "tokenizer" else {**values.get(section, {}), **change}
    return RunConfig.model_validate(values)


def test_good_input(corpus, sp_model):
    report = check_inputs(config(corpus, sp_model))
    assert report.vocab_size == 340
    assert [(s.where, s.name, s.documents) for s in report.sources] == [("data.train.0", "words", 1), ("data.validation.0", "short", 1)]
    assert not (corpus / ".cache").exists()  # it only looks


def test_importing_and_checking_needs_no_torch(corpus, sp_model):
    code = "import sys, llmtrain.data.check, llmtrain.data.tokenize, llmtrain.tools.data; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def break_bin(folder):
    with open(folder / "words.bin", "r+b") as file:
        file.truncate(100)


def break_vocabulary(folder):
    with TokenWriter(folder / "words", np.uint16) as writer:
        writer.add([1, 2, 340] * 40)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_bin, r"data\.train\.0: .*words\.bin: truncated: 100 bytes"),
        (lambda f: (f / "words.idx").unlink(), r"data\.train\.0: .*words\.idx: no such file"),
        (lambda f: (f / "short.idx").write_bytes(b"x" * 99), r"data\.validation\.0: .*short\.idx: not a Megatron index"),
        (break_vocabulary, r"data\.train\.0: .*words\.bin: token 2 is 340, but the vocabulary has 340 ids"),
    ],
)
def test_damaged_files(corpus, sp_model, damage, words):
    damage(corpus)
    with pytest.raises(DataError, match=words):
        check_inputs(config(corpus, sp_model))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": {"path": "none.model"}}, r"none\.model: no such tokenizer file; set tokenizer\.path"),
        ({"tokenizer": {}}, r"neither tokenizer\.path nor model\.vocab_size"),
        ({"model": {"vocab_size": 300}}, r"model\.vocab_size 300 is below the 340 of tokenizer\.path"),
        ({"data": {"train": []}}, r"data\.train is empty"),
        ({"train": {"seq_len": 100_000}}, r"data\.train\.0: words has \d+ tokens, fewer than .* lower train\.seq_len"),
        ({"train": {"seq_len": 40}}, r"data\.validation\.0: short has 40 tokens, fewer than one sample of 40 \+ 1; lower train\.seq_len"),
        ({"train": {"steps": None, "phases": [{"steps": 1}, {"steps": 1, "seq_len": 99_999}]}}, r"lower train\.phases\.1\.seq_len"),
        (
            {"train": {"steps": None, "phases": [{"steps": 1, "mix": {"wods": 1}}]}},
            r"names 'wods', which is no source; data\.train has words",
        ),
    ],
)
def test_wrong_settings(corpus, sp_model, changes, words):
    with pytest.raises(DataError, match=words):
        check_inputs(config(corpus, sp_model, **changes))


def test_cache_that_cannot_be_written(corpus, sp_model):
    cache = corpus / "words.bin" / "cache"
    with pytest.raises(DataError, match=r"data\.cache: the sample index cannot be written to .*words\.bin is not a writable folder"):
        check_inputs(config(corpus, sp_model, data={"cache": str(cache)}))


def test_another_tokenizer(corpus, hf_json, sp_model):
    changed = config(corpus, sp_model, tokenizer={"path": str(hf_json)}, model={"vocab_size": 400})
    with pytest.raises(DataError, match=r"data\.train\.0: .*words was tokenised with another tokenizer"):
        check_inputs(changed)
    copy = corpus / "copy.model"
    shutil.copy(sp_model, copy)
    check_inputs(config(corpus, sp_model, tokenizer={"path": str(copy)}))


def test_token_ids_alone(corpus, sp_model):
    assert check_inputs(config(corpus, sp_model, tokenizer={}, model={"vocab_size": 1000})).vocab_size == 1000
