"""Blending: shares at every prefix, independence of the length, names and weights."""

import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.data import DataSource
from llmtrain.data.blend import WHOLE_PERIOD, Blend, blend_order, count_before, whole_shares
from llmtrain.data.dataset import build_dataset
from llmtrain.data.errors import DataError
from llmtrain.data.token_file import TokenWriter


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any), st.integers(1, 600))
def test_every_prefix_is_within_one_sample(shares, length):
    order = blend_order(shares, length)
    counts = np.cumsum(order[:, None] == np.arange(len(shares)), axis=0)
    wanted = np.arange(1, length + 1)[:, None] * np.array(shares) / sum(shares)
    assert np.abs(counts - wanted).max() < 1
    assert (count_before(order, len(shares)) == counts[np.arange(length), order] - 1).all()


def test_one_big_and_many_small_sources():
    """Where a merge by (n + 1/2) / weight strays by two samples."""
    shares = [8] + [1] * 8
    counts = np.cumsum(blend_order(shares, 16)[:, None] == np.arange(9), axis=0)
    assert np.abs(counts[:, 0] - np.arange(1, 17) / 2).max() < 1


def test_whole_shares():
    assert whole_shares([0.3, 0.7]) == [3, 7]
    assert whole_shares([2.0, 4.0, 0.0]) == [1, 2, 0]
    assert whole_shares([1 / 3, 1 / 3]) == [1, 1]


@pytest.mark.parametrize("weights", [[0.25, 0.75], [0.1234567891, 0.5]])  # a stored period, and an order longer than any
def test_order_does_not_depend_on_the_length(tmp_path, weights):
    short = Blend(weights, samples=50, cache=tmp_path)
    long = Blend(weights, samples=5000, cache=tmp_path)
    assert (sum(short.shares) > WHOLE_PERIOD) == (weights[1] == 0.5)
    assert [short[i] for i in range(50)] == [long[i] for i in range(50)]
    seen = [0, 0]
    for i in range(5000):
        source, index = long[i]
        assert index == seen[source]
        seen[source] += 1
    assert long.counts(5000) == seen


def corpora(folder, **sizes):
    sources = []
    for number, (name, documents) in enumerate(sizes.items()):
        with TokenWriter(folder / name, np.uint16) as writer:
            for _ in range(documents):
                writer.add(np.full(10, number))
        sources.append(DataSource(path=str(folder / name)))
    return sources


def origin(batch):
    return [int(row[0]) for row in batch.tokens]


def test_random_access_and_length(tmp_path):
    sources = corpora(tmp_path, a=9, b=20)
    dataset = build_dataset(sources, seq_len=16, samples=40, seed=1)
    whole = dataset.batch(0, 40)
    assert len(dataset) == 40
    for first, count in [(33, 7), (0, 1), (12, 3)]:
        part = dataset.batch(first, count)
        assert torch.equal(part.tokens, whole.tokens[first : first + count])
        assert part.samples == tuple(range(first, first + count))
    longer = build_dataset(sources, seq_len=16, samples=90, seed=1)
    assert torch.equal(longer.batch(0, 40).targets, whole.targets)
    with pytest.raises(IndexError, match="samples 39 to 40 of a dataset of 40"):
        dataset.batch(39, 2)


def test_weights_by_phase(tmp_path):
    sources = corpora(tmp_path, a=9, b=20)
    mixed = build_dataset(sources, seq_len=16, samples=40, seed=1, weights={"a": 1, "b": 3})
    assert origin(mixed.batch(0, 40)).count(1) == 30
    only = build_dataset(sources, seq_len=16, samples=40, seed=1, weights={"b": 2})
    assert set(origin(only.batch(0, 40))) == {1}
    use = mixed.epochs
    assert [(u.name, u.samples, u.samples_per_epoch) for u in use] == [("a", 10, 5), ("b", 30, 12)]
    assert use[0].epochs == 2.0


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("weights", "read"), [(None, {"a": 5, "b": 12}), ({"a": 1, "b": 9}, {"a": 5, "b": 12}), ({"b": 1}, {"b": 12})])
def test_none_reads_every_source_once(tmp_path, weights, read, shuffle):
    """However the sources are weighted, none is cut short and none begins again."""
    sources = corpora(tmp_path, a=9, b=20)
    dataset = build_dataset(sources, seq_len=16, samples=None, seed=1, weights=weights, shuffle=shuffle)
    assert {use.name: use.samples for use in dataset.epochs} == read
    assert all(use.epochs == 1 for use in dataset.epochs)
    assert len(dataset) == sum(read.values())
    counts = np.bincount(origin(dataset.batch(0, len(dataset))), minlength=2)
    assert counts.tolist() == [read.get("a", 0), read.get("b", 0)]


@pytest.mark.parametrize(
    ("weights", "words"),
    [({"c": 1}, "names 'c', which is no source; data.train has a, b"), ({"a": 0}, "all weights are 0")],
)
def test_wrong_weights(tmp_path, weights, words):
    with pytest.raises(DataError, match=words):
        build_dataset(corpora(tmp_path, a=9, b=20), seq_len=16, samples=4, seed=1, weights=weights)


def test_no_source_and_equal_names(tmp_path):
    with pytest.raises(DataError, match=r"data\.train is empty"):
        build_dataset([], seq_len=16, samples=4, seed=1)
    with pytest.raises(DataError, match="two sources are called 'a'"):
        build_dataset(corpora(tmp_path, a=9) * 2, seq_len=16, samples=4, seed=1)


def test_cache_that_cannot_be_written(tmp_path):
    sources = corpora(tmp_path, a=9)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"set data\.cache to another folder"):
        build_dataset(sources, seq_len=16, samples=4, seed=1, cache=tmp_path / "file").batch(0, 1)


def _first_tokens(path, cache, results):
    dataset = build_dataset([DataSource(path=path)], seq_len=16, samples=30, seed=1, cache=cache)
    results.put(dataset.batch(0, 30).tokens.tolist())


def test_processes_share_one_index(tmp_path):
    """Several processes that start at once see the same order, built once and leaving nothing half made."""
    path = corpora(tmp_path, a=30)[0].path
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_first_tokens, args=(path, str(tmp_path / "cache"), results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    rows = [results.get(timeout=600) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert all(r == rows[0] for r in rows)
    assert not list((tmp_path / "cache").rglob("*.part"))
