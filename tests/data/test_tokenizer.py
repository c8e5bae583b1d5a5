"""Tokenizers: the library's own ids, exact round trips, the end-of-document token, clear errors."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from llmtrain.data.errors import DataError
from llmtrain.data.tokenizer import SentencePieceTokenizer, load
from llmtrain.data.train_tokenizer import sample, train_sentencepiece

any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60)
lines = st.lists(st.sampled_from(["the king", " queen  of", "", "\t", "night\r", "  ", "中文 𝔘"]), max_size=40).map("\n".join)


@settings(max_examples=150, deadline=None)
@given(text=any_text | lines)
def test_sentencepiece_gives_every_text_back(sp_model, text):
    tokenizer = load(sp_model)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=80, deadline=None)
@given(text=any_text | lines)
def test_hf_gives_every_text_back(hf_json, text):
    tokenizer = load(hf_json)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<|endoftext|>", "")


@settings(max_examples=80, deadline=None)
@given(texts=st.lists(any_text | lines, max_size=6))
def test_batches_have_the_librarys_ids(sp_model, hf_json, texts):
    library = SentencePieceProcessor(model_file=str(sp_model))
    for path, wanted in ((sp_model, [library.encode(t) for t in texts]), (hf_json, [load(hf_json).encode(t) for t in texts])):
        tokenizer = load(path)
        tokens, lengths = tokenizer.encode_flat(texts)
        assert lengths.tolist() == [len(w) for w in wanted]
        assert tokens.tolist() == [i for w in wanted for i in w]
        assert tokenizer.encode_batch(texts) == wanted


def test_lines_are_encoded_apart_only_where_that_is_the_same(tmp_path, text_file):
    """A model with a dummy prefix would put it before every line."""
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        input=str(text_file),
        model_prefix=str(tmp_path / "dummy"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    library = SentencePieceProcessor(model_file=str(tmp_path / "dummy.model"))
    tokenizer = load(tmp_path / "dummy.model")
    texts = ["the king\n" * 20, "queen\n\n  night"]
    assert tokenizer.encode_batch(texts) == library.encode(texts)


def test_properties(sp_model, hf_json):
    ours, theirs = load(sp_model), load(hf_json)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.eod_id) == (340, 1, 2, 2)
    assert (theirs.vocab_size, theirs.bos_id, theirs.eos_id, theirs.eod_id) == (320, None, None, 0)
    assert ours.piece(2) == "</s>"
    assert theirs.piece(0) == "<|endoftext|>"
    assert ours.fingerprint() != theirs.fingerprint()


def test_copy_and_load_from_a_folder(tmp_path, sp_model, hf_json):
    config = {"eos_token": {"content": "<|endoftext|>"}}
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(hf_json, source / "my.json")
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(source / "my.json")
    assert tokenizer.eos_id == 0
    tokenizer.copy_to(tmp_path / "out")
    load(sp_model).copy_to(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert load(tmp_path / "out").vocab_size == 320
    assert isinstance(load(tmp_path / "out", "sentencepiece"), SentencePieceTokenizer)
    assert load(tmp_path / "out").fingerprint() == tokenizer.fingerprint()


def test_kind_by_content(tmp_path, sp_model, hf_json):
    shutil.copy(sp_model, tmp_path / "tokenizer.model.v3")
    shutil.copy(hf_json, tmp_path / "vocabulary")
    assert load(tmp_path / "tokenizer.model.v3").vocab_size == 340
    assert load(tmp_path / "vocabulary").vocab_size == 320


def test_document_end_of_a_sentencepiece_model(tmp_path, text_file):
    path = train_sentencepiece([str(text_file)], tmp_path / "x.model", vocab_size=340, symbols=["<eod>", "<chat>"])
    tokenizer = load(path)
    assert tokenizer.piece(tokenizer.eod_id) == "<eod>"
    assert len(tokenizer.encode("<chat>")) == 1


@pytest.mark.parametrize(
    ("name", "content", "kind", "words"),
    [
        ("x.model", b"nonsense", "auto", r"x\.model: not a sentencepiece model"),
        ("x.model", b"", "auto", r"x\.model: not a sentencepiece model \(the file is empty\)"),
        ("tokenizer.json", b"{}", "auto", r"tokenizer\.json: not a tokenizer\.json"),
        ("tokenizer.json", b"{}", "bpe", r"tokenizer\.kind 'bpe' is not one of auto, sentencepiece, hf"),
    ],
)
def test_wrong_files(tmp_path, name, content, kind, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        load(tmp_path / name, kind)


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match=r"none: no such tokenizer file"):
        load(tmp_path / "none")
    with pytest.raises(DataError, match=r"does not hold tokenizer\.json or one \.model file"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["{broken", "[1]", '{"eos_token": {"id": 3}}'])
def test_broken_tokenizer_config(tmp_path, hf_json, content):
    shutil.copy(hf_json, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not a tokenizer_config\.json .*move it away from tokenizer\.json"):
        load(tmp_path)


def test_no_document_end(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no token to end a document with"):
        load(tmp_path)


SIZES = [
    (100, "is below 260"),
    (261, r"Increase --vocab-size or lower --coverage\."),
    (90_000, r"--vocab-size 90000: Vocabulary size too high .* <= \d+"),
]


@pytest.mark.parametrize(("size", "words"), SIZES)
def test_vocabulary_size_that_does_not_fit(tmp_path, text_file, size, words):
    with pytest.raises(DataError, match=words):
        train_sentencepiece([str(text_file)], tmp_path / "x.model", vocab_size=size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("max_lines", [200, 10**6])
def test_training_again_gives_the_same_bytes(tmp_path, text_file, max_lines):
    """On any number of CPUs, and also where a sample of the lines is taken."""
    code = (
        "import os, sys; from llmtrain.data.train_tokenizer import train_sentencepiece; "
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
        f"train_sentencepiece([sys.argv[1]], sys.argv[2], vocab_size=320, max_lines={max_lines})"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(text_file), str(tmp_path / "a.model")], check=True, cwd=root)
    train_sentencepiece([str(text_file)], tmp_path / "b.model", vocab_size=320, max_lines=max_lines)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_sample_is_spread_over_the_lines():
    chosen = sample(map(str, range(10_000)), 1000)
    assert len(set(chosen)) == 1000
    assert chosen == sample(map(str, range(10_000)), 1000)
    counts = np.bincount([int(line) // 1000 for line in chosen], minlength=10)
    assert counts.min() > 60
    assert counts.max() < 140
    assert sample(["a", "b"], 2) == ["a", "b"]


def test_errors_of_the_input_pass_through_training(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8"):
        train_sentencepiece([str(tmp_path)], tmp_path / "x.model", vocab_size=300)


def test_long_lines_are_trained_on(tmp_path):
    """The library leaves out lines above 4,192 bytes without a word."""
    (tmp_path / "a.txt").write_text("abracadabra " * 1000)
    tokenizer = load(train_sentencepiece([str(tmp_path / "a.txt")], tmp_path / "x.model", vocab_size=270))
    assert len(tokenizer.encode("abracadabra ")) < 6
    assert np.max(tokenizer.encode("abracadabra")) >= 259
