"""What heads of multi-token prediction are fed and asked."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.data.batch import NO_TARGET, Batch


def shifted(batch: Batch, by: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets `by` places further on in every row of a whole batch, each [B,S] int64, by >= 1.

    Token i is token i + by; that after the last is the row's last target, and where there is none the token is 0. Target i is target
    i + by, which is token i + by + 1, if it is in the same document and row, and -100 otherwise. Tokens that belong to the next
    document are left: only positions without a target see them.
    """
    length = batch.tokens.shape[1]
    if not 0 < by < length:
        raise ValueError(f"shifted by {by}: allowed are 1 to {length - 1} in sequences of {length} tokens; change model.mtp.heads")
    following = F.pad(batch.targets[:, -1:].clamp(min=0), (0, by - 1))
    tokens = torch.cat((batch.tokens[:, by:], following), 1)
    # Positions start anew in every document, so they run on only inside one.
    same = batch.positions[:, by:] - batch.positions[:, :-by] == by
    return tokens, F.pad(batch.targets[:, by:].masked_fill(~same, NO_TARGET), (0, by), value=NO_TARGET)
