"""Which rank of cp holds which tokens of a row: every document is cut in 2 x cp chunks, and rank r holds chunks r and 2 cp - 1 - r of each.

The sub-sequence partition of Pangu Ultra (arXiv 2504.07866, section 4): under a causal mask that keeps documents apart, a pair of one early
and one late chunk costs the same on every rank. Where the paper pads each document to a multiple of 2 x cp, chunks here differ by a token
instead, and the longer ones go to the ranks that hold least so far: a row of S tokens then takes ceil(S / cp) on every rank, with no
padding at all if cp divides S, however short its documents are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, groupby, pairwise

import numpy as np

Documents = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Part:
    """What one rank holds of one document: two chunks, next to each other in the rank's row from `at` on.

    Chunks are in coordinates of the document, which starts at `begin` of the whole row; either may be empty.
    """

    begin: int
    at: int
    early: range
    late: range

    @property
    def middle(self) -> int:
        """Where the late chunk begins in the rank's row."""
        return self.at + len(self.early)

    @property
    def end(self) -> int:
        """Where the part ends in the rank's row."""
        return self.middle + len(self.late)

    @property
    def runs(self) -> list[range]:
        """The chunks that are not empty; one run where they touch."""
        if self.early and self.late and self.early.stop == self.late.start:
            return [range(self.early.start, self.late.stop)]
        return [chunk for chunk in (self.early, self.late) if chunk]

    @property
    def entries(self) -> int:
        """Scores that causal attention computes for these queries."""
        return sum((chunk.start + 1 + chunk.stop) * len(chunk) // 2 for chunk in (self.early, self.late))


@dataclass(frozen=True)
class Piece:
    """One product of attention on the ring: queries of a rank's rows by keys of another's, all of them seen or (own block) causal."""

    rows: slice
    queries: slice
    keys: slice
    causal: bool


@dataclass(frozen=True)
class Partition:
    """The rows of a batch, parted. `parts[row][rank]` lists a Part per document; every rank's rows hold `local_length` tokens."""

    documents: Documents
    cp: int
    local_length: int
    parts: tuple[tuple[tuple[Part, ...], ...], ...]

    @property
    def seq_len(self) -> int:
        """Tokens of a whole row."""
        return sum(self.documents[0])

    @property
    def padding_share(self) -> float:
        """Part of all places that holds no token."""
        return 1.0 - self.seq_len / (self.cp * self.local_length)

    @cached_property
    def groups(self) -> list[tuple[slice, int]]:
        """Neighbouring rows of one layout, as (rows, one of them): they share calls."""
        runs = [list(run) for _, run in groupby(range(len(self.documents)), key=lambda row: self.documents[row])]
        return [(slice(run[0], run[-1] + 1), run[0]) for run in runs]

    @cached_property
    def sources(self) -> np.ndarray:
        """Position in the whole row of each place, [cp, rows, local_length]; -1 is padding."""
        found = np.full((self.cp, len(self.documents), self.local_length), -1, dtype=np.int64)
        for row, ranks in enumerate(self.parts):
            for rank, parts in enumerate(ranks):
                for part in parts:
                    found[rank, row, part.at : part.middle] = part.begin + np.arange(part.early.start, part.early.stop)
                    found[rank, row, part.middle : part.end] = part.begin + np.arange(part.late.start, part.late.stop)
        return found

    @cached_property
    def places(self) -> np.ndarray:
        """Where each position of the whole row lies in the ranks' rows joined one after the other, [rows, seq_len]; undoes `sources`."""
        joined = self.sources.transpose(1, 0, 2).reshape(len(self.documents), -1)
        return np.stack([np.argsort(row, kind="stable")[row.size - self.seq_len :] for row in joined])

    def pieces(self, rank: int, source: int) -> Iterator[Piece]:
        """What `rank` computes when it has the keys of `source`; over all sources, every score that its queries see, once."""
        for rows, row in self.groups:
            for mine, theirs in zip(self.parts[row][rank], self.parts[row][source]):
                queries = slice(mine.middle if source > rank else mine.at, mine.end)
                keys = slice(theirs.at, theirs.middle if source < rank else theirs.end)
                if queries.start < queries.stop and keys.start < keys.stop:
                    yield Piece(rows, queries, keys, causal=source == rank)

    def score_entries(self, rank: int) -> int:
        """Scores that causal attention computes on `rank`, over all rows."""
        return sum(part.entries for ranks in self.parts for part in ranks[rank])


@lru_cache(maxsize=64)
def partition(documents: Documents, cp: int, multiple: int = 1) -> Partition:
    """Part rows over `cp` ranks; `documents` holds the document lengths of each row, and `multiple` divides the length of a rank's rows.

    Kept for the last calls, so layers and pipeline stages that ask for the same micro-batch share one (`partition.cache_info()` counts).
    Raises ValueError where rows have different lengths or a document is empty.
    """
    lengths = {sum(row) for row in documents}
    if len(lengths) != 1 or any(n < 1 for row in documents for n in row):
        raise ValueError(
            f"documents of rows with {sorted(lengths)} tokens; every row has to hold the same number, in documents of 1 or more"
        )
    parted: dict[tuple[int, ...], tuple[tuple[Part, ...], ...]] = {}
    for row in documents:
        if row not in parted:
            parted[row] = _part_row(row, cp)
    held = max(ranks[rank][-1].end for ranks in parted.values() for rank in range(cp))
    return Partition(documents, cp, -(-held // multiple) * multiple, tuple(parted[row] for row in documents))


def _part_row(lengths: tuple[int, ...], cp: int) -> tuple[tuple[Part, ...], ...]:
    parts: list[list[Part]] = [[] for _ in range(cp)]
    tokens, entries = [0] * cp, [0] * cp
    for begin, length in zip(accumulate(lengths, initial=0), lengths):
        ends = list(accumulate(_chunk_sizes(length, tokens, entries), initial=0))
        chunks = [range(start, stop) for start, stop in pairwise(ends)]
        for rank in range(cp):
            part = Part(begin, tokens[rank], chunks[rank], chunks[2 * cp - 1 - rank])
            parts[rank].append(part)
            tokens[rank] = part.end
            entries[rank] += part.entries
    return tuple(map(tuple, parts))


def _chunk_sizes(length: int, tokens: list[int], entries: list[int]) -> list[int]:
    """Sizes of the 2 x cp chunks of a document, the remainder handed to the ranks that hold the fewest tokens, then the fewest scores."""
    cp = len(tokens)
    size, extra = divmod(length, 2 * cp)
    sizes = [size] * (2 * cp)
    # Ranks hold tokens that differ by one at most, so the first `extra` turns of this order keep it that way.
    turns = sorted((tokens[rank] + turn, entries[rank], rank, turn) for rank in range(cp) for turn in (0, 1))
    for _, _, rank, turn in turns[:extra]:
        sizes[2 * cp - 1 - rank if turn else rank] += 1
    return sizes
