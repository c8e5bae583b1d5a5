"""Packing: what a sample holds, against the plainest possible account of it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.data import DataSource
from llmtrain.data.batch import NO_TARGET
from llmtrain.data.dataset import build_dataset, to_batch
from llmtrain.data.errors import DataError
from llmtrain.data.packing import PackedSource, shuffled
from llmtrain.data.token_file import TokenFile, TokenWriter


def corpus(prefix, lengths):
    """Documents whose tokens say where they stand: document d has 1000 d, 1000 d + 1, ..."""
    with TokenWriter(prefix, np.int32) as writer:
        for d, length in enumerate(lengths):
            writer.add(np.arange(length) + 1000 * d)
    return str(prefix)


def row_by_hand(tokens):
    """Documents, positions and targets of S + 1 tokens of `corpus`, token by token."""
    documents, positions, targets = [], [], []
    for i, token in enumerate(tokens[:-1]):
        new = i == 0 or token // 1000 != tokens[i - 1] // 1000
        documents = [*documents, 1] if new else [*documents[:-1], documents[-1] + 1]
        positions.append(0 if new else positions[-1] + 1)
        targets.append(tokens[i + 1] if tokens[i + 1] // 1000 == token // 1000 else NO_TARGET)
    return tuple(documents), positions, targets


lengths_strategy = st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(lambda x: sum(x) > 12)


@settings(max_examples=60, deadline=None)
@given(lengths_strategy, st.integers(1, 11), st.integers(0, 3), st.booleans())
def test_every_sample_is_what_it_should_be(tmp_path_factory, lengths, seq_len, seed, shuffle):
    folder = tmp_path_factory.mktemp("packed")
    source = PackedSource(corpus(folder / "x", lengths), seq_len=seq_len, seed=seed, shuffle=shuffle, cache=folder)
    per_epoch = (sum(lengths) - 1) // seq_len
    assert source.samples_per_epoch == per_epoch
    for epoch in range(2):
        samples = [source.sample(epoch * per_epoch + i) for i in range(per_epoch)]
        batch = to_batch(samples, indices=range(per_epoch), document_mask=True)
        for row, sample in enumerate(samples):
            documents, positions, targets = row_by_hand(sample.tokens.tolist())
            assert batch.documents[row] == documents
            assert batch.positions[row].tolist() == positions
            assert batch.targets[row].tolist() == targets
            assert batch.tokens[row].tolist() == sample.tokens[:-1].tolist()
        seen = Counter(t for s in samples for t in s.tokens[:-1].tolist())
        assert set(seen.values()) == {1}  # a token is an input once per epoch
        everything = {1000 * d + i for d, n in enumerate(lengths) for i in range(n)}
        assert set(seen) <= everything
        assert len(everything) - len(seen) <= seq_len


def test_without_shuffle_it_is_the_file(tmp_path):
    prefix = corpus(tmp_path / "x", [5, 3, 9])
    source = PackedSource(prefix, seq_len=4, seed=0, shuffle=False, cache=tmp_path)
    stream = TokenFile(prefix).tokens.tolist()
    assert [source.sample(i).tokens.tolist() for i in (0, 1, 2, 3, 4)] == [stream[4 * i : 4 * i + 5] for i in (0, 1, 2, 3, 0)]


def test_epochs_and_seeds_have_their_own_order(tmp_path):
    prefix = corpus(tmp_path / "x", [7] * 60)

    def order(seed, epoch):
        source = PackedSource(prefix, seq_len=7, seed=seed, shuffle=True, cache=tmp_path)
        return [source.sample(epoch * source.samples_per_epoch + i).tokens[0] // 1000 for i in range(source.samples_per_epoch)]

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert order(0, 0) == orders[0]


def test_shuffled_is_a_fixed_permutation():
    assert shuffled(8, 1234, 0).tolist() == shuffled(8, 1234, 0).tolist()
    assert sorted(shuffled(1000, 5, 1).tolist()) == list(range(1000))
    assert shuffled(8, 1234, 0).tolist() == FIRST_ORDER  # a stored value: a resumed run must find the order that it left


FIRST_ORDER = [7, 3, 0, 1, 4, 2, 5, 6]


def test_documents_follow_from_the_index_and_not_from_a_token(tmp_path):
    """Two documents of equal tokens are two documents."""
    with TokenWriter(tmp_path / "x", np.uint16) as writer:
        writer.add([5, 5, 5])
        writer.add([5, 5, 5, 5])
    dataset = build_dataset([DataSource(path=str(tmp_path / "x"))], seq_len=6, samples=1, seed=0, shuffle=False)
    batch = dataset.batch(0, 1)
    assert batch.documents == ((3, 3),)
    assert batch.targets.tolist() == [[5, 5, NO_TARGET, 5, 5, 5]]
    assert batch.target_count == 5


def test_target_in_the_next_document_at_the_sample_end(tmp_path):
    prefix = corpus(tmp_path / "x", [4, 4])
    batch = build_dataset([DataSource(path=prefix)], seq_len=4, samples=1, seed=0, shuffle=False).batch(0, 1)
    assert batch.documents == ((4,),)
    assert batch.targets.tolist() == [[1, 2, 3, NO_TARGET]]


def test_without_document_mask_all_targets_count(tmp_path):
    prefix = corpus(tmp_path / "x", [4, 4])
    batch = build_dataset([DataSource(path=prefix)], seq_len=6, samples=1, seed=0, shuffle=False, document_mask=False).batch(0, 1)
    assert batch.documents is None
    assert batch.targets.tolist() == [[1, 2, 3, 1000, 1001, 1002]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_too_few_tokens(tmp_path):
    prefix = corpus(tmp_path / "x", [4])
    with pytest.raises(DataError, match=r"x: 4 tokens, fewer than one sample of 4 \+ 1; lower train.seq_len"):
        build_dataset([DataSource(path=prefix)], seq_len=4, samples=1, seed=0)
