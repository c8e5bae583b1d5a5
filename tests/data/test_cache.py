"""Arrays built once for all processes."""

import multiprocessing
import time

import numpy as np
import pytest

from llmtrain.data.cache import cached_arrays, content_key
from llmtrain.data.errors import DataError


def _want(folder, log, results):
    def build():
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.3)
        return {"a": np.arange(5)}

    results.put(cached_arrays(folder, build)["a"].tolist())


def test_built_by_one_process_while_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_want, args=(tmp_path / "c" / "x", tmp_path / "log", results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    assert [results.get(timeout=600) for _ in ranks] == [[0, 1, 2, 3, 4]] * 4
    for rank in ranks:
        rank.join()
    assert (tmp_path / "log").read_text() == "built\n"


def test_failed_build_leaves_nothing_to_be_taken_for_whole(tmp_path):
    def fail():
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        cached_arrays(tmp_path / "x", fail)
    assert cached_arrays(tmp_path / "x", lambda: {"a": np.arange(2)})["a"].tolist() == [0, 1]


def test_damaged_array_names_the_file(tmp_path):
    cached_arrays(tmp_path / "x", lambda: {"a": np.arange(100)})
    (tmp_path / "x" / "a.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.npy: damaged sample index"):
        cached_arrays(tmp_path / "x", dict)


def test_key_follows_every_setting():
    assert content_key(a=1, b=2) == content_key(b=2, a=1)
    assert content_key(a=1) != content_key(a=2)
