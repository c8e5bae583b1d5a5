"""Streamed text equals the text of all tokens, never shows part of a character, and ends before a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.text_stream import BROKEN, TextStream
from llmtrain.data.tokenizer import load


class Bytes:
    """A tokenizer of bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory):
    """A byte-level BPE whose merges cut characters, as GPT-2's do."""
    from tokenizers import ByteLevelBPETokenizer

    library = ByteLevelBPETokenizer()
    library.train_from_iterator(["the king and the queen, the 你好世界 über naïve"] * 20, vocab_size=290, special_tokens=["<|endoftext|>"])
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    library.save(str(path))
    return load(path)


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory):
    """A sentencepiece model with byte fallback, which drops the space before a first word."""
    import sentencepiece as spm

    prefix = tmp_path_factory.mktemp("sp") / "m"
    texts = iter(["the king and the queen said to the other king", "a queen is a king"] * 30)
    spm.SentencePieceTrainer.train(
        sentence_iterator=texts, model_prefix=str(prefix), vocab_size=300, model_type="bpe", byte_fallback=True, minloglevel=2
    )
    return load(f"{prefix}.model")


@pytest.fixture(params=["bytes", "byte_level", "sentencepiece"])
def tokenizer(request):
    return Bytes() if request.param == "bytes" else request.getfixturevalue(request.param)


TEXTS = ["the king", " and the queen", "你好, 世界!", "naïve 🎉 family 👩‍👩‍👧", "\n\n  two  spaces \t", "plain"]


@pytest.mark.parametrize("prompt", ["", "the king", "你"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(tokenizer, prompt, text):
    whole = tokenizer.encode(prompt + text)
    first = tokenizer.encode(prompt)
    tokens = whole[len(first) :] if whole[: len(first)] == first else tokenizer.encode(text)
    expected = tokenizer.decode([*first, *tokens])[len(tokenizer.decode(first)) :]
    stream = TextStream(tokenizer, first)
    pieces = [stream.push([token]) for token in tokens]
    assert BROKEN not in "".join(pieces)
    assert "".join([*pieces, stream.finish()]) == stream.text == expected


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=24) | st.text(max_size=10).map(str.encode), cuts=st.lists(st.integers(1, 3), max_size=24))
def test_any_bytes_at_all(data, cuts):
    """Also bytes that are no UTF-8 come out as the decoder writes them all at once."""
    stream, rest, out = TextStream(Bytes()), list(data), ""
    for cut in [*cuts, len(data)]:
        part, rest = rest[:cut], rest[cut:]
        out += stream.push(part) if part else ""
        assert data.decode(errors="replace").startswith(out)
    assert out + stream.finish() == data.decode(errors="replace")


def test_a_character_is_shown_when_it_is_whole():
    stream = TextStream(Bytes())
    assert [stream.push([b]) for b in "a€b".encode()] == ["a", "", "", "€", "b"]
    broken = TextStream(Bytes())
    assert "".join(broken.push([0xFF]) for _ in range(10)) == BROKEN * 7, "bytes that can never be a character are not held for ever"


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("abX", max_size=14), stop=st.lists(st.text("abX", min_size=1, max_size=4), min_size=1, max_size=2), size=st.integers(1, 4)
)
def test_stop_strings_across_pieces(text, stop, size):
    found = [text.find(s) for s in stop if s in text]
    # With pieces of several characters two stop strings may be completed at once; then the one that begins first counts.
    stream, out = TextStream(Bytes(), stop=stop), ""
    for i in range(0, len(text), size):
        out += stream.push(list(text[i : i + size].encode()))
        assert not any(s in out for s in stop)
    out += stream.finish()
    assert stream.stopped == bool(found) and stream.text == out
    if found:
        ends = {text.find(s): text.find(s) + len(s) for s in stop if s in text}
        first_complete = min(ends.values())
        seen = text[: -(-first_complete // size) * size]
        assert out == text[: min(seen.find(s) for s in stop if s in seen)]
    else:
        assert out == text
    assert stream.push([65]) == "" or not stream.stopped


def test_what_may_become_a_stop_string_is_held_back():
    stream = TextStream(Bytes(), stop=["END", "\n\n"])
    assert [stream.push([b]) for b in b"xEN"] == ["x", "", ""]
    assert stream.push(b"ds") == "ENds"
    assert stream.push(b"\n") == "" and stream.push(b"y") == "\ny"
    assert stream.push(b"\n") + stream.push(b"\nrest") == "" and stream.stopped and stream.text == "xENds\ny"
    with pytest.raises(ValueError, match="empty"):
        TextStream(Bytes(), stop=[""])


def test_a_stop_string_in_the_prompt_does_not_count():
    stream = TextStream(Bytes(), list(b"one END"), stop=["END"])
    assert stream.push(b" two") == " two" and not stream.stopped
    assert TextStream(Bytes(), list(b"EN"), stop=["END"]).push(b"D") == "D"
