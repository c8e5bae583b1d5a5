"""Whole conversations into rows by best fit: the longest first, each into the fullest row that still has room.

(Ding et al. 2024, Fewer Truncations Improve Language Modeling, arXiv 2404.10830, packs documents so.) Which lengths share a row depends on
the lengths alone, so that every epoch has as many rows; which conversations of a length these are, and the order of rows, is each epoch's
own.
"""

from bisect import bisect_left, insort

import numpy as np

from llmtrain.data.packing import shuffled


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """The row of each length, int64; `lengths` fall, none is above `room`, and no row holds more than that."""
    rows = np.empty(len(lengths), np.int64)
    with_space: dict[int, list[int]] = {}  # rows by the space left in them
    spaces: list[int] = []  # those that occur, rising
    count = 0
    for place, length in enumerate(lengths.tolist()):
        found = bisect_left(spaces, length)
        if found == len(spaces):
            row, space, count = count, room, count + 1
        else:
            space = spaces[found]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[found]
        rows[place] = row
        if left := space - length:
            if left not in with_space:
                with_space[left] = []
                insort(spaces, left)
            with_space[left].append(row)
    return rows


def pack(lengths: np.ndarray, *, room: int, together: bool) -> dict[str, np.ndarray]:
    """What all epochs share: `row` of every place, from the longest conversation to the shortest.

    together: several in a row; else each has one of its own.
    """
    falling = np.sort(lengths)[::-1]
    return {"row": best_fit(falling, room) if together else np.arange(len(falling))}


def epoch_rows(lengths: np.ndarray, row: np.ndarray, *, key: tuple[int, int] | None) -> dict[str, np.ndarray]:
    """The rows of one epoch: conversations `members[first[r]:first[r + 1]]` are in row r.

    key: seed and epoch of the order; None keeps that of the file, of rows as of the conversations in them.
    """
    count = len(lengths)
    order = np.arange(count) if key is None else shuffled(count, key[0], 2 * key[1]).astype(np.int64)
    by_place = order[np.argsort(-lengths[order], kind="stable")]  # conversation at each place, from the longest
    if key is None:
        earliest = np.full(int(row.max()) + 1, count)
        np.minimum.at(earliest, row, by_place)
        new = np.argsort(np.argsort(earliest))  # rows by their earliest conversation
        sort = np.lexsort((by_place, new[row]))
    else:
        new = shuffled(int(row.max()) + 1, key[0], 2 * key[1] + 1).astype(np.int64)
        sort = np.argsort(new[row], kind="stable")
    sizes = np.bincount(new[row])
    return {"members": by_place[sort], "first": np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])}
