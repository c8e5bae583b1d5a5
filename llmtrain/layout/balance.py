"""Groups of sequences over which experts are balanced: which group a row of a micro-batch belongs to, as arithmetic.

Samples of a step are numbered 0 to `batch` - 1. Micro-batch m of data rank r of R holds `rows` of them from (m R + r) rows on, and a group
holds `size` samples that follow each other. So the mesh changes who computes a sample, not which group it is in.
"""

from dataclasses import dataclass

from llmtrain.config.ffn import BalanceConfig
from llmtrain.errors import UserError


@dataclass(frozen=True)
class Groups:
    """The groups of one step."""

    size: int
    """Sequences of a group."""
    batch: int
    """Sequences of the step."""
    seq_len: int
    """Tokens of a sequence."""
    rows: int
    """Sequences of a micro-batch."""
    ranks: int
    """Ranks that read different samples."""

    @classmethod
    def of_step(cls, balance: BalanceConfig | None, *, batch: int, rows: int, seq_len: int, ranks: int) -> "Groups":
        """Of a step of `batch` sequences in micro-batches of `rows` on each of `ranks` data ranks. Without `balance` each row is one.

        Raises:
            UserError: groups that do not fit, with the arithmetic.
        """
        size = 1 if balance is None else batch if balance.sequences == "step" else balance.sequences
        name, at_once = f"model.ffn.balance.sequences {size}", rows * ranks
        if batch % size:
            raise UserError(f"{name} does not divide the {batch} sequences of a step; change it or train.global_batch")
        if size % rows and rows % size:
            raise UserError(f"{name} and train.micro_batch {rows}: one must divide the other; change either")
        if size % at_once and at_once % size:
            raise UserError(
                f"{name} and the {at_once} sequences that are computed at once (micro_batch {rows} x {ranks} data ranks): one must divide "
                "the other; change either"
            )
        return cls(size, batch, seq_len, rows, ranks)

    @property
    def count(self) -> int:
        """Groups of the step."""
        return self.batch // self.size

    @property
    def tokens(self) -> int:
        """Tokens of a group."""
        return self.size * self.seq_len

    @property
    def all_tokens(self) -> int:
        """Tokens of the step."""
        return self.batch * self.seq_len

    @property
    def window(self) -> int:
        """Micro-batches that have to be forwarded before one of them can be differentiated: those that share groups."""
        return max(1, self.size // (self.rows * self.ranks))

    def numbered(self, micro_batches: int, rank: int) -> tuple[list[list[int]], int]:
        """For the micro-batches of a window: the group of each row of `rank`, and how many groups there are, its own ones or, where they
        reach over ranks, everybody's, who then number them alike."""
        ranks, rank = (self.ranks, rank) if self.over_ranks else (1, 0)
        rows = self.rows
        firsts = [(at * ranks + rank) * rows for at in range(micro_batches)]
        groups = [[sample // self.size for sample in range(first, first + rows)] for first in firsts]
        return groups, max(1, micro_batches * ranks * rows // self.size)

    @property
    def over_ranks(self) -> bool:
        """Whether a group reaches over several ranks."""
        return self.size > self.rows and self.ranks > 1
