"""Reading ahead: order, errors, stopping."""

import gc
import threading
import time

import pytest

from llmtrain.data.prefetch import prefetch


def alive():
    return [t for t in threading.enumerate() if t.name == "prefetch"]


def test_same_items_in_order():
    assert list(prefetch(iter(range(100)), 3)) == list(range(100))
    assert not alive()


def test_error_comes_where_the_item_would_have():
    def items():
        yield 1
        raise KeyError("broken")

    stream = prefetch(items(), 4)
    assert next(stream) == 1
    with pytest.raises(KeyError, match="broken"):
        next(stream)


def test_reads_ahead_but_no_further_than_depth():
    read = []

    def items():
        for i in range(100):
            read.append(i)
            yield i

    stream = prefetch(items(), 3)
    next(stream)
    deadline = time.monotonic() + 5
    while len(read) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert read == list(range(5))  # one taken, three waiting, one in hand
    stream.close()
    assert not alive()


def test_dropped_without_closing_stops_the_thread():
    def items():
        while True:
            yield 0

    stream = prefetch(items(), 2)
    next(stream)
    assert alive()
    del stream
    gc.collect()
    assert not alive()
