"""Merged vocabularies: sizes, shares, exact text, and merges that really happen."""

import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from llmtrain.data.domain_vocabulary import Domain, merge_models, train_domains
from llmtrain.data.errors import DataError
from llmtrain.data.tokenizer import load
from llmtrain.data.train_tokenizer import RESERVED, train_bytes

SIZE = 700


def invented_lines(alphabet, seed, count=300):
    """Lines over 300 invented words of one alphabet."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(alphabet, k=draw.randint(2, 9))) for _ in range(300)]
    return [" ".join(draw.choices(words, k=8)) for _ in range(count)]


def train(lines, size):
    return train_bytes(
        iter(lines), vocab_size=size, byte_fallback=True, character_coverage=1.0, symbols=(), max_lines=10**6, exact_size=False
    )


DOMAINS = {"latin": string.ascii_lowercase, "greek": "αβγδεζηθικλμνξοπρστυφχψω", "mixed": "abcdefαβγδε0123456789_(){}"}


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("domains")
    domains = []
    for seed, (name, alphabet) in enumerate(DOMAINS.items()):
        (folder / f"{name}.txt").write_text("\n".join(invented_lines(alphabet, seed)))
        domains.append(Domain(name, [str(folder / f"{name}.txt")], {"latin": 2.0, "greek": 1.0, "mixed": 1.0}[name]))
    report = train_domains(domains, folder / "joint.model", vocab_size=SIZE)
    return folder, report


def test_size_and_shares(merged):
    folder, report = merged
    assert load(folder / "joint.model").vocab_size == SIZE
    assert report.reserved == RESERVED + 256
    added = {d.name: d.added for d in report.domains}
    assert sum(added.values()) + report.reserved == SIZE
    budget = SIZE - report.reserved
    assert all(abs(added[n] - budget * share) <= 2 for n, share in (("latin", 0.5), ("greek", 0.25), ("mixed", 0.25)))
    assert all(d.present >= d.added for d in report.domains)


def test_no_piece_twice_and_every_piece_comes_out(merged):
    folder, _ = merged
    proto = sentencepiece_model_pb2.ModelProto.FromString((folder / "joint.model").read_bytes())
    pieces = [p.piece for p in proto.pieces]
    assert len(set(pieces)) == len(pieces)
    model = SentencePieceProcessor(model_file=str(folder / "joint.model"))
    for p in proto.pieces:
        if p.type == p.NORMAL and len(p.piece) > 1:
            assert model.encode(p.piece.replace("\u2581", " "), out_type=str) == [p.piece]


def test_scores_keep_each_domains_order(merged):
    folder, _ = merged
    joint = sentencepiece_model_pb2.ModelProto.FromString((folder / "joint.model").read_bytes())
    scores = [p.score for p in joint.pieces if p.type == p.NORMAL]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)
    kinds = [len(p.piece) > 1 for p in joint.pieces if p.type == p.NORMAL]
    assert kinds == sorted(kinds, reverse=True)  # merges before characters


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=80))
def test_gives_every_text_back(merged, text):
    tokenizer = load(merged[0] / "joint.model")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_serves_each_domain_better_than_a_vocabulary_of_another(merged):
    """At equal size the joint vocabulary needs far fewer tokens for a domain than one that never saw it."""
    folder, _ = merged
    lines = {name: invented_lines(alphabet, seed, 40) for seed, (name, alphabet) in enumerate(DOMAINS.items())}
    latin_only = train(invented_lines(DOMAINS["latin"], 0), SIZE)
    latin = SentencePieceProcessor(model_proto=latin_only)
    joint = load(folder / "joint.model")
    text = "\n".join(lines["greek"])
    assert len(joint.encode(text)) < 0.5 * len(latin.encode(text))


def test_equal_domains_share_everything():
    """What both have costs once: the second of two equal domains brings what the first has not brought yet."""
    model = train(invented_lines(DOMAINS["latin"], 0), 400)
    joint, report = merge_models({"a": model, "b": model}, {"a": 1, "b": 1}, budget=100)
    single = sentencepiece_model_pb2.ModelProto.FromString(model)
    both = sentencepiece_model_pb2.ModelProto.FromString(joint)
    best = [p.piece for p in single.pieces if p.type == p.NORMAL and len(p.piece) > 1]
    ours = [p.piece for p in both.pieces if p.type == p.NORMAL and len(p.piece) > 1]
    assert ours == best[: len(ours)]
    assert [d.added for d in report.domains] == [50, 50]
    assert [d.present for d in report.domains] == [100, 100]


@pytest.mark.parametrize(
    ("domains", "words"),
    [
        ([("a", 1)], "needs two domains or more"),
        ([("a", 1), ("a", 2)], "'a' is given twice"),
        ([("a", 1), ("b", 0)], "'b' has weight 0"),
        ([("a", 1), ("b", float("inf"))], "'b' has weight inf"),
    ],
)
def test_wrong_domains(tmp_path, domains, words):
    (tmp_path / "t.txt").write_text("some text\n" * 9)
    with pytest.raises(DataError, match=words):
        train_domains([Domain(n, [str(tmp_path)], w) for n, w in domains], tmp_path / "x.model", vocab_size=300)


def test_more_pieces_than_the_texts_have(tmp_path):
    (tmp_path / "t.txt").write_text("some text\n" * 9)
    with pytest.raises(DataError, match=r"--vocab-size is \d+ pieces more than the domains' texts can fill"):
        train_domains([Domain(n, [str(tmp_path)]) for n in "ab"], tmp_path / "x.model", vocab_size=600)
